"""Sharpness-Aware Minimization: the gradient at the worst nearby weights.

Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021:
e = ρ g/‖g‖ (eq. 2), then the gradient at w + e, applied at w. ASAM (Kwon et al., ICML 2021)
measures the radius relative to |w|: e = ρ T²g/‖Tg‖ with T = |w| + η.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from pof import batchnorm
from pof.objective import Objective, Outcome
from pof.parallel import ALONE, Processes
from pof.settings import SAMSettings

_TINY = 1e-12  # keeps a vanishing gradient from dividing by zero


class SAMGradient:
    """Leaves SAM's gradient of a batch in ``.grad``; weights come back bit for bit.

    Calling it is the whole of SAM but the optimizer's own step, which may be any.

    Args:
        objective: What is minimised.
        settings: SAM's named details.
        weight_decay: The optimizer's λ; used only with ``settings.perturb_weight_decay``.
        processes: Who shares the parts of a batch that ascend on their own, with ``m_sharpness``;
            a batch that ascends as a whole is shared by the objective.
    """

    def __init__(
        self,
        objective: Objective,
        settings: SAMSettings,
        *,
        weight_decay: float = 0.0,
        processes: Processes = ALONE,
    ) -> None:
        self.objective = objective
        self.settings = settings
        self.weight_decay = weight_decay
        self.processes = processes
        self.parameters: list[Tensor] = [
            p for p in objective.network.parameters() if p.requires_grad
        ]
        self._batch_norms = batchnorm.layers(objective.network)
        self._weights = [torch.empty_like(p) for p in self.parameters]
        self._sum = [torch.zeros_like(p) for p in self.parameters] if settings.m_sharpness else []

    def __call__(self, images: Tensor, labels: Tensor) -> Outcome:
        """Set ``.grad`` to SAM's gradient on this batch.

        Args:
            images: (N, C, H, W).
            labels: (N,).

        Returns:
            Loss and error at the unperturbed weights.
        """
        m = self.settings.m_sharpness
        if m is None or (m >= len(labels) and self.processes.size == 1):
            return self._ascend_and_descend(images, labels, weight=1.0)
        torch._foreach_zero_(self._sum)
        loss = torch.zeros((), device=images.device)
        error = torch.zeros((), dtype=torch.float64, device=images.device)
        parts = [
            (part_images, part_labels, len(part_labels) / len(labels))
            for part_images, part_labels in zip(images.split(m), labels.split(m), strict=True)
        ]
        nothing = [(*parts[0][:2], 0.0)]  # for a process beyond the parts of a small last batch
        for part_images, part_labels, share in self.processes.mine(parts) or nothing:
            part = self._ascend_and_descend(part_images, part_labels, weight=share)
            torch._foreach_add_(self._sum, self._gradients())
            loss = loss + part.loss * share
            error = error + part.error * share
        self.processes.add_up([*self._sum, loss, error])
        torch._foreach_copy_(self._gradients(), self._sum)
        return Outcome(loss, error)

    def _ascend_and_descend(self, images: Tensor, labels: Tensor, *, weight: float) -> Outcome:
        which = self.settings.batchnorm
        with self._statistics(recorded=which in ("first", "both")):
            self._clear()
            outcome = self.objective.gradient(images, labels)
        with self._perturbed(), self._statistics(recorded=which in ("second", "both")):
            self._clear()
            self.objective.gradient(images, labels, weight)
        return outcome

    def _statistics(self, *, recorded: bool) -> AbstractContextManager[None]:
        return nullcontext() if recorded else batchnorm.frozen_statistics(self._batch_norms)

    @contextmanager
    def _perturbed(self) -> Iterator[None]:
        """Within the context, the weights stand at w + e(g) for the gradient g in ``.grad``."""
        with torch.no_grad():
            torch._foreach_copy_(self._weights, self.parameters)
            torch._foreach_add_(self.parameters, self._perturbation())
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self._weights)

    def _perturbation(self) -> list[Tensor]:
        """The step e up the loss (SAM eq. 2), one tensor a parameter."""
        direction = self._gradients()
        if self.settings.perturb_weight_decay:
            decay = torch._foreach_mul(self.parameters, self.weight_decay)
            direction = list(torch._foreach_add(direction, list(decay)))
        if self.settings.adaptive:
            scale = torch._foreach_abs(self.parameters)
            torch._foreach_add_(scale, self.settings.eta)
            direction = list(torch._foreach_mul(direction, scale))
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(direction)))
        if self.settings.adaptive:
            direction = list(torch._foreach_mul(direction, scale))
        return list(torch._foreach_mul(direction, self.settings.rho / (norm + _TINY)))

    def _gradients(self) -> list[Tensor]:
        # A parameter the loss does not reach has no gradient: it is not perturbed.
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]

    def _clear(self) -> None:
        for p in self.parameters:
            p.grad = None
