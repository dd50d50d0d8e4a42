"""The ray θ₀ − ξ ĝ in the classifier's parameters, and the range ξ* of its perturbation.

Along the ray the logits are affine in ξ: Z(ξ) = Z₀ − ξ D with Z₀ the logits at θ₀ and D the
direction applied to the features. A trial ξ therefore costs O(N·C), whatever the backbone, and
any number of trials is one tensor. The cross-entropy is convex in ξ: its derivatives are a mean
and a variance under the softmax, and the range is a one-dimensional convex problem. All of it is
computed in float64 (a trained network's gradient is a small difference of large numbers), and
on an accelerator without a copy to the host. What is (N, C) is best stored with the images next
to each other, as it is made here: with few classes a softmax is faster across images than along
each.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

_OCTAVES = 48  # the search looks between cap · 2⁻⁴⁸ and the cap; what lies below counts as 0
_SECTIONS = 5  # parts into which each pass divides the bracket, in log ξ
_PASSES = 4  # they leave a bracket of 48/5⁴ octaves, 5% of ξ
_NEWTON_STEPS = 3  # from there: 1e-10 relative on networks' logits
_EQUAL = 1e-12  # error, relative to ξ, at which the search on the host ends
_FREE_TRIALS = 12  # of them all may be steps; from there on every other one halves the bracket
_MOST_TRIALS = 120  # by then the bracket is nothing
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
        parts = torch.linalg.vector_norm(self.weight), torch.linalg.vector_norm(self.bias)
        return torch.hypot(*parts)

    def dot(self, other: "Direction") -> Tensor:
        """Inner product over weight and bias together."""
        return (self.weight * other.weight).sum() + (self.bias * other.bias).sum()

    def scaled(self, factor: Tensor | float) -> "Direction":
        """The direction times ``factor``."""
        return Direction(self.weight * factor, self.bias * factor)

    def plus(self, other: "Direction") -> "Direction":
        """The sum of two directions."""
        return Direction(self.weight + other.weight, self.bias + other.bias)

    def unit(self, norm: Tensor | None = None) -> "Direction":
        """The direction at norm 1 (zero stays zero); ``norm`` is its own, where it is known."""
        norm = self.norm() if norm is None else norm
        length = norm.clamp_min(torch.finfo(self.weight.dtype).tiny)
        return Direction(self.weight / length, self.bias / length)

    def applied(self, features: Tensor) -> Tensor:
        """What the direction does to the logits of ``features`` (N, d): D, shape (N, C)."""
        return torch.addmm(self.bias[:, None], self.weight, features.mT).mT


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
    shape = (*labels.shape[:-1], num_classes, labels.shape[-1])
    one_hot = torch.zeros(shape, dtype=torch.float64, device=labels.device)
    one_hot = one_hot.scatter_(-2, labels.long().unsqueeze(-2), 1.0).mT
    if label_smoothing == 0.0:
        return one_hot
    return one_hot * (1.0 - label_smoothing) + label_smoothing / num_classes


def classifier_gradient(features: Tensor, logits: Tensor, target: Tensor) -> Direction:
    """Gradient of the mean cross-entropy with respect to the classifier (poster, step 1).

    Args:
        features: (N, d) in float64.
        logits: (N, C) in float64.
        target: (N, C), rows summing to 1.
    """
    residual = (logits.mT.softmax(0) - target.mT) * (1.0 / len(features))
    return Direction(residual @ features, residual.sum(1))


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
        to it; with logits in the thousands, whose losses are all kinks, an accelerator's is
        within 6%.
    """
    if search == "grid16":
        margins, rates = _relative_to_target(logits, slopes, target)
        return _grid_search(margins, rates, _scalar(cap, like=margins), unit)
    classes = 1
    if logits.shape[1] < _FEW_CLASSES:
        logits, slopes, target, classes = logits.mT, slopes.mT, target.mT, 0
    margins, rates = _relative_to_target(logits, slopes, target, classes)
    if margins.device.type == "cpu":
        return _search_on_host(margins, rates, cap, classes)
    return _search_on_device(margins, rates, cap, classes)


def _scalar(value: Tensor | float, *, like: Tensor) -> Tensor:
    return value.to(like) if isinstance(value, Tensor) else like.new_full((), value)


def _relative_to_target(
    logits: Tensor, slopes: Tensor, target: Tensor, classes: int = 1
) -> tuple[Tensor, Tensor]:
    """Logits and slopes less their mean under the target: the loss is then a plain logsumexp.

    Written so, no large numbers cancel: L = mean log Σ exp(margins − ξ rates). ``classes`` is the
    dimension of the classes. Both come back contiguous.
    """
    both = torch.stack([logits, slopes]).double()
    margins, rates = (both - (both * target).sum(1 + classes, keepdim=True)).unbind()
    return margins, rates


def _loss(margins: Tensor, rates: Tensor, xi: Tensor) -> Tensor:
    """L(ξ), for trial ranges of any shape."""
    return (margins - xi[..., None, None] * rates).logsumexp(-1).mean(-1)


def _sides(rates: Tensor) -> Tensor:
    """The rates of the classes that fall behind the target, and of those that gain: (2, C · N)."""
    return torch.stack([rates.clamp_min(0.0), rates.clamp_max(0.0)]).flatten(1)


