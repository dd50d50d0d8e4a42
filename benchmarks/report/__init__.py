"""From the committed records of a profile's runs to its tables. Knows nothing of PyTorch."""

from pathlib import Path

from benchmarks.files import write_text
from benchmarks.report.errors import errors_csv, errors_frame
from benchmarks.report.page import page, tables
from benchmarks.report.results import read


def write_report(folder: Path) -> str:
    """Rebuild ``errors.csv`` and ``README.md`` of ``results/<profile>``.

    Returns:
        The tables and where the rest is, for the terminal.

    Raises:
        UserError: A record is missing, edited or of another version.
    """
    results = read(folder)
    for name, text in (
        ("errors.csv", errors_csv(errors_frame(results))),
        ("README.md", page(results)),
    ):
        path = folder / name
        if not path.exists() or path.read_text() != text:
            write_text(path, text)
    return f"{tables(results)}\n\nMore in {folder / 'README.md'}"
