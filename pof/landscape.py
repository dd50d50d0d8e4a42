"""The loss around a classifier: ranges of many batches, lines and planes, and the effective loss.

Everything here needs one pass of a set through the feature extractor (``FeatureCache``): in the
classifier's parameters the logits are affine, so any point of a line or plane costs one softmax.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pof.hessian import ClassifierHessian, FeatureCache
from pof.perturbation import (
    Direction,
    classifier_gradient,
    perturbation_range,
    target_distribution,
)
from pof.settings import PoFSettings


def direction_of(vector: Tensor, classifier: nn.Linear) -> Direction:
    """A vector of the classifier's parameters (weight row by row, then bias) as a direction."""
    classes, features = classifier.weight.shape
    split = classes * features
    return Direction(vector[:split].view(classes, features), vector[split:])


def vector_of(direction: Direction) -> Tensor:
    """The inverse of ``direction_of``: (C·d + C,)."""
    return torch.cat([direction.weight.reshape(-1), direction.bias])


def logits_of(cache: FeatureCache, direction: Direction) -> Tensor:
    """What a direction (or the classifier itself) gives on the cached features, (N, C) float64."""
    return torch.cat([direction.applied(features.double()) for features in cache.features])


class ClassifierLandscape:
    """The mean cross-entropy over a set, as a function of the classifier's parameters.

    Args:
        cache: Features of the set, in evaluation mode.
        classifier: θ₀.
    """

    @torch.no_grad()
    def __init__(self, cache: FeatureCache, classifier: nn.Linear) -> None:
        self.cache = cache
        self.classifier = classifier
        self.labels = torch.cat(cache.labels)
        self.theta = Direction(
            classifier.weight.detach().double(), classifier.bias.detach().double()
        )
        self.logits = logits_of(cache, self.theta)

    def loss(self) -> float:
        """L(θ₀)."""
        return float(F.cross_entropy(self.logits, self.labels))

    @torch.no_grad()
    def gradient(self) -> Direction:
        """∂L/∂θ at θ₀ over the whole set."""
        target = target_distribution(self.labels, self.classifier.out_features)
        residual = (self.logits.softmax(-1) - target) / len(self.labels)
        parts = [len(chunk) for chunk in self.cache.features]
        weight = sum(
            (
                rows.mT @ chunk.double()
                for rows, chunk in zip(residual.split(parts), self.cache.features, strict=True)
            ),
            start=torch.zeros_like(self.theta.weight),
        )
        return Direction(weight, residual.sum(0))

    @torch.no_grad()
    def along(self, direction: Direction, distances: Tensor) -> Tensor:
        """L(θ₀ + t·direction) for each distance t, shape of ``distances`` (P,)."""
        slopes = logits_of(self.cache, direction)
        losses = [F.cross_entropy(self.logits + t * slopes, self.labels) for t in distances]
        return torch.stack(losses)

    @torch.no_grad()
    def plane(self, first: Direction, second: Direction, distances: Tensor) -> Tensor:
        """L(θ₀ + s·first + t·second), shape (P, P): rows are t, columns s."""
        across = logits_of(self.cache, first)
        up = logits_of(self.cache, second)
        rows = []
        for t in distances:
            base = self.logits + t * up
            row = [F.cross_entropy(base + s * across, self.labels) for s in distances]
            rows.append(torch.stack(row))
        return torch.stack(rows)


@dataclass(frozen=True)
class BatchRanges:
    """Rays of many mini-batches from one classifier.

    Attributes:
        xi: ξ*, (M,).
        capped: Whether each reached the cap, (M,).
        gradient_norm: ‖g_B‖, (M,).
        directions: ĝ_B as columns (C·d̃, M).
    """

    xi: Tensor
    capped: Tensor
    gradient_norm: Tensor
    directions: Tensor


@torch.no_grad()
def batch_ranges(
    landscape: ClassifierLandscape,
    settings: PoFSettings,
    *,
    batch_size: int,
    batches: int,
    seed: int,
) -> BatchRanges:
    """ξ* of mini-batches drawn from the set (poster, steps 1 and 2), features in evaluation mode.

    Args:
        landscape: The set and the classifier.
        settings: Cap, its unit and the search; the direction is each batch's own gradient.
        batch_size: Images a batch.
        batches: How many; the set is gone through in a random order, several times if need be.
        seed: Of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(landscape.labels)
    size = min(batch_size, count)
    per_pass = count // size
    orders = [
        torch.randperm(count, generator=generator)[: per_pass * size].view(per_pass, size)
        for _ in range(-(-batches // per_pass))
    ]
    features = torch.cat(landscape.cache.features)
    xi, capped, norms, directions = [], [], [], []
    for chosen in torch.cat(orders)[:batches].to(features.device):
        batch, logits = features[chosen].double(), landscape.logits[chosen]
        target = target_distribution(landscape.labels[chosen], logits.shape[1])
        gradient = classifier_gradient(batch, logits, target)
        norm = gradient.norm()
        unit = gradient.unit(norm)
        found = perturbation_range(
            logits,
            unit.applied(batch),
            target,
            cap=settings.cap * norm if settings.cap_unit == "gradient" else settings.cap,
            unit=norm,
            search=settings.search,
        )
        xi.append(found.xi)
        capped.append(found.capped)
        norms.append(norm)
        directions.append(vector_of(unit))
    return BatchRanges(
        torch.stack(xi), torch.stack(capped), torch.stack(norms), torch.stack(directions, dim=1)
    )


@dataclass(frozen=True)
class EffectiveLoss:
    """The effective loss of the theory slide, measured and predicted, averaged over batches.

    Attributes:
        loss: L(φ, θ₀).
        measured: E_B[L(φ, θ₀ − γξ*ĝ)].
        predicted: E_B of L − γξ* gᵀĝ + ½ γ²ξ*² ĝᵀHĝ, with the set's own g and H.
        curvature: E_B[ĝᵀHĝ].
    """

    loss: float
    measured: float
    predicted: float
    curvature: float


@torch.no_grad()
def effective_loss(
    landscape: ClassifierLandscape,
    hessian: ClassifierHessian,
    ranges: BatchRanges,
    gamma: float,
) -> EffectiveLoss:
    """Hold the second-order effective loss against the loss itself (poster, theory).

    Args:
        landscape: The set and the classifier.
        hessian: Of the same set, without weight decay.
        ranges: Rays of batches; capped ones are left out.
        gamma: Expansion factor γ.
    """
    kept = ~ranges.capped
    steps = gamma * ranges.xi[kept]
    directions = ranges.directions[:, kept]
    loss = landscape.loss()
    gradient = vector_of(landscape.gradient())
    curvature = (directions * (hessian @ directions)).sum(0)
    predicted = loss - steps * (gradient @ directions) + 0.5 * steps.square() * curvature
    measured = [
        landscape.along(direction_of(column, landscape.classifier), -step[None])[0]
        for column, step in zip(directions.mT, steps, strict=True)
    ]
    if not measured:
        nan = float("nan")
        return EffectiveLoss(loss, nan, nan, nan)
    return EffectiveLoss(
        loss,
        float(torch.stack(measured).mean()),
        float(predicted.mean()),
        float(curvature.mean()),
    )
