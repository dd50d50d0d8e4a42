"""From the committed records of a profile's runs to its pages. Knows nothing of PyTorch.

Data flows one way: records (``results``, ``measurements``) → rows that may be averaged
(``guards``) → ``statistics`` → ``verdicts`` and ``tables`` → plots and pages.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.report.guards import weigh
from benchmarks.report.results import read


def write_report(folder: Path, *, split_by: Sequence[str] = ()) -> str:
    """Rebuild every table, plot and page of ``results/<profile>`` from its runs' records.

    Args:
        folder: ``results/<profile>``.
        split_by: What to give rows of their own where runs differ in it; see ``guards.FIELDS``.

    Returns:
        The tables and where the rest is, for the terminal.

    Raises:
        UserError: A record is missing, edited or of another version, or runs that differ in what
            can move the numbers would be averaged.
    """
    from benchmarks.report import (
        curves,
        effects,
        errors,
        hessian,
        html,
        landscape,
        page,
        regime,
        verdicts,
    )
    from benchmarks.report.claims_table import claims_frame
    from benchmarks.report.pictures import FOLDER, csv, write_if_changed

    evidence = weigh(read(folder), split_by)
    found = verdicts.findings(evidence)
    pictures = [
        *effects.draw(evidence, folder),
        *landscape.draw(evidence, folder),
        *curves.draw(evidence, folder),
    ]
    drawn = {name for picture in pictures for name in (picture.file, picture.data)}
    for stale in sorted((folder / FOLDER).glob("*")):
        if stale.name not in drawn:
            stale.unlink()
    frames = {
        "errors.csv": errors.errors_frame(evidence),
        "differences.csv": errors.differences_frame(evidence),
        "post-training.csv": regime.frame(evidence),
        "hessian.csv": hessian.hessian_frame(evidence),
        "range.csv": landscape.range_frame(evidence),
        "claims.csv": claims_frame(found),
    }
    texts = {name: csv(frame) for name, frame in frames.items() if len(frame)}
    texts["README.md"] = page.page(evidence, found, pictures)
    texts["report.html"] = html.report(evidence, found, pictures, folder)
    for name in frames.keys() - texts.keys():
        (folder / name).unlink(missing_ok=True)
    for name, text in texts.items():
        write_if_changed(folder / name, text)
    return f"{page.terminal(evidence, found)}\n\nMore in {folder / 'README.md'}"
