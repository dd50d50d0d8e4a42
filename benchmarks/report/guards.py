"""Which runs may be averaged or compared with each other.

Within a cell (dataset × backbone × augmentation) every run and all that it descends from must
have been made in one environment, as far as it can move a number; within an arm, all settings but
the seed must be the same. What differs is refused with its reason, or split into rows on request.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from benchmarks.errors import UserError
from benchmarks.plan import Arm
from benchmarks.report.results import Results
from benchmarks.run import Run, RunSettings

Environment = Mapping[str, Any]


def _package(name: str) -> Callable[[Environment], str]:
    return lambda environment: str(environment["packages"].get(name, "missing"))


def _threads(environment: Environment) -> str:
    """Threads move sums on a CPU; on a GPU they only feed it."""
    on_cpu = environment["device"] == environment.get("cpu", environment["device"])
    return str(environment["threads"]) if on_cpu else "any"


# What of an environment can move a number.
_ENVIRONMENT: dict[str, Callable[[Environment], str]] = {
    "device": lambda environment: str(environment["device"]),
    "torch": _package("torch"),
    "timm": _package("timm"),
    "precision": lambda environment: str(environment["precision"]),
    "threads": _threads,
}
# What of a run's settings should be one thing within a cell, or within an arm.
_CELL: dict[str, Callable[[Run], str]] = {"data": lambda run: run.settings.fingerprint}
_ARM: dict[str, Callable[[Run], str]] = {"ascent-batch": lambda run: _ascent_batch(run)}

FIELDS = (*_ENVIRONMENT, *_CELL, *_ARM)

_TITLES = {"data": "data fingerprint", "ascent-batch": "SAM ascent batch"}


@dataclass(frozen=True)
class Row:
    """One row of every table: runs of one arm that may be averaged.

    Attributes:
        arm: As planned.
        runs: Seed → identity, of the runs that are done and belong in this row.
        split: Field → value, of the fields that rows were split by.
    """

    arm: Arm
    runs: dict[int, str]
    split: tuple[tuple[str, str], ...] = ()

    @property
    def cell(self) -> tuple[str, str, str]:
        """Dataset, backbone and augmentation."""
        return self.arm.dataset, self.arm.backbone, self.arm.augmentation

    @property
    def expected(self) -> int:
        """Seeds planned; of an arm whose data could not be had, none has a run."""
        return len(self.arm.runs)


@dataclass(frozen=True)
class Evidence:
    """What tables, plots and verdicts are made from: results, and which of them go together.

    Attributes:
        results: All of them.
        rows: In the plan's order.
        split_by: The fields that rows were split by.
    """

    results: Results
    rows: tuple[Row, ...]
    split_by: tuple[str, ...] = ()

    def pairs(self) -> Iterator[tuple[Row, Row]]:
        """(Post-trained row, its base row) for every post-training method."""
        for row in self.rows:
            base = self.partner(row, row.arm.method.partition("+")[0])
            if base is not None and base is not row:
                yield row, base

    def partner(self, row: Row, method: str) -> Row | None:
        """The row of another method that a row may be compared with."""
        for other in self.rows:
            if (other.cell, other.split, other.arm.method) == (row.cell, row.split, method):
                return other
        return None


def weigh(results: Results, split_by: Sequence[str] = ()) -> Evidence:
    """Sort results into rows.

    Args:
        results: Of a profile.
        split_by: Fields of ``FIELDS`` whose values get rows of their own.

    Raises:
        UserError: Runs that differ in what can move the numbers would share a row or be
            compared, or a field is unknown.
    """
    unknown = [field for field in split_by if field not in FIELDS]
    if unknown:
        raise UserError(f"--split-by {unknown[0]}: unknown; there are: {', '.join(FIELDS)}")
    cells: dict[tuple[str, str, str], list[Row]] = {}
    for arm in results.plan.arms:
        key = (arm.dataset, arm.backbone, arm.augmentation)
        cells.setdefault(key, []).extend(_split(results, arm, split_by))
    rows = tuple(row for cell in cells.values() for row in cell)
    for cell in cells.values():
        _check_cell(results, cell)
    for row in rows:
        _check_arm(results, row)
    return Evidence(results, rows, tuple(split_by))


def value(results: Results, identity: str, field: str) -> str:
    """What a run and all it descends from have for a field; several values where it moved."""
    found: list[str] = []
    for run in results.lineage(identity):
        if field in _ENVIRONMENT:
            environments = results.environments.get(run.identity, [])
            values = [_ENVIRONMENT[field](environment) for environment in environments]
        else:
            values = [(_CELL | _ARM)[field](run)]
        found += dict.fromkeys(v for v in values if v and v not in found)
    return " then ".join(found)


def title(field: str) -> str:
    """A field as people call it."""
    return _TITLES.get(field, field)


def _ascent_batch(run: Run) -> str:
    """Images that share one ascent step of SAM; empty for other methods."""
    sam = run.settings.sam
    return str(sam.m_sharpness or run.settings.batch_size) if sam is not None else ""


def _split(results: Results, arm: Arm, split_by: Sequence[str]) -> list[Row]:
    """The rows of an arm: one, or one for each combination of the fields' values."""
    groups: dict[tuple[tuple[str, str], ...], dict[int, str]] = {}
    for seed, identity in arm.runs.items():
        if identity in results.results:
            key = tuple((field, value(results, identity, field)) for field in split_by)
            groups.setdefault(key, {})[seed] = identity
    if not groups:
        return [Row(arm, {})]
    return [Row(arm, runs, key) for key, runs in sorted(groups.items())]


def _check_cell(results: Results, rows: Sequence[Row]) -> None:
    """No two runs of a cell, of whatever methods, differ in where they were made."""
    for split in {row.split: None for row in rows}:
        for field in (*_ENVIRONMENT, *_CELL):
            members = [
                (value(results, identity, field), results.run(identity))
                for row in rows
                if row.split == split
                for identity in row.runs.values()
            ]
            _require_one(results, field, members)


def _check_arm(results: Results, row: Row) -> None:
    for field in _ARM:
        members = [(value(results, i, field), results.run(i)) for i in row.runs.values()]
        _require_one(results, field, members)
    allowed = {"seed", "fingerprint"} | ({"sam"} if any(f in _ARM for f, _ in row.split) else set())
    first: tuple[Run, dict[str, Any]] | None = None
    for identity in row.runs.values():
        run = results.run(identity)
        settings = TypeAdapter(RunSettings).dump_python(run.settings, mode="json")
        if first is None:
            first = run, settings
            continue
        for key in settings | first[1]:  # some are written down only where they are on
            if key not in allowed and settings.get(key) != first[1].get(key):
                raise UserError(
                    f"{run.label} and {first[0].label}: not averaged, their settings differ in "
                    f"{key}"
                )


def _require_one(results: Results, field: str, members: Sequence[tuple[str, Run]]) -> None:
    by_value: dict[str, Run] = {}
    for found, run in members:
        by_value.setdefault(found, run)
    if len(by_value) > 1:
        (one, first), (two, second) = list(by_value.items())[:2]
        raise UserError(
            f"{first.label} and {second.label}: not pooled, they differ in {title(field)}: {one} "
            f"and {two}; python -m benchmarks report --profile {results.name} --split-by {field} "
            "gives each its own rows"
        )
