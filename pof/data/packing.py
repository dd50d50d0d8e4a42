"""A data set's files gathered for a machine that cannot fetch them."""

import gzip
import io
import lzma
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from pof.data.catalogue import DATASETS
from pof.data.jpeg import ARCHIVE_NAMES, CACHE_NAME, find_copy
from pof.data.official import OFFICIAL, OfficialFiles
from pof.data.sources import Sources
from pof.data.storage import replacing, writing_into
from pof.errors import PofError


def pack(name: str, folder: Path, elsewhere: Sequence[Path], out: Path) -> list[Path]:
    """Copy what a data set is read from, as small as it is found, to where `load` looks for it.

    Args:
        name: A key of `DATASETS`.
        folder: The data folder; what has to be fetched goes there first.
        elsewhere: Further folders, which are only read.
        out: A data folder for another machine.

    Returns:
        The files written; none for a data set that comes with a package.

    Raises:
        PofError: As `load`.
    """
    if name not in DATASETS:
        raise PofError(f"there is no data set {name!r}; there are {', '.join(DATASETS)}")
    if name == "digits":
        return []
    if name == "cifar10_jpeg":
        return _pack_jpeg_copy(folder, elsewhere, out)
    official = OFFICIAL[name]
    root = Sources(folder, tuple(elsewhere)).locate(DATASETS[name], official).root
    return _pack_official(official, root, out / official.layouts[0])


def _pack_official(official: OfficialFiles, root: Path, home: Path) -> list[Path]:
    """Compressed where a copy compressed anew is as good as the official one."""
    packed = {path: p.name for p in official.packed if p.repackable for path in p.holds}
    written = []
    for file in official.files:
        name = packed.get(file.path)
        write = _copy if name is None else _compress
        written.append(_written(home / (name or file.path), root / file.path, write))
    return written


def _pack_jpeg_copy(folder: Path, elsewhere: Sequence[Path], out: Path) -> list[Path]:
    copy = next(filter(None, map(find_copy, (folder, *elsewhere))), None)
    if copy is None:  # decoded alone: ten times as large
        cache = folder / CACHE_NAME
        if not cache.is_file():
            places = ", ".join(map(str, (folder, *elsewhere)))
            raise PofError(f"{DATASETS['cifar10_jpeg'].title}: no copy of it in {places}")
        return [_written(out / CACHE_NAME, cache, _copy)]
    if copy.is_file():
        return [_written(out / copy.name, copy, _copy)]
    return [_written(out / ARCHIVE_NAMES[0], copy, _archive)]


def _written(target: Path, source: Path, write: Callable[[Path, Path], None]) -> Path:
    with writing_into(target.parent), replacing(target) as draft:
        write(source, draft)
    return target


def _copy(source: Path, draft: Path) -> None:
    shutil.copyfile(source, draft)


def _compress(source: Path, draft: Path) -> None:
    with (
        source.open("rb") as plain,
        draft.open("xb") as raw,
        gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed,
    ):
        shutil.copyfileobj(plain, packed)


def _archive(source: Path, draft: Path) -> None:
    with lzma.open(draft, "xb") as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for path in sorted(source.glob("t*/*/*.jp*g")):
            content = path.read_bytes()
            member = tarfile.TarInfo(f"{source.name}/{path.relative_to(source).as_posix()}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
