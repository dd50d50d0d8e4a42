"""Means with intervals over seeds, and paired differences of two arms."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats


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


def summarise(values: Sequence[float]) -> Summary:
    """Mean, 95% t-interval and standard deviation of independent values."""
    n = len(values)
    if n == 0:
        return Summary(0, math.nan, math.nan, math.nan)
    mean = math.fsum(values) / n
    if n == 1:
        return Summary(1, mean, math.nan, math.nan)
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return Summary(n, mean, float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n), sd)


def paired_difference(treated: Mapping[int, float], base: Mapping[int, float]) -> Summary:
    """Difference treated − base per seed, over the seeds that both have."""
    return summarise([treated[seed] - base[seed] for seed in sorted(treated.keys() & base.keys())])
