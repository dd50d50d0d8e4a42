"""The networks, images and trainers that rows are measured on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import assembly, calibrate
from benchmarks.cost import Images
from benchmarks.run import RunSettings
from benchmarks.settings import DataSettings, NetworkSettings
from benchmarks.speed.row import Bench, Variant
from benchmarks.worker import prepare_process
from pof.data.augmentation import Normalise
from pof.hessian import ImageBatches
from pof.network import Network
from pof.settings import (
    AugmentationSettings,
    OptimizerSettings,
    PoFSettings,
    SAMSettings,
    ScheduleSettings,
)
from pof.training import Trainer

# Both sizes of small images, on the smallest WRN and on a ResNet of timm's.
SMALL = Variant("wrn_10_1-28", "wrn_10_1", "fashion_mnist")
VARIANTS = (
    SMALL,
    Variant("wrn_10_1-32", "wrn_10_1", "cifar10"),
    Variant("resnet10t-28", "resnet10t", "fashion_mnist"),
    Variant("resnet10t-32", "resnet10t", "cifar10"),
)


def settings(bench: Bench, variant: Variant, algorithm: str, **changes: Any) -> RunSettings:
    """A run's settings with every default of the project, basic augmentation among them."""
    wrn = variant.backbone.startswith("wrn")
    return RunSettings.model_validate(
        {
            "dataset": variant.dataset,
            "fingerprint": "",
            "data": DataSettings(),
            "backbone": variant.backbone,
            "network": NetworkSettings(stem="standard" if wrn else "small"),
            "augmentation": AugmentationSettings(),
            "batch_size": bench.scale.batch_size,
            "optimizer": OptimizerSettings(),
            "schedule": ScheduleSettings(),
            "precision": "fp32",
            "channels_last": True,
            "algorithm": algorithm,
            "sam": SAMSettings() if algorithm == "sam" else None,
            "pof": PoFSettings() if algorithm == "pof" else None,
            "first_epoch": 0,
            "last_epoch": 1,
            "seed": 0,
        }
        | dict(variant.changes)
        | changes
    )


def trainer(
    bench: Bench, variant: Variant, algorithm: str, images: int | None = None, **changes: Any
) -> Trainer:
    """What trains such a run, on random images, at a rate at which noise cannot diverge."""
    prepare_process()
    chosen = calibrate.gently(settings(bench, variant, algorithm, **changes))
    wrn = variant.backbone.startswith("wrn")
    usual = bench.scale.images if wrn else max(bench.scale.images // 4, bench.scale.batch_size)
    count = images or usual
    subject = calibrate.random_subject(chosen, bench.device, Images(count, 1), held=count)
    return assembly.build_trainer(chosen, subject, bench.device)


def steps(trainer: Trainer, count: int = 1) -> Callable[[], None]:
    """A call that trains ``count`` steps on, the ends of epochs among them."""

    def call() -> None:
        left = count

        def after_step() -> bool:
            nonlocal left
            left -= 1
            return left > 0

        while left > 0:
            if trainer.train_epoch(after_step) is not None:
                left -= 1  # the last step of an epoch has no callback

    return call


class Trained(NamedTuple):
    """A trained network and real images.

    Attributes:
        network: In evaluation mode.
        images: (N, H, W, C) uint8: of the training set, those it was trained on first.
        labels: (N,).
        normalise: Pixels to network input.
    """

    network: Network
    images: Tensor
    labels: Tensor
    normalise: Normalise

    def batches(self, count: int, batch_size: int = 500) -> ImageBatches:
        """The first images, in batches."""
        return ImageBatches(
            self.images[:count], self.labels[:count], self.normalise, batch_size=batch_size
        )


def train(bench: Bench) -> Trained:
    """Train WRN-10-1 with SGD on real images for a few seconds, to a small loss."""
    prepare_process()
    dataset = assembly.load_dataset(SMALL.dataset, bench.data_dir)
    scale = bench.scale
    epochs = scale.trained_epochs
    chosen = settings(
        bench,
        SMALL,
        "sgd",
        fingerprint=dataset.fingerprint,
        data=DataSettings(train_size=scale.trained_images),
        augmentation=AugmentationSettings(kind="none"),
        schedule=ScheduleSettings(kind="cosine", total_epochs=epochs),
        last_epoch=epochs,
    )
    subject = assembly.prepare_subject(chosen, dataset, bench.device)
    trainer = assembly.build_trainer(chosen, subject, bench.device)
    for _ in range(epochs):
        trainer.train_epoch()
    trainer.network.eval()
    more = scale.whole_set
    return Trained(
        trainer.network,
        torch.cat([subject.train_images, dataset.train.images[:more].to(bench.device)])[:more],
        torch.cat([subject.train_labels, dataset.train.labels[:more].to(bench.device)])[:more],
        subject.normalise,
    )
