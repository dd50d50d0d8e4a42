"""Means with intervals over seeds, paired comparisons of two arms, and what they decide.

One rule throughout: a statement about a value is decided where the 95% t-interval (two-sided,
ddof = 1) lies within, or wholly outside, the region that the statement allows. For a region with
two bounds that is two one-sided tests of 2.5% each; for a direction it is the usual two-sided
test. All functions of p-values work on whole arrays, NaN being a test that was not made.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

ALPHA = 0.05
POWER = 0.8
MOST_SEEDS = 1000

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Summary:
    """A mean over seeds.

    Attributes:
        n: Seeds.
        mean: NaN where there is none.
        ci95: Half-width of the 95% t-interval; NaN below two seeds.
        sd: Sample standard deviation (ddof = 1); NaN below two seeds.
    """

    n: int
    mean: float
    ci95: float
    sd: float

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.ci95

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.ci95


NOTHING = Summary(0, math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Region:
    """The values that a statement allows, between two bounds, either of which may be infinite."""

    low: float = -math.inf
    high: float = math.inf

    def holds(self, value: float) -> bool:
        """Whether a value is allowed."""
        return self.low < value < self.high


def summarise(values: Sequence[float]) -> Summary:
    """Mean, 95% t-interval and standard deviation of independent values."""
    n = len(values)
    if n == 0:
        return NOTHING
    mean = math.fsum(values) / n
    if n == 1:
        return Summary(1, mean, math.nan, math.nan)
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return Summary(n, mean, float(half_width(sd, n)), sd)


def half_width(sd: Any, n: int) -> Any:
    """Half-width of the 95% t-interval of a mean of ``n``; arrays are taken element by element."""
    return stats.t.ppf(1 - ALPHA / 2, n - 1) * sd / math.sqrt(n)


def paired_difference(treated: Mapping[int, float], base: Mapping[int, float]) -> Summary:
    """Difference treated − base per seed, over the seeds that both have."""
    return summarise([treated[seed] - base[seed] for seed in sorted(treated.keys() & base.keys())])


def p_within(mean: Any, sd: Any, n: int, region: Region) -> Array:
    """Evidence that a mean lies within a region: p ≤ 0.05 where its 95% interval does.

    NaN where there is no test: below two values, or where they do not differ at all (a spread
    of exactly 0 comes from rounding and says nothing about the next seed).
    """
    above, below = _tails(mean, sd, n, region)
    return np.asarray(np.minimum(1.0, 2 * np.maximum(above, below)))


def p_outside(mean: Any, sd: Any, n: int, region: Region) -> Array:
    """Evidence that a mean lies outside of a region: p ≤ 0.05 where all of its interval does."""
    above, below = _tails(mean, sd, n, region)
    return np.asarray(np.minimum(1.0, 2 * np.minimum(1 - above, 1 - below)))


def _tails(mean: Any, sd: Any, n: int, region: Region) -> tuple[Array, Array]:
    """One-sided p-values for "the mean is above ``low``" and "it is below ``high``"."""
    mean, sd = np.asarray(mean, float), np.asarray(sd, float)
    if n < 2:
        nothing = np.full(mean.shape, np.nan)
        return nothing, nothing
    error = np.where(sd > 0, sd, np.nan) / math.sqrt(n)
    return (
        np.asarray(stats.t.sf((mean - region.low) / error, n - 1)),
        np.asarray(stats.t.cdf((mean - region.high) / error, n - 1)),
    )


def holm(p: Any) -> Array:
    """Holm's adjusted p-values along the last axis; NaNs do not count as tests."""
    p = np.asarray(p, float)
    order = np.argsort(p, axis=-1)  # NaN last
    ranked = np.take_along_axis(p, order, axis=-1)
    tests = np.sum(~np.isnan(p), axis=-1, keepdims=True)
    stepped = ranked * (tests - np.arange(p.shape[-1]))
    adjusted = np.minimum(1.0, np.maximum.accumulate(stepped, axis=-1))
    result: Array = np.empty_like(p)
    np.put_along_axis(result, order, adjusted, axis=-1)
    return result


def power(difference: float, sd: float, n: int) -> float:
    """Chance that the 95% interval of ``n`` values excludes a bound at this distance."""
    if n < 2 or sd <= 0:
        return math.nan
    if math.isinf(difference):
        return 1.0
    critical = stats.t.ppf(1 - ALPHA / 2, n - 1)
    noncentrality = abs(difference) * math.sqrt(n) / sd
    chance = float(stats.nct.sf(critical, n - 1, noncentrality))
    return 1.0 if math.isnan(chance) else chance  # scipy gives up far in the tail


def detectable_difference(sd: float, n: int) -> float:
    """The smallest true distance that ``n`` values tell from 0 in 80% of cases; NaN if none."""
    if n < 2 or not sd > 0:
        return math.nan
    high = sd
    while power(high, sd, n) < POWER:
        high *= 2
    return float(optimize.brentq(lambda d: power(d, sd, n) - POWER, 0.0, high, xtol=1e-9 * sd))


def seeds_needed(mean: float, sd: float, region: Region) -> int | None:
    """Seeds that decide in 80% of cases, were ``mean`` and ``sd`` the true ones.

    Within a region with two bounds both have to be excluded: the chance is at least the sum of
    both chances less one.

    Returns:
        At least 2; ``None`` if more than ``MOST_SEEDS`` or nothing is known of the spread.
    """
    if not sd > 0 or math.isnan(mean):
        return None
    distances = (mean - region.low, region.high - mean)

    def enough(n: int) -> bool:
        if region.holds(mean):
            return power(distances[0], sd, n) + power(distances[1], sd, n) - 1 >= POWER
        return power(-min(distances), sd, n) >= POWER

    if not enough(MOST_SEEDS):
        return None
    low, high = 1, MOST_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
