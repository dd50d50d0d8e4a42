"""All rows of the suite: which there are, choosing among them, measuring them."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatch

from benchmarks.environment import code_revision
from benchmarks.errors import UserError
from benchmarks.speed import accelerator, curvature, harness, pipeline, ranges, training
from benchmarks.speed.core import median_and_spread
from benchmarks.speed.row import Bench, Row, Variant
from benchmarks.speed.table import Result

ROWS: tuple[Row, ...] = (
    *training.ROWS,
    *pipeline.ROWS,
    *ranges.ROWS,
    *harness.ROWS,
    *curvature.ROWS,
    *accelerator.ROWS,
)


def names() -> list[str]:
    """Every row with its variants, in order."""
    return [name_of(row, variant) for row, variant in _all()]


def choose(asked: Sequence[str], device: str) -> list[tuple[Row, Variant]]:
    """Rows by name, all variants unless one is named; ``*`` stands for anything.

    Args:
        asked: Names; none: every row.
        device: ``cpu`` or ``cuda``: rows that mean nothing there are left out.

    Raises:
        UserError: A name names nothing.
    """
    chosen = []
    for row, variant in _all():
        name = name_of(row, variant)
        if row.device not in (None, device):
            continue
        if not asked or any(fnmatch(name, a) or fnmatch(row.name, a) for a in asked):
            chosen.append((row, variant))
    for a in asked:
        if not any(fnmatch(name_of(row, v), a) or fnmatch(row.name, a) for row, v in chosen):
            raise UserError(f"no row {a!r}; there are: {', '.join(row.name for row in ROWS)}")
    return chosen


def measure(bench: Bench, row: Row, variant: Variant) -> Result:
    """Measure one row; what it lacks is said in the result."""
    revision = code_revision()
    common = {
        "row": name_of(row, variant),
        "limit": _number(row.limit),
        "goal": _number(row.goal_on(bench.device.type)),
        "unit": row.unit,
        "revision": f"{(revision['revision'] or '')[:12]}{'+' if revision['dirty'] else ''}",
        "compares": row.compares,
    }
    try:
        values = row.measure(bench, variant)
    except UserError as error:
        nothing = {"value": "", "spread": "", "met": "", "repetitions": "0"}
        return Result(**common, **nothing, missing=str(error))
    value, spread = median_and_spread(values)
    return Result(
        **common,
        value=_number(value),
        spread=_number(spread),
        met="" if not common["goal"] else ("yes" if row.met(value, bench.device.type) else "no"),
        repetitions=str(len(values)),
        missing="",
    )


def _all() -> Iterator[tuple[Row, Variant]]:
    for row in ROWS:
        for variant in row.variants or (Variant(""),):
            yield row, variant


def name_of(row: Row, variant: Variant) -> str:
    """What a row, measured on a variant, is called."""
    return f"{row.name}/{variant.name}" if variant.name else row.name


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
