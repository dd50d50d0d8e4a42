"""One step of PoF: post-training of the feature extractor (Sato et al., ICML 2022).

With the classifier θ₀ fixed: (1) on batch B, ĝ = ∂L_B/∂θ at θ₀, normalised; (2) the range
ξ* = argmin over ξ ≥ 0 of L_B(φ, θ₀ − ξ ĝ); (3) on another batch B̃, the gradient with respect to
φ of L_B̃(φ, θ₀ − γ ξ* ĝ), here left in φ's ``.grad`` for any optimizer to follow.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pof import batchnorm
from pof.data.batches import Batches
from pof.objective import Linear, Objective, Outcome
from pof.perturbation import (
    Direction,
    classifier_gradient,
    perturbation_range,
    target_distribution,
)
from pof.settings import PoFSettings


class StepRecord(NamedTuple):
    """What one step measured, as float64 scalars on the device.

    Attributes:
        xi: ξ*, a distance in the classifier's parameters (the cap where it was reached).
        capped: 1 where the loss still fell at the cap.
        expansion: γ ξ* as used: 0 for a rejected batch.
        cosine: cos(g_B, running mean of g before this step); 0 at the first step.
        gradient_norm: ‖g_B‖ over weight and bias together.
        feature_norm: Mean ‖f‖ over B.
    """

    xi: Tensor
    capped: Tensor
    expansion: Tensor
    cosine: Tensor
    gradient_norm: Tensor
    feature_norm: Tensor


class PoFGradient:
    """Leaves PoF's gradient of φ in ``.grad``; never touches the classifier.

    Args:
        objective: What is minimised.
        settings: PoF's named details.
        range_batches: The stream of batches B.
        generator: Draws γ where it is random; on the host.
    """

    def __init__(
        self,
        objective: Objective,
        settings: PoFSettings,
        range_batches: Batches,
        generator: torch.Generator,
    ) -> None:
        self.objective = objective
        self.settings = settings
        self.range_batches = range_batches
        self.generator = generator
        self.records: list[StepRecord] = []
        classifier = objective.network.classifier
        self._batch_norms = batchnorm.layers(objective.network.feature_extractor)
        self._parameters = [
            p for p in objective.network.feature_extractor.parameters() if p.requires_grad
        ]
        self._mean = Direction(  # of g_B, decaying; biased towards 0 until steps ≫ 1/(1 − decay)
            torch.zeros_like(classifier.weight, dtype=torch.float64, requires_grad=False),
            torch.zeros_like(classifier.bias, dtype=torch.float64, requires_grad=False),
        )
        self._steps = 0

    def __call__(self, images: Tensor, labels: Tensor) -> Outcome:
        """Set φ's ``.grad`` to the gradient on B̃ at the perturbed classifier.

        Args:
            images: Batch B̃, (N, C, H, W).
            labels: (N,).

        Returns:
            Loss and error on B at the unperturbed (φ, θ₀): the quantities that other methods
            report, where those on B̃ are of a perturbed network.
        """
        outcome, direction, expansion = self._perturbation()
        classifier = self.objective.network.classifier
        weight = classifier.weight.detach()
        bias = classifier.bias.detach()
        step = direction.scaled(expansion)
        for p in self._parameters:
            p.grad = None
        perturbed = Linear(weight - step.weight.to(weight.dtype), bias - step.bias.to(bias.dtype))
        self.objective.gradient(images, labels, classifier=perturbed)
        return outcome

    @torch.no_grad()
    def _perturbation(self) -> tuple[Outcome, Direction, Tensor]:
        """Outcome on B, the unit direction ĝ, and the distance γ ξ* to go against it."""
        settings = self.settings
        images, labels = self.range_batches.draw()
        classifier = self.objective.network.classifier
        features = self._range_features(images).double()
        logits = torch.nn.functional.linear(
            features, classifier.weight.double(), classifier.bias.double()
        )
        target = target_distribution(
            labels, classifier.out_features, self.objective.label_smoothing
        )
        gradient = classifier_gradient(features, logits, target)
        gradient_norm = gradient.norm()
        mean = self._running_mean()
        unit_length, direction = gradient_norm, gradient.unit(gradient_norm)
        cosine = direction.dot(mean.unit())
        if settings.direction == "centred":
            raw = gradient.plus(mean.scaled(-1.0))
            unit_length = raw.norm()
            direction = raw.unit(unit_length)
        found = perturbation_range(
            logits,
            direction.applied(features),
            target,
            cap=settings.cap * unit_length if settings.cap_unit == "gradient" else settings.cap,
            unit=unit_length,
            search=settings.search,
        )
        expansion = found.xi * self._gamma()
        if settings.capped == "reject":
            expansion = torch.where(found.capped, 0.0, expansion)
        self._update_mean(gradient)
        self.records.append(
            StepRecord(
                xi=found.xi,
                capped=found.capped.double(),
                expansion=expansion,
                cosine=cosine,
                gradient_norm=gradient_norm,
                feature_norm=features.norm(dim=1).mean(),
            )
        )
        loss = -(target * logits.log_softmax(-1)).sum(-1).mean()
        return Outcome(loss, (logits.argmax(1) != labels).double().mean()), direction, expansion

    def _range_features(self, images: Tensor) -> Tensor:
        """Features of B, with BatchNorm as the settings say."""
        extractor = self.objective.network.feature_extractor
        if self.settings.batchnorm == "eval":
            modes = [(module, module.training) for module in extractor.modules()]
            extractor.eval()
            try:
                return self.objective.whole_features(images)
            finally:
                for module, training in modes:
                    module.training = training
        keep = self.settings.batchnorm == "batch"
        with batchnorm.frozen_statistics(self._batch_norms) if keep else nullcontext():
            return self.objective.whole_features(images)

    def _gamma(self) -> float:
        if self.settings.gamma_sampling == "fixed":
            return self.settings.gamma
        return self.settings.gamma * float(torch.rand((), generator=self.generator))

    def _running_mean(self) -> Direction:
        """Mean of g_B over the steps so far, newer ones weighing more; 0 before the first."""
        if self._steps == 0:
            return self._mean
        return self._mean.scaled(1.0 / (1.0 - self.settings.mean_decay**self._steps))

    def _update_mean(self, gradient: Direction) -> None:
        decay = self.settings.mean_decay
        self._mean = self._mean.scaled(decay).plus(gradient.scaled(1.0 - decay))
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything that a continued post-training needs."""
        return {
            "range_batches": self.range_batches.state_dict(),
            "mean": tuple(self._mean),
            "steps": self._steps,
            "generator": self.generator.get_state(),
            "records": _stack(self.records),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        device = self._mean.weight.device
        self.range_batches.load_state_dict(state["range_batches"])
        self._mean = Direction(*(part.to(device) for part in state["mean"]))
        self._steps = state["steps"]
        self.generator.set_state(state["generator"].cpu())
        self.records = [StepRecord(*row) for row in state["records"].to(device)]

    def take_records(self) -> dict[str, list[float]]:
        """The steps' records since the last call, one list a field; the one copy to the host."""
        columns = _stack(self.records).mT.tolist()
        self.records = []
        return dict(zip(StepRecord._fields, columns, strict=True))


def _stack(records: Sequence[StepRecord]) -> Tensor:
    if not records:
        return torch.empty(0, len(StepRecord._fields), dtype=torch.float64)
    return torch.stack([torch.stack(list(record)) for record in records])


def summarise(records: dict[str, list[float]]) -> dict[str, float]:
    """An epoch's record of PoF from its steps.

    Returns:
        Quantiles of ξ* over the steps that were not capped, mean cosine, mean gradient and
        feature norm, mean γξ* as used, and the share of capped steps. Quantiles are NaN where
        every step was capped.
    """
    capped = torch.tensor(records["capped"], dtype=torch.float64) > 0
    xi = torch.tensor(records["xi"], dtype=torch.float64)[~capped]
    points = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    quantiles = xi.quantile(points) if len(xi) else torch.full((5,), torch.nan)
    names = ("xi_min", "xi_q25", "xi_median", "xi_q75", "xi_max")
    means = {
        name: sum(records[name]) / len(records[name])
        for name in ("expansion", "cosine", "gradient_norm", "feature_norm")
    }
    return {
        **dict(zip(names, quantiles.tolist(), strict=True)),
        **means,
        "capped_share": float(capped.double().mean()),
    }


RUNAWAY_GROWTH = 3.0
RUNAWAY_COSINE = 0.9


def is_runaway(epochs: Sequence[dict[str, float]]) -> bool:
    """Whether post-training ran away: ξ* grew and every batch's ĝ became one direction.

    Judged from the epochs' records (``summarise``): in some epoch the median ξ* is at least
    ``RUNAWAY_GROWTH`` × the first epoch's while the mean cosine is at least ``RUNAWAY_COSINE``
    and has risen. Epochs whose every step was capped have no median and do not count.
    """
    measured = [epoch for epoch in epochs if not math.isnan(epoch["xi_median"])]
    return any(
        epoch["xi_median"] >= RUNAWAY_GROWTH * measured[0]["xi_median"] > 0
        and epoch["cosine"] >= RUNAWAY_COSINE
        and epoch["cosine"] > measured[0]["cosine"]
        for epoch in measured[1:]
    )
