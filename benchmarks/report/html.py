"""``report.html``: everything about a profile on one page that needs nothing but itself."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.reference import Claim
from benchmarks.report import page, regime, tables
from benchmarks.report.guards import Evidence
from benchmarks.report.pictures import FOLDER, Picture
from benchmarks.report.results import Results
from benchmarks.report.verdicts import Finding, tally
from benchmarks.run import Run
from benchmarks.store import State

_TEMPLATES = Path(__file__).parent / "templates"
# What may stand in a data URI as it is, which keeps the page small; line breaks would be lost.
_PLAIN = " /:;,=()?@!$*+~"


def report(
    evidence: Evidence, found: Sequence[Finding], pictures: Sequence[Picture], folder: Path
) -> str:
    """The page; its plots are read from ``plots/`` and become part of it."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["state"] = _state
    results = evidence.results
    profile = results.plan.profile
    return environment.get_template("report.html.j2").render(
        name=results.name,
        profile=profile,
        verdicts=tables.verdict_table(found),
        tally={str(verdict): count for verdict, count in tally(found).items()},
        claims=_claims(found),
        verdict_notes=page.verdict_notes(found),
        verdict_reading=page.verdict_reading(),
        errors=tables.error_table(evidence),
        differences=tables.difference_table(evidence),
        reading=page.reading(evidence),
        regime=regime.table(evidence),
        regime_reading=regime.READING,
        hessian=tables.hessian_table(evidence),
        pictures=[_picture(picture, folder) for picture in pictures],
        cost=tables.cost_table(evidence),
        environments=tables.environment_table(evidence),
        missing=page.missing(evidence),
        warnings=page.warnings(evidence),
        settings=page.settings(profile),
        runs=[_run(results, run) for run in results.plan.runs],
        done=sum(state is State.DONE for state in results.states.values()),
    )


def _claims(found: Sequence[Finding]) -> list[Claim]:
    return list({finding.claim.id: finding.claim for finding in found}.values())


def _picture(picture: Picture, folder: Path) -> dict[str, str]:
    path = folder / FOLDER / picture.file
    return {
        "title": picture.title,
        "alt": picture.alt,
        "caption": picture.caption,
        "source": _data_uri(path),
        "data": f"{FOLDER}/{picture.data}",
    }


def _data_uri(path: Path) -> str:
    """A plot as part of the page."""
    if path.suffix == ".svg":
        return f"data:image/svg+xml,{quote(' '.join(path.read_text().split()), safe=_PLAIN)}"
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _run(results: Results, run: Run) -> dict[str, Any]:
    """What the list of runs says of one."""
    result = results.results.get(run.identity, {})
    return {
        "label": run.label,
        "path": f"runs/{run.name}",
        "identity": run.identity,
        "parent": results.run(run.parent).label if run.parent else "",
        "state": str(results.states[run.identity]),
        "error": f"{result['test_error']:.2f}" if result else "–",
        "seconds": f"{result['seconds']:.0f}" if result else "–",
        "measurements": [m.file for m in results.measurements.get(run.identity, [])],
    }


def _state(text: str) -> str:
    """A verdict or state as a name for the style sheet."""
    return text.split(" " + tables.DEPARTS)[0].lower().replace(" ", "-")
