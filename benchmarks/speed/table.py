"""Measured rows as a table for people and as ``results/speed/<device>.csv``."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from benchmarks import environment
from benchmarks.files import read_json, write_json, write_text

_PEERS = ("pytorch_optimizer", "PyHessian", "curvlinops-for-pytorch")


@dataclass(frozen=True)
class Result:
    """A measured row, or why it could not be measured; every field as it is written.

    Attributes:
        row: Name, with the variant after a slash.
        value: Median.
        spread: Distance between the quartiles of the repetitions.
        limit: What the arithmetic allows.
        goal: What is to be reached.
        met: ``yes``, ``no``, or empty where there is no goal or no value.
        unit: Of value, spread, limit and goal.
        repetitions: How many.
        revision: Of the code.
        compares: What was measured.
        missing: Why there is no value.
    """

    row: str
    value: str
    spread: str
    limit: str
    goal: str
    met: str
    unit: str
    repetitions: str
    revision: str
    compares: str
    missing: str


def show(results: Iterable[Result]) -> Table:
    """The results with their limits and goals."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("row", no_wrap=True)
    for column in ("value", "spread", "limit", "goal"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("met")
    table.add_column("what is compared", overflow="fold")
    for r in results:
        met = Text(r.met, {"yes": "green", "no": "red"}.get(r.met, ""))
        value = f"{r.value} {r.unit}" if r.value else "–"
        about = r.missing or r.compares
        table.add_row(r.row, value, r.spread, r.limit, r.goal, met, Text(about))
    return table


def machine(device: str, threads: int) -> dict[str, Any]:
    """What results of one file have in common."""
    described = environment.describe(device=device, threads=threads, precision="fp32")
    kept = ("python", "platform", "cpu", "cores", "device", "threads")
    peers = environment.packages(_PEERS)
    return {key: described[key] for key in kept} | {"packages": described["packages"] | peers}


def file_of(folder: Path, device: str, threads: int) -> Path:
    """Where the results of a device, driven by so many threads, are kept."""
    return folder / f"{environment.slug(device)}-{threads}-threads.csv"


def read(path: Path) -> list[Result]:
    """The results in a file; none if there is none."""
    if not path.exists():
        return []
    names = {field.name for field in fields(Result)}
    rows = csv.DictReader(io.StringIO(path.read_text()))
    return [Result(**{k: v for k, v in row.items() if k in names}) for row in rows]


def measured(path: Path, here: Mapping[str, Any], revision: str) -> set[str]:
    """Rows that have their figure, or the reason why not, of this machine and this code.

    None where the code is of no commit: it may have changed.
    """
    beside = path.with_suffix(".json")
    if not revision or revision.endswith("+") or not beside.exists() or read_json(beside) != here:
        return set()
    return {r.row for r in read(path) if r.revision == revision}


def merge(
    path: Path, here: Mapping[str, Any], measured: Sequence[Result], order: Sequence[str]
) -> bool:
    """Write results into a device's file, in place of those of the same rows.

    Args:
        path: The file; the machine is kept beside it.
        here: The machine, which all of a file's results were measured on.
        measured: The new ones.
        order: Every row that there is, in order; results of others are dropped.

    Returns:
        Whether older results were dropped because they are of another machine.
    """
    beside = path.with_suffix(".json")
    older = read(path)
    moved = bool(older) and (not beside.exists() or read_json(beside) != here)
    known = {r.row: r for r in ([] if moved else older)} | {r.row: r for r in measured}
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Result)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(known[name]) for name in order if name in known)
    write_json(beside, here)
    write_text(path, text.getvalue())
    return moved
