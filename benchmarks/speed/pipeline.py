"""Rows of the input pipeline: order, gather, augmentation, normalisation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.speed.conditions import beside_users
from benchmarks.speed.core import ratios
from benchmarks.speed.row import Bench, Row, Variant
from benchmarks.speed.subjects import VARIANTS, steps, trainer
from pof import _torchvision
from pof.data import DATASETS
from pof.data.batches import laid_out
from pof.training import Trainer

_WORKERS = 2


class _Images(Dataset[tuple[Tensor, int]]):
    """Images in memory through torchvision's transforms, as torchvision's data sets do it."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Any], Tensor]) -> None:
        from PIL import Image

        pixels = images.squeeze(3) if images.shape[3] == 1 else images
        self._images = pixels.cpu().numpy()
        self._labels = labels.tolist()
        self._transform = transform
        self._from_array = Image.fromarray

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self._from_array(self._images[index])), self._labels[index]


@contextmanager
def torchvision_loader(
    ours: Trainer, variant: Variant, workers: int = _WORKERS
) -> Iterator[DataLoader[tuple[Tensor, int]]]:
    """The same images with basic augmentation through torchvision in worker processes."""
    _torchvision.make_importable()
    from torchvision import transforms

    info = DATASETS[variant.dataset]
    transform = transforms.Compose(
        [
            transforms.RandomCrop(info.image_size, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(info.mean, info.std),
        ]
    )
    batches = ours.batches
    loader = DataLoader(
        _Images(batches.images, batches.labels, transform),
        batch_size=batches.batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=batches.images.is_cuda,
    )
    try:
        yield loader
    finally:
        del loader  # ends its workers


def share(bench: Bench, variant: Variant) -> list[float]:
    """What drawing a batch takes of an SGD step."""
    ours = trainer(bench, variant, "sgd")
    inputs = trainer(bench, variant, "sgd").batches
    timed = bench.alternate({"input": inputs.draw, "step": steps(ours, 1)})
    return ratios(timed["input"], timed["step"])


def _alone(bench: Bench, variant: Variant) -> list[float]:
    """Our images/s over torchvision's, an epoch at a time."""
    ours = trainer(bench, variant, "sgd")
    batches = ours.batches

    def draw() -> None:
        for _ in range(batches.per_epoch):
            batches.draw()

    with torchvision_loader(ours, variant) as loader:

        def load() -> None:
            for images, labels in loader:
                images.to(bench.device), labels.to(bench.device)

        timed = beside_users(bench, {"ours": draw}, {"theirs": load})
    return ratios(timed["theirs"], timed["ours"])


def _epoch(memory_format: torch.memory_format) -> Callable[[Bench, Variant], list[float]]:
    def measure(bench: Bench, variant: Variant) -> list[float]:
        ours, theirs = trainer(bench, variant, "sgd"), trainer(bench, variant, "sgd")
        network: nn.Module = theirs.network
        network = network.to(memory_format=memory_format)  # type: ignore[call-overload]
        optimizer = theirs.optimizer
        with torchvision_loader(ours, variant) as loader:

            def epoch() -> None:
                network.train()
                for images, labels in loader:
                    images = laid_out(images.to(bench.device), memory_format)
                    labels = labels.to(bench.device)
                    optimizer.zero_grad()
                    F.cross_entropy(network(images), labels).backward()
                    optimizer.step()

            timed = beside_users(bench, {"ours": ours.train_epoch}, {"theirs": epoch})
        return ratios(timed["ours"], timed["theirs"])

    return measure


ROWS = (
    Row(
        "input-share",
        "order, gather, augmentation and normalisation of a batch / an SGD step",
        share,
        limit=0.0,
        goal=0.04,
        cuda_goal=0.02,
        variants=VARIANTS,
    ),
    Row(
        "input-alone",
        "our images/s with basic augmentation / torchvision transforms, DataLoader, 2 workers",
        _alone,
        goal=25.0,
        at_least=True,
        variants=(VARIANTS[0], VARIANTS[1]),
    ),
    Row(
        "epoch-peer-contiguous",
        "our SGD epoch with our defaults / the same network trained through torchvision "
        "transforms and a DataLoader with 2 workers, as users write it (contiguous)",
        _epoch(torch.contiguous_format),
        goal=0.75,
        variants=VARIANTS,
    ),
    Row(
        "epoch-peer",
        "the same, their network and batches channels-last as ours",
        _epoch(torch.channels_last),
        goal=0.75,
        variants=VARIANTS,
    ),
)
