"""From a run's settings to what trains it: data on the device, network, method, optimizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.errors import UserError
from benchmarks.run import RunSettings
from benchmarks.settings import DataSettings
from pof import data, network
from pof.data.augmentation import Normalise
from pof.data.batches import Batches
from pof.errors import PofError
from pof.objective import Objective
from pof.parallel import ALONE, Processes, SharedObjective
from pof.post_training import PoFGradient
from pof.sam import SAMGradient
from pof.settings import ScheduleSettings
from pof.training import Gradient, PlainGradient, Trainer, seed_for, sgd


def load_dataset(name: str, folder: Path) -> data.Dataset:
    """Read a data set.

    Raises:
        UserError: It could not be had or is damaged.
    """
    try:
        return data.load(name, folder)
    except PofError as error:
        raise UserError(str(error)) from error


def training_size(dataset: str, choice: DataSettings, total: int) -> int:
    """How many of a data set's training images are trained on.

    Raises:
        UserError: More are asked for than there are, or all are held out.
    """
    size = choice.train_size or max(1, total - choice.holdout)
    if size + choice.holdout > total:
        raise UserError(
            f"{dataset}: data.train_size {size} and data.holdout {choice.holdout} "
            f"exceed its {total} training images"
        )
    return size


@dataclass(frozen=True)
class Subject:
    """The images of a run, on the device.

    Attributes:
        info: What the data set is.
        train_images: (N, H, W, C) uint8.
        train_labels: (N,).
        test_images: What is evaluated: the test set, or the part held out.
        test_labels: (M,).
        normalise: Pixels to network input.
    """

    info: data.DatasetInfo
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    normalise: Normalise


def prepare_subject(settings: RunSettings, dataset: data.Dataset, device: torch.device) -> Subject:
    """Choose the run's images and put them on the device.

    Raises:
        UserError: The data set is not the one the run was planned with, or is too small.
    """
    if dataset.fingerprint != settings.fingerprint:
        raise UserError(
            f"{settings.dataset}: the data changed since the run was planned "
            f"({dataset.fingerprint[:19]}… instead of {settings.fingerprint[:19]}…); plan again"
        )
    train, test = dataset.train, dataset.test
    total = len(train.labels)
    choice = settings.data
    size = training_size(settings.dataset, choice, total)
    train_images, train_labels = train.images, train.labels
    test_images, test_labels = test.images, test.labels
    if size < total:
        generator = torch.Generator().manual_seed(seed_for(choice.subset_seed, "subset"))
        order = torch.randperm(total, generator=generator)
        chosen = order[:size]
        train_images, train_labels = train.images[chosen], train.labels[chosen]
        if choice.holdout:
            held_out = order[-choice.holdout :]
            test_images, test_labels = train.images[held_out], train.labels[held_out]
    return Subject(
        info=dataset.info,
        train_images=train_images.to(device),
        train_labels=train_labels.to(device),
        test_images=test_images.to(device),
        test_labels=test_labels.to(device),
        normalise=Normalise(dataset.info.mean, dataset.info.std, device=device),
    )


def build_network(
    settings: RunSettings, info: data.DatasetInfo, device: torch.device
) -> network.Network:
    """The run's network with its seed's initial weights.

    Raises:
        UserError: There is no such backbone, or it does not fit the images.
    """
    torch.manual_seed(seed_for(settings.seed, "initialisation"))
    try:
        built = network.create(
            settings.backbone,
            num_classes=info.num_classes,
            in_chans=info.channels,
            img_size=info.image_size,
            **settings.network.model_dump(),
        )
    except PofError as error:
        raise UserError(str(error)) from error
    if settings.sync_batchnorm:
        if device.type != "cuda":
            raise UserError("training.sync_batchnorm: BatchNorm is synchronised on GPUs alone")
        from timm.layers import convert_sync_batchnorm  # importable once a network was created

        built = convert_sync_batchnorm(built)
    memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
    return built.to(device, memory_format=memory_format)  # type: ignore[call-overload,no-any-return]


def build_trainer(
    settings: RunSettings,
    subject: Subject,
    device: torch.device,
    processes: Processes = ALONE,
) -> Trainer:
    """The run's trainer, at its first epoch, with initial weights.

    Raises:
        UserError: The backbone does not exist or fit, or BatchNorm cannot be synchronised here.
    """
    net = build_network(settings, subject.info, device)
    if settings.compile:
        # One program a shape: the smaller last batch of an epoch must not change the others' bits.
        net.feature_extractor.compile(dynamic=False)
    torch.manual_seed(seed_for(settings.seed, "global"))
    objective = Objective(
        net, label_smoothing=settings.optimizer.label_smoothing, precision=settings.precision
    )
    ascends_in_parts = settings.sam is not None and settings.sam.m_sharpness is not None
    if processes.size > 1 and not ascends_in_parts:
        objective = SharedObjective(objective, processes)

    def batches(purpose: str, batch_size: int) -> Batches:
        return Batches(
            subject.train_images,
            subject.train_labels,
            batch_size=batch_size,
            augmentation=settings.augmentation,
            normalise=subject.normalise,
            order_seed=seed_for(settings.seed, f"{purpose}order"),
            augmentation_seed=seed_for(settings.seed, f"{purpose}augmentation"),
            channels_last=settings.channels_last,
        )

    gradient: Gradient
    parameters = list(net.parameters())
    rate, schedule = settings.optimizer.learning_rate, settings.schedule
    if settings.pof is not None:
        size = settings.pof.range_batch_size or settings.batch_size
        generator = torch.Generator().manual_seed(seed_for(settings.seed, "gamma"))
        gradient = PoFGradient(objective, settings.pof, batches("range ", size), generator)
        parameters = list(net.feature_extractor.parameters())
        if settings.pof.learning_rate is not None:
            rate, schedule = settings.pof.learning_rate, ScheduleSettings(kind="constant")
    elif settings.sam is not None:
        decay = settings.optimizer.weight_decay
        gradient = SAMGradient(objective, settings.sam, weight_decay=decay, processes=processes)
    else:
        gradient = PlainGradient(objective)
    return Trainer(
        net,
        batches("", settings.batch_size),
        gradient,
        sgd(parameters, settings.optimizer),
        learning_rate=rate,
        schedule=schedule,
        first_epoch=settings.first_epoch,
    )


def inherit(trainer: Trainer, parent: dict[str, Any], settings: RunSettings) -> None:
    """Start a second stage where the first one ended.

    The base method continued takes over everything. PoF takes over the weights, the places in
    the data and augmentation streams and, unless momentum starts fresh, φ's momentum.
    """
    if settings.pof is None:
        trainer.load_state_dict(parent)
        return
    trainer.start_from(parent, momentum=settings.pof.momentum == "carried")
