"""Small data sets in the official formats, for the tests of the data sets."""

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy.io

from pof.data.catalogue import DATASETS, DatasetInfo
from pof.data.official import DataFile, OfficialFiles, Packed


def md5(data: bytes) -> str:
    return f"md5:{hashlib.md5(data, usedforsecurity=False).hexdigest()}"


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass(frozen=True)
class Small:
    """A small data set: what it should hold, and its files by name."""

    info: DatasetInfo
    official: OfficialFiles
    data_files: dict[str, bytes]
    packed_files: dict[str, bytes]
    images: np.ndarray
    labels: np.ndarray

    def put_packed(self, folder: Path) -> None:
        put(self.packed_files, folder)

    def put_unpacked(self, folder: Path) -> None:
        put(self.data_files, folder)


def put(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def tar_gz(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def cifar(name: str = "cifar10", seed: int = 0) -> Small:
    """Five training batches of 4 images (CIFAR-100: one of 20), one test batch of 6."""
    info = replace(DATASETS[name], train_count=20, test_count=6)
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (26, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(0, info.num_classes, 26)
    if name == "cifar10":
        base, key, meta_name, meta_key = "cifar-10-batches-py", "labels", "batches.meta", None
        parts = {f"data_batch_{i + 1}": slice(4 * i, 4 * i + 4) for i in range(5)}
        parts["test_batch"] = slice(20, 26)
        meta_key = "label_names"
    else:
        base, key, meta_name, meta_key = "cifar-100-python", "fine_labels", "meta", ""
        parts = {"train": slice(0, 20), "test": slice(20, 26)}
        meta_key = "fine_label_names"
    files = {
        f"{base}/{part}": pickle.dumps(
            {"data": images[where].reshape(-1, 3072), key: labels[where].tolist()}, protocol=2
        )
        for part, where in parts.items()
    }
    files[f"{base}/{meta_name}"] = pickle.dumps({meta_key: ["a", "b"]}, protocol=2)
    archive = tar_gz(files)
    archive_name = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
    packed = Packed(
        archive_name[name],
        md5(archive),
        len(archive),
        (f"http://127.0.0.1:9/{archive_name[name]}",),
        tuple(files),
    )
    official = OfficialFiles(
        tuple(DataFile(path, md5(content)) for path, content in files.items()), (packed,)
    )
    return Small(
        info, official, files, {packed.name: archive}, images.transpose(0, 2, 3, 1), labels
    )


def svhn(labels: np.ndarray | None = None) -> Small:
    """5 training, 7 extra and 3 test images; digit 0 has the label 10, as in the official files."""
    info = replace(DATASETS["svhn"], train_count=12, test_count=3)
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (15, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(15) % 10 if labels is None else labels
    files = {}
    for part, where in (("train", slice(0, 5)), ("extra", slice(5, 12)), ("test", slice(12, 15))):
        y = np.where(labels[where] == 0, 10, labels[where]).astype(np.uint8)[:, None]
        buffer = io.BytesIO()
        scipy.io.savemat(
            buffer, {"X": images[where].transpose(1, 2, 3, 0), "y": y}, do_compression=True
        )
        files[f"{part}_32x32.mat"] = buffer.getvalue()
    official = OfficialFiles(
        tuple(DataFile(path, md5(content), len(content)) for path, content in files.items()),
        tuple(
            Packed(path, md5(content), len(content), (f"http://127.0.0.1:9/{path}",), (path,))
            for path, content in files.items()
        ),
        layouts=(".", "svhn"),
    )
    return Small(info, official, files, files, images, labels)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def fashion(labels: np.ndarray | None = None) -> Small:
    """9 training and 4 test images in idx files, the .gz files packed as if by Debian."""
    info = replace(DATASETS["fashion_mnist"], train_count=9, test_count=4)
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (13, 28, 28), dtype=np.uint8)
    labels = rng.integers(0, 10, 13) if labels is None else labels
    files = {
        "train-images-idx3-ubyte": idx(images[:9]),
        "train-labels-idx1-ubyte": idx(labels[:9].astype(np.uint8)),
        "t10k-images-idx3-ubyte": idx(images[9:]),
        "t10k-labels-idx1-ubyte": idx(labels[9:].astype(np.uint8)),
    }
    served = {f"{name}.gz": gzip.compress(content, mtime=1) for name, content in files.items()}
    repacked = {f"{name}.gz": gzip.compress(content, 1, mtime=2) for name, content in files.items()}
    official = OfficialFiles(
        tuple(DataFile(path, sha256(content), len(content)) for path, content in files.items()),
        tuple(
            Packed(
                name,
                md5(content),
                len(content),
                (f"http://127.0.0.1:9/{name}",),
                (name.removesuffix(".gz"),),
                repackable=True,
            )
            for name, content in served.items()
        ),
        layouts=("FashionMNIST/raw", "."),
    )
    return Small(info, official, files, repacked, images[..., None], labels)
