"""Load a data set by its name, from wherever its files are found."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pof.data.catalogue import DATASETS, DatasetInfo
from pof.data.dataset import Dataset, Split, fingerprint
from pof.data.jpeg import load_jpeg_copy
from pof.data.official import CIFAR10_JPEG_CONTENT, DIGITS_FINGERPRINT, OFFICIAL, OfficialFiles
from pof.data.readers import read_cifar, read_digits, read_idx, read_svhn
from pof.data.sources import SEARCH_PATH_VARIABLE, Sources
from pof.errors import PofError

Reader = Callable[[DatasetInfo, OfficialFiles, Path], tuple[Split, Split]]

_READERS: dict[str, Reader] = {
    "cifar10": read_cifar,
    "cifar100": read_cifar,
    "svhn": read_svhn,
    "fashion_mnist": read_idx,
}


def load(
    name: str,
    folder: Path,
    *,
    download: bool = True,
    elsewhere: Sequence[Path] | None = None,
) -> Dataset:
    """Load a data set into memory.

    Args:
        name: A key of `DATASETS`.
        folder: The data folder: searched first, and where everything fetched is kept.
        download: Whether data that is in no folder may be fetched.
        elsewhere: Further folders, which are only read; without them, those that the environment
            variable `POF_DATA_PATH` lists, separated by colons.

    Returns:
        The data set, its files held against the official checksums.

    Raises:
        DataUnavailable: No source has it; says what each answered, and what to do.
        DataCorrupt: A file of it is broken; says which, what was expected and found, and the cure.
        PofError: There is no such data set, or the data folder cannot be written.
    """
    if name not in DATASETS:
        raise PofError(f"there is no data set {name!r}; there are {', '.join(DATASETS)}")
    info = DATASETS[name]
    folders = search_path(os.environ) if elsewhere is None else tuple(elsewhere)
    if name == "digits":
        train, test = read_digits(info)
        content = fingerprint(name, train, test)
        official = content == DIGITS_FINGERPRINT
        return Dataset(info, train, test, content, official, "bundled with scikit-learn")
    if name == "cifar10_jpeg":
        copy = load_jpeg_copy(info, folder, folders)
        content = fingerprint(name, copy.train, copy.test)
        official = copy.content == CIFAR10_JPEG_CONTENT
        return Dataset(info, copy.train, copy.test, content, official, copy.source)
    return load_official(info, OFFICIAL[name], Sources(folder, folders, download), _READERS[name])


def load_official(
    info: DatasetInfo, official: OfficialFiles, sources: Sources, reader: Reader
) -> Dataset:
    """Load a data set that comes in official files.

    Args:
        info: The data set.
        official: Its files and their checksums.
        sources: Where to look for them.
        reader: What makes images and labels of them.

    Returns:
        The data set.

    Raises:
        PofError: As `load`.
    """
    found = sources.locate(info, official)
    train, test = reader(info, official, found.root)
    content = fingerprint(info.name, train, test)
    return Dataset(info, train, test, content, official=True, source=found.source)


def search_path(environment: Mapping[str, str]) -> tuple[Path, ...]:
    """The folders that `POF_DATA_PATH` lists."""
    entries = environment.get(SEARCH_PATH_VARIABLE, "").split(os.pathsep)
    return tuple(Path(entry).expanduser() for entry in entries if entry)
