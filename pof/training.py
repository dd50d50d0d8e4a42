"""Epochs of any of the methods over a stream of batches, and evaluation.

A ``Trainer`` ties a network, a gradient rule (plain, SAM or PoF), the optimizer and the schedule
together. Its ``state_dict`` holds everything: a run continued from it is the run that was never
interrupted, bit for bit on the same machine.
"""

import copy
import hashlib
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pof.data.augmentation import Normalise
from pof.data.batches import Batches
from pof.network import Network
from pof.objective import Objective, Outcome, Precision
from pof.post_training import PoFGradient, summarise
from pof.schedule import scale
from pof.settings import OptimizerSettings, ScheduleSettings

EVALUATION_BATCH = 1000


class NonFiniteLoss(ArithmeticError):
    """The training loss became NaN or infinite."""

    def __init__(self, epoch: int, step: int) -> None:
        super().__init__(f"the training loss is not finite at epoch {epoch}, step {step}")
        self.epoch = epoch
        self.step = step


class Gradient(Protocol):
    """Leaves a batch's gradient in ``.grad`` and returns the outcome at the current weights.

    Attributes:
        objective: What it is the gradient of.
    """

    objective: Objective

    def __call__(self, images: Tensor, labels: Tensor, /) -> Outcome:
        """Set ``.grad``."""
        ...


class PlainGradient:
    """The gradient of stochastic gradient descent."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self._parameters = list(objective.network.parameters())

    def __call__(self, images: Tensor, labels: Tensor) -> Outcome:
        """Set ``.grad`` to the gradient on this batch."""
        for p in self._parameters:
            p.grad = None
        return self.objective.gradient(images, labels)


def seed_for(seed: int, purpose: str) -> int:
    """A seed for one purpose of a run, independent of those for other purposes and seeds."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sgd(parameters: list[nn.Parameter], settings: OptimizerSettings) -> torch.optim.SGD:
    """The optimizer of every method."""
    return torch.optim.SGD(
        parameters,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
        fused=True,
    )


