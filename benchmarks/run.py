"""One run: a stage of training, its settings, its identity and its parent.

A run's identity is the SHA-256 of everything that can change its numbers and of nothing else:
settings, the fingerprint of its data, and the identity of the run it starts from. Paths, hosts
and worker counts are not part of it.
"""

from functools import cached_property
from typing import Literal

from pydantic import TypeAdapter

from benchmarks.files import canonical_json, sha256
from benchmarks.settings import (
    AugmentationName,
    DataSettings,
    NetworkSettings,
    OffUnlessSaid,
    OneUnlessSaid,
    Strict,
)
from pof.settings import (
    AugmentationSettings,
    OptimizerSettings,
    PoFSettings,
    SAMSettings,
    ScheduleSettings,
)

# Raised when the meaning of a run changes: results of another version are never mixed in.
SCHEMA = 1


class RunSettings(Strict):
    """Everything that can change a run's numbers.

    Attributes:
        dataset: Name.
        fingerprint: Of its content.
        data: Which of its images.
        backbone: Name.
        network: How it is built.
        augmentation: What is done to training images.
        batch_size: Images a batch.
        optimizer: The base optimizer.
        schedule: Of the learning rate.
        precision: Of forward and backward.
        channels_last: Memory format (it moves rounding).
        compile: Whether the feature extractor is compiled (it moves rounding).
        gpus_per_run: Processes that share every batch (it moves rounding, and BatchNorm).
        sync_batchnorm: Whether BatchNorm normalises over all of them.
        algorithm: What trains in this stage.
        sam: With ``algorithm = "sam"``.
        pof: With ``algorithm = "pof"``.
        first_epoch: Epochs before this stage.
        last_epoch: Epochs after it.
        seed: Of initialisation, order, augmentation and every other draw.
    """

    dataset: str
    fingerprint: str
    data: DataSettings
    backbone: str
    network: NetworkSettings
    augmentation: AugmentationSettings
    batch_size: int
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    precision: Literal["fp32", "bf16"]
    channels_last: bool
    compile: OffUnlessSaid = False
    gpus_per_run: OneUnlessSaid = 1
    sync_batchnorm: OffUnlessSaid = False
    algorithm: Literal["sgd", "sam", "pof"]
    sam: SAMSettings | None
    pof: PoFSettings | None
    first_epoch: int
    last_epoch: int
    seed: int


class Run(Strict):
    """One stage of training.

    Attributes:
        settings: What can change its numbers.
        method: The arm it was planned for, for people: ``sam``, ``sam+pof``, ….
        parent: Identity of the run it continues, if any.
        evaluate_every: Epochs between evaluations: recorded, not trained.
    """

    settings: RunSettings
    method: str
    parent: str | None
    evaluate_every: int

    @cached_property
    def identity(self) -> str:
        """SHA-256 of all that can change this run's numbers."""
        settings = TypeAdapter(RunSettings).dump_python(self.settings, mode="json")
        return sha256(
            canonical_json({"schema": SCHEMA, "settings": settings, "parent": self.parent})
        )

    @cached_property
    def apart_from_seed(self) -> str:
        """Equal for runs that differ in nothing but the seed."""
        settings = TypeAdapter(RunSettings).dump_python(self.settings, mode="json")
        return canonical_json({**settings, "seed": None})

    @property
    def name(self) -> str:
        """Folder name: readable, and unique through the head of the identity."""
        s = self.settings
        augmentation: AugmentationName = s.augmentation.kind
        epochs = f"{s.first_epoch}-{s.last_epoch}"
        parts = [s.dataset, s.backbone, augmentation, self.method, epochs, f"seed{s.seed}"]
        return "-".join([*parts, self.identity[:8]])

    @property
    def label(self) -> str:
        """One line for people."""
        s = self.settings
        return (
            f"{s.dataset} {s.backbone} {s.augmentation.kind} {self.method} "
            f"epochs {s.first_epoch}–{s.last_epoch} seed {s.seed}"
        )
