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

_OCTAVES = 48  # the search looks between cap · 2⁻⁴⁸ and the cap; what lies below counts as 0
_SECTIONS = 5  # parts into which each pass divides the bracket, in log ξ
_PASSES = 4  # they leave a bracket of 48/5⁴ octaves, 5% of ξ
_NEWTON_STEPS = 3  # from there: 1e-10 relative on networks' logits
_FEW_CLASSES = 32  # fewer: a softmax is faster across the images than along each
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
    # F.one_hot would look at the labels from the host.
    one_hot = (labels[..., None] == torch.arange(num_classes, device=labels.device)).double()
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
        fall along the ray, ξ* is 0. An ``exact`` ξ* is within 1e-8 of the minimiser, relative
        to it; with logits in the thousands, whose losses are all kinks, within 6%.
    """
    margins, rates = _relative_to_target(logits, slopes, target)
    cap = cap.to(margins) if isinstance(cap, Tensor) else margins.new_full((), cap)
    if search == "grid16":
        return _grid_search(margins, rates, cap, unit)
    return _exact_search(margins, rates, cap)


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


def _fall(margins: Tensor, rates: Tensor, xi: Tensor, classes: int) -> Tensor:
    """−N L′(ξ), the rates expected under the softmax, at the trial ranges (K,)."""
    p = torch.addcmul(margins, xi.view(-1, 1, 1), rates, value=-1.0).softmax(1 + classes)
    return torch.mv(p.view(len(xi), -1), rates.view(-1))


def _newton_step(
    margins: Tensor, rates: Tensor, xi: Tensor, classes: int, signs: tuple[Tensor, Tensor]
) -> Tensor:
    """Newton's step from ``xi`` to the root of L′.

    −L′ = A − B, where A sums the classes that fall behind the target and B those that gain on it.
    The step is that for log A − log B: both are nearly exponentials of ξ, and so it is nearly
    straight where L′ itself may turn sharply.
    """
    weighted = torch.addcmul(margins, xi, rates, value=-1.0).softmax(classes).mul_(rates)
    parts = torch.clamp(weighted, *signs)  # of A and −B
    total_a, total_b = (totals := parts.sum((1, 2))).unbind()
    excess = weighted.sum(classes, keepdim=True).sub(rates)
    a, b = parts.mul_(excess).sum((1, 2)).div_(totals).unbind()  # log A and log B, differentiated
    return (total_a / total_b).neg_().log_().div_(b - a)


def _exact_search(margins: Tensor, rates: Tensor, cap: Tensor) -> Range:
    """Bracket the root of L′ by sections in log ξ, then polish it with Newton's method.

    The trials are of a fixed number, so nothing waits for the host. Where the ray is so sharply
    bent that Newton's method falls short, the bracket is what is left.
    """
    classes = 1
    if margins.shape[1] < _FEW_CLASSES:
        margins, rates, classes = margins.mT, rates.mT, 0
    margins, rates = margins.contiguous(), rates.contiguous()
    sections = torch.arange(_SECTIONS, dtype=cap.dtype, device=cap.device)
    low, width = cap.log2() - _OCTAVES, _OCTAVES / _SECTIONS
    trials = torch.add(low, sections, alpha=width).exp2_()
    falls = _fall(margins, rates, torch.cat([trials, cap.view(1)]), classes) > 0
    downhill, capped = falls[0], falls[_SECTIONS]
    # Where the true class gains on every other one, the loss falls forever, also where the
    # probabilities that its slope is made of are too small for a floating-point number.
    least, most = rates.aminmax()
    capped = capped | ((least >= 0) & (most > 0))
    low = torch.add(low, falls[1:_SECTIONS].sum(), alpha=width)
    inner = sections[1:]
    for _ in range(_PASSES - 1):
        width /= _SECTIONS
        trials = torch.add(low, inner, alpha=width).exp2_()
        low = torch.add(low, (_fall(margins, rates, trials, classes) > 0).sum(), alpha=width)
    low, high = low.exp2(), (low + width).exp2_()
    xi = 0.5 * (low + high)
    signs = _bounds(margins)
    for _ in range(_NEWTON_STEPS):
        step = _newton_step(margins, rates, xi, classes, signs)
        xi = step.nan_to_num_().add_(xi).clamp_(low, high)
    return Range(torch.where(capped, cap, torch.where(downhill, xi, 0.0)), capped)


def _bounds(like: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds (2, 1, 1): a tensor clamped to them is its parts above and below 0."""
    none, zero = like.new_full((1, 1, 1), torch.inf), like.new_zeros(1, 1, 1)
    return torch.cat([zero, -none]), torch.cat([none, zero])


def _grid_search(margins: Tensor, rates: Tensor, cap: Tensor, unit: Tensor | float) -> Range:
    """Double from ``unit`` until the loss rises, then the best of 16 points up to there."""
    octaves = torch.arange(_OCTAVES, dtype=margins.dtype, device=margins.device)
    doubled = (octaves.exp2() * unit).clamp_max(cap)
    trials = torch.cat([torch.zeros_like(cap)[None], doubled])
    losses = _loss(margins, rates, trials)
    rises = (losses[1:] > losses[:-1]) & (trials[:-1] < cap)
    capped = ~rises.any()
    first = rises.to(torch.int64).argmax(0, keepdim=True)
    upper = torch.where(capped, cap, doubled.index_select(0, first).squeeze(0))
    grid = upper * torch.arange(1, _GRID + 1, dtype=margins.dtype, device=margins.device) / _GRID
    best = _loss(margins, rates, grid).argmin(0, keepdim=True)
    return Range(torch.where(capped, cap, grid.index_select(0, best).squeeze(0)), capped)