class Trainer:
    """Trains a network epoch by epoch.

    Args:
        network: What is trained.
        batches: The training stream.
        gradient: The method.
        optimizer: Over the parameters that the method trains.
        learning_rate: The rate that the schedule scales.
        schedule: How it changes over the epochs.
        first_epoch: Epochs already behind the network.
    """

    def __init__(
        self,
        network: Network,
        batches: Batches,
        gradient: Gradient,
        optimizer: torch.optim.Optimizer,
        *,
        learning_rate: float,
        schedule: ScheduleSettings,
        first_epoch: int = 0,
    ) -> None:
        self.network = network
        self.batches = batches
        self.gradient = gradient
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.schedule = schedule
        self.epoch = first_epoch
        self.step = 0
        self._losses: list[Tensor] = []
        self._errors: list[Tensor] = []
        self._sizes: list[int] = []

    def train_epoch(self, after_step: Callable[[], bool] = lambda: True) -> dict[str, float] | None:
        """Train to the end of the current epoch.

        Args:
            after_step: Called after each step but the epoch's last; ``False`` pauses here.

        Returns:
            The epoch's record: mean training loss and error over its batches (each at the
            weights of its own step), the last learning rate, and PoF's summary where PoF
            trains; ``None`` if paused.

        Raises:
            NonFiniteLoss: With the epoch and step, checked at the end of the epoch.
        """
        self.network.train()
        steps = self.batches.per_epoch
        while self.step < steps:
            rate = self.learning_rate * scale(self.schedule, self.epoch + self.step / steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            images, labels = self.batches.draw()
            outcome = self.gradient(images, labels)
            self.optimizer.step()
            self._losses.append(outcome.loss)
            self._errors.append(outcome.error)
            self._sizes.append(len(labels))
            self.step += 1
            if self.step < steps and not after_step():
                self.check_finite()
                return None
        self.check_finite()
        images_seen = sum(self._sizes)
        sizes = torch.tensor(self._sizes, dtype=torch.float64)
        losses = torch.stack(self._losses).double().cpu()
        errors = torch.stack(self._errors).double().cpu()
        record = {
            "train_loss": float((losses * sizes).sum() / images_seen),
            "train_error": float(100.0 * (errors * sizes).sum() / images_seen),
            "learning_rate": rate,
        }
        if isinstance(self.gradient, PoFGradient):
            record |= summarise(self.gradient.take_records())
        self.epoch += 1
        self.step = 0
        self._losses, self._errors, self._sizes = [], [], []
        return record

    def check_finite(self) -> None:
        """Raise ``NonFiniteLoss`` if a step of the current epoch had no finite loss."""
        for step, loss in enumerate(torch.stack(self._losses).tolist() if self._losses else []):
            if not math.isfinite(loss):
                raise NonFiniteLoss(self.epoch, step)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer, generators, epoch and step, and the epoch's record so far.

        As in torch, weights and momentum are the live tensors: save them before training on.
        """
        return {
            "epoch": self.epoch,
            "step": self.step,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "method": self.gradient.state_dict() if isinstance(self.gradient, PoFGradient) else {},
            "losses": torch.stack(self._losses) if self._losses else torch.empty(0),
            "errors": torch.stack(self._errors) if self._errors else torch.empty(0),
            "sizes": list(self._sizes),
            "random": _random_state(self.batches.images.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where ``state_dict`` was taken."""
        device = self.batches.images.device
        self.epoch = state["epoch"]
        self.step = state["step"]
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.batches.load_state_dict(state["batches"])
        if isinstance(self.gradient, PoFGradient):
            self.gradient.load_state_dict(state["method"])
        self._losses = list(state["losses"].to(device))
        self._errors = list(state["errors"].to(device))
        self._sizes = list(state["sizes"])
        _set_random_state(state["random"], device)

    def start_from(self, state: dict[str, Any], *, momentum: bool) -> None:
        """Begin post-training from the end of another method's training.

        Args:
            state: ``state_dict`` of the trainer that pre-trained the network.
            momentum: Whether the optimizer's momentum is carried over. This trainer's parameters
                must be the first of that one's: the feature extractor's come before the
                classifier's.
        """
        self.epoch = state["epoch"]
        self.network.load_state_dict(state["network"])
        self.batches.load_state_dict(state["batches"])
        _set_random_state(state["random"], self.batches.images.device)
        if momentum:
            mine = self.optimizer.state_dict()
            count = sum(len(group["params"]) for group in mine["param_groups"])
            carried = state["optimizer"]["state"]
            mine["state"] = {i: copy.deepcopy(carried[i]) for i in range(count) if i in carried}
            self.optimizer.load_state_dict(mine)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """The global generators, which dropout and the like draw from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


@torch.no_grad()
def evaluate(
    network: Network,
    images: Tensor,
    labels: Tensor,
    normalise: Normalise,
    precision: Precision = "fp32",
) -> tuple[float, float]:
    """Mean cross-entropy (never smoothed) and error over a whole set, in evaluation mode.

    Args:
        network: Left in evaluation mode.
        images: (N, H, W, C) uint8.
        labels: (N,).
        normalise: Pixels to network input.
        precision: Of the forward.

    Returns:
        Loss and error in percent.
    """
    network.eval()
    objective = Objective(network, precision=precision)
    loss = torch.zeros((), dtype=torch.float64, device=images.device)
    error = torch.zeros_like(loss)
    chunks = zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True)
    for pixels, chunk_labels in chunks:
        outcome = objective(normalise(pixels).permute(0, 3, 1, 2), chunk_labels)
        loss += outcome.loss.double() * len(chunk_labels)
        error += outcome.error * len(chunk_labels)
    return float(loss) / len(labels), 100.0 * round(float(error)) / len(labels)
