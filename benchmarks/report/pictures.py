"""A plot as the pages show it: where it is, what it says, and where its numbers are."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from benchmarks.files import write_bytes

FOLDER = "plots"


@dataclass(frozen=True)
class Picture:
    """One plot.

    Attributes:
        file: Its name in ``plots/``; its numbers are beside it under the same name, ``.csv``.
        title: A heading.
        alt: What it shows and what one finds there, for whoever does not see it.
        caption: How to read it.
    """

    file: str
    title: str
    alt: str
    caption: str = ""

    @property
    def data(self) -> str:
        """The name of the file with its numbers."""
        return Path(self.file).with_suffix(".csv").name


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a table, the same bytes for the same numbers."""
    write_if_changed(path, csv(frame))


def write_if_changed(path: Path, text: str) -> None:
    """Write a text; an unchanged file is not touched."""
    content = text.encode()
    if not path.exists() or path.read_bytes() != content:
        write_bytes(path, content, durable=False)


def csv(frame: pd.DataFrame) -> str:
    """A table as text: six decimals unless that would lose what a small number says."""
    shown = frame.copy()
    for name in shown.columns:
        if pd.api.types.is_float_dtype(shown[name]):
            shown[name] = [_number(value) for value in shown[name]]
    return str(shown.to_csv(index=False, lineterminator="\n"))


def _number(value: float) -> str:
    if value != value:
        return ""
    return f"{value:.6f}" if value == 0 or 1e-3 <= abs(value) < 1e9 else f"{value:.6g}"
