"""The ray θ₀ − ξ ĝ in the classifier's parameters, and the range ξ* of its perturbation.

Along the ray the logits are affine in ξ: Z(ξ) = Z₀ − ξ D with Z₀ the logits at θ₀ and D the
direction applied to the features. A trial ξ therefore costs O(N·C), whatever the backbone, and
any number of trials is one tensor. The cross-entropy is convex in ξ: its derivatives are a mean
and a variance under the softmax, and the range is a one-dimensional convex problem. All of it is
computed in float64 (a trained network's gradient is a small difference of large numbers) and
without a copy to the host.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_OCTAVES = 48  # trial ranges cap · 2⁻ᵏ that bracket the minimiser within a factor of two
_ITERATIONS = 24  # safeguarded Newton from a bracket of a factor of two: at least 1e-7 relative
_GRID = 16  # points of the published grid search


class Direction(NamedTuple):
    """A direction in the classifier's parameters, weight and bias together, in float64.

    Attributes:
        weight: (C, d).
        bias: (C,).
    """

    weight: Tensor
    bias: Tensor

    def norm(self) -> Tensor:
        """Euclidean norm over weight and bias together."""
        return torch.sqrt(self.weight.square().sum() + self.bias.square().sum())

    def dot(self, other: "Direction") -> Tensor:
        """Inner product over weight and bias together."""
        return (self.weight * other.weight).sum() + (self.bias * other.bias).sum()

    def scaled(self, factor: Tensor | float) -> "Direction":
        """The direction times ``factor``."""
        return Direction(self.weight * factor, self.bias * factor)

    def plus(self, other: "Direction") -> "Direction":
        """The sum of two directions."""
        return Direction(self.weight + other.weight, self.bias + other.bias)

    def unit(self) -> "Direction":
        """The direction at norm 1 (zero stays zero)."""
        return self.scaled(1.0 / self.norm().clamp_min(torch.finfo(self.weight.dtype).tiny))

    def applied(self, features: Tensor) -> Tensor:
        """What the direction does to the logits of ``features`` (N, d): D, shape (N, C)."""
        return F.linear(features, self.weight, self.bias)


class Range(NamedTuple):
    """Perturbation ranges of one or more rays.

    Attributes:
        xi: ξ* ≥ 0 where the loss along the ray is least, as a distance in parameter space.
        capped: Whether the loss still fell at the cap, so that ``xi`` is the cap and no minimiser.
    """

    xi: Tensor
    capped: Tensor


def target_distribution(labels: Tensor, num_classes: int, label_smoothing: float = 0.0) -> Tensor:
    """Target probabilities (..., N, C) in float64 of integer ``labels`` (..., N)."""
    one_hot = F.one_hot(labels, num_classes).to(torch.float64)
    return one_hot * (1.0 - label_smoothing) + label_smoothing / num_classes


def classifier_gradient(features: Tensor, logits: Tensor, target: Tensor) -> Direction:
    """Gradient of the mean cross-entropy with respect to the classifier (poster, step 1).

    Args:
        features: (N, d) in float64.
        logits: (N, C) in float64.
        target: (N, C), rows summing to 1.
    """
    residual = (logits.softmax(-1) - target) / len(features)
    return Direction(residual.mT @ features, residual.sum(0))


def loss_along_ray(logits: Tensor, slopes: Tensor, target: Tensor, xi: Tensor) -> Tensor:
    """Mean cross-entropy L(ξ) at each trial range.

    Args:
        logits: Z₀, (N, C).
        slopes: D, (N, C).
        target: (N, C).
        xi: Trial ranges, any shape (...).

    Returns:
        Losses, shape (...).
    """
    return _loss(*_relative_to_target(logits, slopes, target), xi)


def perturbation_range(
    logits: Tensor,
    slopes: Tensor,
    target: Tensor,
    *,
    cap: Tensor | float,
    unit: Tensor | float = 1.0,
    search: Literal["exact", "grid16"] = "exact",
) -> Range:
    """ξ* = argmin over 0 ≤ ξ ≤ cap of the mean cross-entropy along a ray (poster, step 2).

    Args:
        logits: Z₀, (N, C).
        slopes: D, (N, C): logits fall by ξ D.
        target: Target probabilities (N, C).
        cap: Largest range searched, a distance.
        unit: Where the doubling of ``grid16`` starts, a distance: one un-normalised gradient.
        search: ``exact`` minimiser, or the published ``grid16``.

    Returns:
        ξ* and whether the cap was reached, as scalars on the device. Where the loss does not
        fall along the ray, ξ* is 0.
    """
    margins, rates = _relative_to_target(logits, slopes, target)
    cap = torch.as_tensor(cap, dtype=margins.dtype, device=margins.device)
    if search == "grid16":
        return _grid_search(margins, rates, cap, unit)
    return _newton_search(margins, rates, cap)


def _relative_to_target(logits: Tensor, slopes: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and slopes less their mean under the target: the loss is then a plain logsumexp.

    Written so, no large numbers cancel: L = mean log Σ exp(margins − ξ rates).
    """
    margins = logits.double() - (target * logits.double()).sum(-1, keepdim=True)
    rates = slopes.double() - (target * slopes.double()).sum(-1, keepdim=True)
    return margins, rates


