"""A plot as the pages show it: where it is, what it says, and where its numbers are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from benchmarks.files import write_bytes
from benchmarks.report.guards import Row

FOLDER = "plots"
# Arms that one can tell apart in one plot; a sweep may have dozens.
MOST_ARMS = 7


def drawn(rows: Sequence[Row]) -> tuple[list[Row], str]:
    """The rows of a cell that plots with a line an arm show, and what to say of the others.

    The first ones listed in the profile; the plots of effects and the tables hold every arm.
    """
    if len(rows) <= MOST_ARMS:
        return list(rows), ""
    return list(rows[:MOST_ARMS]), (
        f" Of {len(rows)} arms, the first {MOST_ARMS} of the profile are drawn; the tables and the "
        "plots of paired effects hold all."
    )


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
