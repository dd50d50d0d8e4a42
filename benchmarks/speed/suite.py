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
        UserError: A name names nothing, or none of them means anything on this device.
    """

    def named(a: str) -> list[tuple[Row, Variant]]:
        return [(r, v) for r, v in _all() if fnmatch(name_of(r, v), a) or fnmatch(r.name, a)]

    for a in asked:
        if not named(a):
            known = dict.fromkeys(row.name for row in ROWS)
            raise UserError(f"no row {a!r}; there are: {', '.join(known)}")
    wanted = {name_of(*pair) for a in asked or ("*",) for pair in named(a)}
    chosen = [(r, v) for r, v in _all() if name_of(r, v) in wanted and r.device in (None, device)]
    if not chosen:
        raise UserError(f"{', '.join(asked)}: nothing that is measured on {device}")
    return chosen


def measure(bench: Bench, row: Row, variant: Variant) -> Result:
    """Measure one row; what it lacks is said in the result."""
    common = {
        "row": name_of(row, variant),
        "limit": _number(row.limit),
        "goal": _number(row.goal_on(bench.device.type)),
        "unit": row.unit,
        "revision": revision(),
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


def revision() -> str:
    """Of the code that is measured, as results state it."""
    code = code_revision()
    return f"{(code['revision'] or '')[:12]}{'+' if code['dirty'] else ''}"


def _all() -> Iterator[tuple[Row, Variant]]:
    for row in ROWS:
        for variant in row.variants or (Variant(""),):
            yield row, variant


def name_of(row: Row, variant: Variant) -> str:
    """What a row, measured on a variant, is called."""
    return f"{row.name}/{variant.name}" if variant.name else row.name


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
