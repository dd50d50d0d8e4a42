"""Where the perturbation ranges ξ* of a set pile up: the peak that the poster's histogram shows.

The peak is the mode of a Gaussian kernel density estimate over the ranges that were not capped,
on the axis of ξ itself, with Silverman's bandwidth 0.9 · min(sd, IQR / 1.34) · n^(−1/5). Unlike
the tallest bar of a histogram it does not jump with the edges of the bins.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# Fewer ranges than this have no peak worth a number.
FEWEST = 10
_POINTS = 1024

Array = npt.NDArray[np.float64]


def uncapped(xi: Sequence[float], capped: Sequence[bool]) -> Array:
    """The ranges that have a finite minimiser."""
    finite: Array = np.asarray(xi, float)[~np.asarray(capped, bool)]
    return finite


def bandwidth(values: Any) -> float:
    """Silverman's bandwidth; 0 where the values do not spread."""
    values = np.asarray(values, float)
    low, high = np.quantile(values, [0.25, 0.75])
    sd = float(np.std(values, ddof=1))
    robust = float(high - low) / 1.34
    spread = min(sd, robust) if robust > 0 else sd
    return float(0.9 * spread * len(values) ** -0.2)


def density(values: Any, at: Any) -> Array:
    """The kernel density estimate of ``values`` at the points ``at``."""
    values, at = np.asarray(values, float), np.asarray(at, float)
    width = bandwidth(values)
    scaled = (at[:, None] - values[None, :]) / width
    kernels = np.exp(-0.5 * scaled**2) / (width * np.sqrt(2 * np.pi))
    return np.asarray(kernels.mean(axis=1))


def peak(values: Any) -> float | None:
    """The mode of the ranges; ``None`` below ``FEWEST`` of them."""
    values = np.asarray(values, float)
    if len(values) < FEWEST:
        return None
    if bandwidth(values) == 0:
        return float(np.median(values))
    grid = np.linspace(values.min(), values.max(), _POINTS)
    return float(grid[int(np.argmax(density(values, grid)))])
