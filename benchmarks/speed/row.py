"""What a row of the suite is, and what it is measured with."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benchmarks.errors import UserError
from benchmarks.speed import core

if TYPE_CHECKING:
    from benchmarks.speed.subjects import Trained


class MissingPeer(UserError):
    """What a row compares with is not installed."""


def peer(module: str, package: str) -> Any:
    """Import what we compare ourselves with.

    Raises:
        MissingPeer: It is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingPeer(f"{package} is not installed: pip install '.[speed]'") from error


@dataclass(frozen=True)
class Scale:
    """How large everything is that is measured; the defaults are what is reported.

    Attributes:
        batch_size: Images a training step.
        images: Random images that training batches are drawn from (a quarter for the ResNet).
        trained_images: Real images that the network of the curvature rows is trained on.
        trained_epochs: For how long.
        whole_set: Images of a classifier's Hessian.
        slow_set: The same, beside peers that take minutes over ``whole_set``.
        network_set: Images of a whole network's Hessian.
        matrix: Rows and columns of the matrices whose product a device is judged by.
        loop_images: Images an epoch beside a plain loop, whose start must not count.
        epoch_images: Images an epoch of a whole training: CIFAR's.
        seeds: How many are trained at once.
        calibration_seconds: For each kind of step of a profile.
        effort: How long to measure a row.
    """

    batch_size: int = 128
    images: int = 2048
    trained_images: int = 2000
    trained_epochs: int = 20
    whole_set: int = 10_000
    slow_set: int = 2_000
    network_set: int = 500
    matrix: int = 8192
    loop_images: int = 10_240
    epoch_images: int = 50_000
    seeds: int = 4
    calibration_seconds: float = 1.0
    effort: core.Effort = field(default_factory=core.Effort)


@dataclass(frozen=True)
class Bench:
    """What a row is measured with.

    Attributes:
        device: What computes.
        data_dir: Where data sets are found and put.
        scale: How large everything is.
    """

    device: torch.device
    data_dir: Path
    scale: Scale = field(default_factory=Scale)

    def alternate(
        self, sides: Mapping[str, core.Call], *, before: Mapping[str, core.Call] | None = None
    ) -> dict[str, list[float]]:
        """Time sides in turn, as long as the scale says, waiting for the device."""
        return core.alternate(sides, self.scale.effort, before=before, synchronise=self.synchronise)

    def synchronise(self) -> None:
        """Wait until the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_memory(self, work: core.Call) -> int:
        """The most bytes of the device that some work has in use at any moment.

        Raises:
            UserError: The device keeps no such account.
        """
        if self.device.type != "cuda":
            raise UserError(f"{self.device} keeps no account of its memory")
        gc.collect()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        return torch.cuda.max_memory_allocated(self.device) - before

    @property
    def steps(self) -> int:
        """Training steps a call: enough to fill an accelerator's queue."""
        return 1 if self.device.type == "cpu" else 20

    @cached_property
    def trained(self) -> "Trained":
        """A trained network with its images, trained once a session."""
        from benchmarks.speed.subjects import train

        return train(self)


class Variant(NamedTuple):
    """What a row is measured on.

    Attributes:
        name: For people and files; empty where there is nothing to tell apart.
        backbone: Name.
        dataset: Whose image size and classes.
        changes: Settings of its runs that are not the project's defaults.
    """

    name: str
    backbone: str = ""
    dataset: str = ""
    changes: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: Unique; what ``ROWS=`` names.
        compares: What is measured, in one line.
        measure: Gives a value a repetition.
        goal: What the median is to reach, if anything.
        limit: What the arithmetic allows, if it says anything.
        unit: ``×`` for a ratio, or ``s``, ….
        at_least: Whether higher is better.
        variants: What it is measured on.
        device: The kind of device that it has a meaning on; ``None``: any.
        cuda_goal: The goal on a GPU, where it is another than elsewhere.
    """

    name: str
    compares: str
    measure: Callable[[Bench, Variant], Sequence[float]]
    goal: float | None = None
    limit: float | None = None
    unit: str = "×"
    at_least: bool = False
    variants: tuple[Variant, ...] = ()
    device: str | None = None
    cuda_goal: float | None = None

    def goal_on(self, device: str) -> float | None:
        """The goal on a kind of device."""
        return self.cuda_goal if device == "cuda" and self.cuda_goal is not None else self.goal

    def met(self, value: float, device: str) -> bool:
        """Whether a median reaches the goal on a kind of device."""
        goal = self.goal_on(device)
        if goal is None:
            return True
        return value >= goal if self.at_least else value <= goal
