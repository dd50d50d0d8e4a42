"""Times things side by side: A B A B …, so that what disturbs the machine disturbs both."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

REPETITIONS = 7
_REPETITION_SECONDS = 0.05  # what is shorter is called several times a repetition

Call = Callable[[], object]


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        repetitions: Fewest repetitions of each side.
        seconds: Repetitions go on until all sides together have taken this long.
        warm_up: Calls of each side before anything is timed.
    """

    repetitions: int = REPETITIONS
    seconds: float = 8.0
    warm_up: int = 1


def alternate(
    sides: Mapping[str, Call],
    effort: Effort,
    *,
    before: Mapping[str, Call] | None = None,
    synchronise: Call = _nothing,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time each side in turn, again and again.

    Args:
        sides: What is timed, by name, in order.
        effort: How long.
        before: What is done before each repetition of a side, untimed.
        synchronise: Waits for the device, before and after each repetition.
        clock: Seconds.

    Returns:
        Seconds a call of each side, one entry a repetition.
    """
    before = before or {}

    def timed(name: str, calls: int) -> float:
        before.get(name, _nothing)()
        synchronise()
        began = clock()
        for _ in range(calls):
            sides[name]()
        synchronise()
        return (clock() - began) / calls

    warm = {name: min(timed(name, 1) for _ in range(effort.warm_up)) for name in sides}
    calls = {
        name: max(1, math.ceil(_REPETITION_SECONDS / max(t, 1e-9))) for name, t in warm.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    began = clock()
    done = 0
    while done < effort.repetitions or clock() - began < effort.seconds:
        for name in sides:
            seconds[name].append(timed(name, calls[name]))
        done += 1
    return seconds


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Quotients of the repetitions that were timed next to each other."""
    return [a / b for a, b in zip(over, under, strict=True)]


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The median, and the distance between the quartiles (0 of a single value)."""
    if len(values) < 2:
        return float(values[0]), 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, high - low