def _falls_forever(rates: Tensor) -> Tensor:
    """Whether the true class gains on every other one.

    The loss then falls at any ξ, also where the probabilities that its slope is made of are too
    small for a floating-point number.
    """
    least, most = rates.aminmax()
    return (least >= 0) & (most > 0)


def _sums(p: Tensor, sides: Tensor) -> Tensor:
    """A and −B, (2,), with −N L′ = A − B at the probabilities ``p``.

    A sums the classes that fall behind the target, B those that gain on it: both are nearly
    exponentials of ξ, and so log A − log B, of the same root, is nearly straight where L′ itself
    may turn sharply.
    """
    return torch.mv(sides, p.view(-1))


def _log_derivatives(p: Tensor, rates: Tensor, sides: Tensor, sums: Tensor, classes: int) -> Tensor:
    """Derivatives of log A and log B with respect to ξ, (2,)."""
    change = (p * rates).sum(classes, keepdim=True).sub(rates).mul_(p)  # dp/dξ
    return torch.mv(sides, change.view(-1)).div_(sums)


def _search_on_host(margins: Tensor, rates: Tensor, cap: Tensor | float, classes: int) -> Range:
    """The secant method for log A − log B, from Newton's step at ξ ≈ 0.

    Each trial stays in the bracket that the signs of L′ have shown so far. Where a step would
    leave it, as it may among kinks, the bracket is halved in log ξ, or closed by trying the cap.
    """

    def found(xi: float, *, capped: bool = False) -> Range:
        return Range(rates.new_full((), xi), torch.full((), capped))

    top = float(cap.item() if isinstance(cap, Tensor) else cap)
    sides = _sides(rates)
    xi = low = top * 2.0**-_OCTAVES
    high = math.inf
    last_xi = last_height = move = math.nan
    for trial in range(_MOST_TRIALS):
        p = torch.sub(margins, rates, alpha=xi).softmax(classes)
        sums = _sums(p, sides)
        a, b = sums.tolist()
        if trial == 0 and b == 0.0 and _falls_forever(rates):
            return found(top, capped=True)
        if a + b > 0.0:
            if xi >= top:
                return found(top, capped=True)
            low = xi
        elif trial == 0:
            return found(0.0)
        else:
            high = xi
        height = math.log(a) - math.log(-b) if a > 0.0 > b else math.nan
        if trial == 0:
            log_a, log_b = _log_derivatives(p, rates, sides, sums, classes).tolist()
            slope = log_a - log_b
        else:
            slope = (height - last_height) / (xi - last_xi)
        following = min(xi - height / slope, top) if slope < 0.0 else math.nan
        straight = low < following < high and (trial < _FREE_TRIALS or trial % 2 == 0)
        if not straight:
            following = math.sqrt(low) * math.sqrt(high) if high < math.inf else top
        last_xi, last_height, last_move, move = xi, height, move, following - xi
        xi = following
        # A secant's error goes with the product of the last two.
        error = abs(move * last_move) / xi if straight else abs(move)
        if error <= _EQUAL * xi and not xi == top < high:  # a cap that was not tried shows nothing
            break
    return found(min(xi, top))


def _search_on_device(margins: Tensor, rates: Tensor, cap: Tensor | float, classes: int) -> Range:
    """Bracket the root of L′ by sections in log ξ, then polish it with Newton's method.

    The trials are of a fixed number, so nothing waits for the host. Where the ray is so sharply
    bent that Newton's method falls short, the bracket is what is left.
    """
    cap = _scalar(cap, like=margins)
    sections = torch.arange(_SECTIONS, dtype=cap.dtype, device=cap.device)
    low, width = cap.log2() - _OCTAVES, _OCTAVES / _SECTIONS
    trials = torch.add(low, sections, alpha=width).exp2_()
    falls = _fall(margins, rates, torch.cat([trials, cap.view(1)]), classes) > 0
    downhill, capped = falls[0], falls[_SECTIONS]
    capped = capped | _falls_forever(rates)
    low = torch.add(low, falls[1:_SECTIONS].sum(), alpha=width)
    inner = sections[1:]
    for _ in range(_PASSES - 1):
        width /= _SECTIONS
        trials = torch.add(low, inner, alpha=width).exp2_()
        low = torch.add(low, (_fall(margins, rates, trials, classes) > 0).sum(), alpha=width)
    low, high = low.exp2(), (low + width).exp2_()
    xi = 0.5 * (low + high)
    sides = _sides(rates)
    for _ in range(_NEWTON_STEPS):
        p = torch.addcmul(margins, xi, rates, value=-1.0).softmax(classes)
        a, b = (sums := _sums(p, sides)).unbind()
        log_a, log_b = _log_derivatives(p, rates, sides, sums, classes).unbind()
        step = (a / b).neg_().log_().div_(log_b - log_a)
        xi = step.nan_to_num_().add_(xi).clamp_(low, high)
    return Range(torch.where(capped, cap, torch.where(downhill, xi, 0.0)), capped)


def _fall(margins: Tensor, rates: Tensor, xi: Tensor, classes: int) -> Tensor:
    """−N L′(ξ), the rates expected under the softmax, at the trial ranges (K,)."""
    p = torch.addcmul(margins, xi.view(-1, 1, 1), rates, value=-1.0).softmax(1 + classes)
    return torch.mv(p.view(len(xi), -1), rates.view(-1))


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