def _loss(margins: Tensor, rates: Tensor, xi: Tensor) -> Tensor:
    """L(ξ), for trial ranges of any shape."""
    return (margins - xi[..., None, None] * rates).logsumexp(-1).mean(-1)


def _slope(margins: Tensor, rates: Tensor, xi: Tensor) -> Tensor:
    """L′(ξ) = −E[rates under the softmax], for trial ranges of any shape."""
    p = (margins - xi[..., None, None] * rates).softmax(-1)
    return -(p * rates).sum(-1).mean(-1)


def _slope_and_curvature(margins: Tensor, rates: Tensor, xi: Tensor) -> tuple[Tensor, Tensor]:
    """L′(ξ) and L″(ξ), the variance of the rates under the softmax, at one range."""
    p = (margins - xi * rates).softmax(-1)
    weighted = p * rates
    mean = weighted.sum(-1, keepdim=True)
    curvature = (weighted * (rates - mean)).sum(-1).mean(-1)
    return -mean.mean(), curvature


def _newton_search(margins: Tensor, rates: Tensor, cap: Tensor) -> Range:
    """Bracket the root of L′ within a factor of two, then Newton that never leaves the bracket."""
    octaves = torch.arange(_OCTAVES, dtype=margins.dtype, device=margins.device)
    trials = torch.cat([cap * torch.exp2(-octaves), torch.zeros_like(cap)[None]])
    falling = _slope(margins, rates, trials) < 0  # from the cap downwards to 0
    capped = falling[0]
    # The largest trial at which the loss still falls; none falls where the ray leads uphill.
    low = torch.where(falling, trials, 0.0).amax()
    high = torch.where(falling, cap, trials).amin()
    downhill = falling.any()
    xi = 0.5 * (low + high)
    step = previous = high - low
    for _ in range(_ITERATIONS):
        slope, curvature = _slope_and_curvature(margins, rates, xi)
        low = torch.where(slope < 0, xi, low)
        high = torch.where(slope < 0, high, xi)
        newton = xi - slope / curvature
        # Bisect where Newton leaves the bracket or does not at least halve the last step but one.
        usable = (newton >= low) & (newton <= high) & ((newton - xi).abs() <= 0.5 * previous)
        target = torch.where(usable, newton, 0.5 * (low + high))
        previous, step = step, (target - xi).abs()
        xi = target
    return Range(torch.where(capped, cap, torch.where(downhill, xi, 0.0)), capped)


def _grid_search(margins: Tensor, rates: Tensor, cap: Tensor, unit: Tensor | float) -> Range:
    """Double from ``unit`` until the loss rises, then the best of 16 points up to there."""
    octaves = torch.arange(_OCTAVES, dtype=margins.dtype, device=margins.device)
    trials = (torch.exp2(octaves) * unit).clamp_max(cap)
    losses = _loss(margins, rates, torch.cat([torch.zeros_like(cap)[None], trials]))
    rises = (losses[1:] >= losses[:-1]) & (trials < cap)
    capped = ~rises.any()
    upper = torch.where(capped, cap, trials[rises.to(torch.int64).argmax()])
    grid = upper * torch.arange(1, _GRID + 1, dtype=margins.dtype, device=margins.device) / _GRID
    return Range(grid[_loss(margins, rates, grid).argmin()], capped)
