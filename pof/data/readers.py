"""Verified files → arrays, by torchvision's own readers.

Pickles are read only here, after their checksums have been held by the caller, and once more by
torchvision's reader. What is read is held against the catalogue: shapes, counts, labels.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pof import _torchvision
from pof.data.catalogue import DatasetInfo
from pof.data.dataset import Split
from pof.data.official import OfficialFiles
from pof.data.storage import corrupt

_CURE = "the file does not hold what this data set has; replace it by the official one"


def read_cifar(info: DatasetInfo, official: OfficialFiles, root: Path) -> tuple[Split, Split]:
    """CIFAR-10 or CIFAR-100 from the pickled batches."""
    datasets = _torchvision_datasets()
    *batches, meta = official.files
    folder = root / Path(meta.path).parent
    entries = [[Path(file.path).name, _md5(file.checksum)] for file in batches]
    base = datasets.CIFAR100 if info.name == "cifar100" else datasets.CIFAR10
    reader = type(
        base.__name__,
        (base,),
        {
            "base_folder": str(Path(meta.path).parent),
            "train_list": entries[:-1],
            "test_list": entries[-1:],
            "meta": {
                **base.meta,
                "filename": Path(meta.path).name,
                "md5": _md5(meta.checksum),
            },
        },
    )

    def read(train: bool) -> Split:
        with _reading(folder, f"{info.title}'s batches"):
            data = reader(str(root), train=train)
            images = torch.from_numpy(np.ascontiguousarray(data.data))
            labels = torch.tensor(data.targets, dtype=torch.int64)
        return _checked(info, folder, images, labels, train=train)

    return read(True), read(False)


def read_svhn(info: DatasetInfo, official: OfficialFiles, root: Path) -> tuple[Split, Split]:
    """SVHN, train and extra joined, from the .mat files."""
    base = _torchvision_datasets().SVHN
    paths = {Path(file.path).name.partition("_")[0]: file for file in official.files}
    reader = type(
        base.__name__,
        (base,),
        {"split_list": {part: ["", f.path, _md5(f.checksum)] for part, f in paths.items()}},
    )

    def read(count: int, *parts: str) -> Split:
        size, channels = info.image_size, info.channels
        images = torch.empty((count, size, size, channels), dtype=torch.uint8)
        labels = torch.empty(count, dtype=torch.int64)
        start = 0
        for part in parts:
            path = root / paths[part].path
            with _reading(path, f"{info.title}'s images"):
                data = reader(str(root), split=part)
                part_images = np.moveaxis(data.data, 1, 3)  # a view: extra alone is 1.6 GB
                part_labels = np.atleast_1d(data.labels)
                end = start + len(part_images)
                if end <= count:
                    images[start:end].numpy()[...] = part_images
                    labels[start:end].numpy()[...] = part_labels
            start = end
            del data, part_images
            gc.collect()  # the next part needs the room
        if start != count:
            where = ", ".join(str(root / paths[part].path) for part in parts)
            raise corrupt(where, f"{count} images", f"{start} images", _CURE)
        return _checked(info, root / paths[parts[0]].path, images, labels, train="train" in parts)

    train, extra, test = "train", "extra", "test"
    return read(info.train_count, train, extra), read(info.test_count, test)


def read_idx(info: DatasetInfo, official: OfficialFiles, root: Path) -> tuple[Split, Split]:
    """Fashion-MNIST from the unpacked idx files."""
    mnist = _torchvision_datasets().mnist
    train_images, train_labels, test_images, test_labels = (
        root / file.path for file in official.files
    )

    def read(images_path: Path, labels_path: Path, train: bool) -> Split:
        with _reading(images_path, "images in an idx file"):
            images = mnist.read_image_file(str(images_path)).unsqueeze(-1)
        with _reading(labels_path, "labels in an idx file"):
            labels = mnist.read_label_file(str(labels_path))
        return _checked(info, images_path, images, labels, train=train)

    return read(train_images, train_labels, True), read(test_images, test_labels, False)


def read_digits(info: DatasetInfo) -> tuple[Split, Split]:
    """scikit-learn's bundled 8×8 digits.

    Pixels 0 … 16 become 0 … 255, rounded. Of each class, in the order of the file, every fifth
    image is a test image. The file has no official split; writers are in both parts.
    """
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    images = torch.from_numpy(np.rint(data.images * (255 / 16)).astype(np.uint8)).unsqueeze(-1)
    labels = torch.from_numpy(data.target.astype(np.int64))
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(info.num_classes):
        is_test[(labels == label).nonzero().flatten()[4::5]] = True
    where = Path("scikit-learn's digits")
    return (
        _checked(info, where, images[~is_test], labels[~is_test], train=True),
        _checked(info, where, images[is_test], labels[is_test], train=False),
    )


@contextmanager
def _reading(path: Path, expected: str) -> Iterator[None]:
    """One line for whatever a reader stumbles over; what it may raise is nowhere written down."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise corrupt(path, expected, found, _CURE) from error


def _checked(
    info: DatasetInfo, path: Path, images: torch.Tensor, labels: torch.Tensor, *, train: bool
) -> Split:
    count = info.train_count if train else info.test_count
    shape = (count, info.image_size, info.image_size, info.channels)
    if images.dtype != torch.uint8 or tuple(images.shape) != shape:
        raise corrupt(path, " × ".join(map(str, shape)), _shape(images), _CURE)
    if tuple(labels.shape) != (count,):
        raise corrupt(path, f"{count} labels", f"{len(labels)} labels", _CURE)
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= info.num_classes:
        expected = f"labels 0 … {info.num_classes - 1}"
        raise corrupt(path, expected, f"labels {lowest} … {highest}", _CURE)
    return Split(images, labels)


def _torchvision_datasets() -> Any:
    _torchvision.make_importable()
    import torchvision.datasets

    return torchvision.datasets


def _md5(checksum: str) -> str:
    return checksum.removeprefix("md5:")


def _shape(images: Any) -> str:
    return " × ".join(str(size) for size in images.shape)
