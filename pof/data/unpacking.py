"""Data files out of archives, safely.

Nothing is extracted by an archive's own paths: only the files that the data set is made of are
copied out, each to the place that this project gives it, and only if its checksum holds.
"""

import gzip
import hashlib
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, cast

from pof.data.official import DataFile, Packed
from pof.data.storage import corrupt, replacing, verify, write, writing_into
from pof.errors import DataCorrupt

_CHUNK = 1 << 20
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError)


def unpack(
    archive: Path, packed: Packed, wanted: Sequence[DataFile], folder: Path, cure: str
) -> None:
    """Bring data files from an archive, or from a plain copy, into a folder.

    Args:
        archive: The packed file.
        packed: What it should be.
        wanted: The files to take out of it.
        folder: Where they go, each at its own `path`.
        cure: What the user should do if the archive is broken.

    Raises:
        DataCorrupt: The archive, or a file in it, is not what it should be.
        PofError: The folder cannot be written.
    """
    if not packed.repackable:
        verify(archive, packed.checksum, cure, packed.size)
    if packed.name.endswith(".tar.gz"):
        _unpack_tar(archive, wanted, folder, cure)
        return
    for file in wanted:
        _install(_chunks(archive, cure), file, folder, archive, cure)


def tar_files(
    archive: Path, wanted: Callable[[str], bool], cure: str
) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the wanted regular files of a .tar, .tar.gz or .tar.xz archive.

    Raises:
        DataCorrupt: The archive is broken, has a link or a device in it, or a path that leads
            outside.
    """
    try:
        with _decompressed(archive) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    _refuse_unsafe(archive, member, cure)
                    if member.isfile() and wanted(member.name):
                        content = tar.extractfile(member)
                        assert content is not None  # a regular file has content
                        yield member.name, content.read()
            while stream.read(_CHUNK):
                pass  # to the end, where the compression's own checksum is
    except _BROKEN as error:
        raise _broken(archive, "a whole tar archive", error, cure) from error


def _decompressed(archive: Path) -> IO[bytes]:
    """The bytes inside; unlike tarfile's own way, this does not pass a cut archive for whole."""
    if archive.suffix == ".gz":
        return cast(IO[bytes], gzip.open(archive))
    if archive.suffix == ".xz":
        return lzma.open(archive)
    return archive.open("rb")


def _unpack_tar(archive: Path, wanted: Sequence[DataFile], folder: Path, cure: str) -> None:
    missing = {file.path: file for file in wanted}
    for name, content in tar_files(archive, missing.__contains__, cure):
        if file := missing.pop(name, None):
            _install(iter((content,)), file, folder, archive, cure)
    if missing:
        raise corrupt(archive, f"{', '.join(missing)} inside", "no such file", cure)


def _refuse_unsafe(archive: Path, member: tarfile.TarInfo, cure: str) -> None:
    path = PurePosixPath(member.name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        found = f"the path {member.name!r}, which leads outside"
    elif not (member.isfile() or member.isdir()):
        found = f"{member.name!r}, a link or device"
    else:
        return
    raise corrupt(archive, "plain files and folders inside the archive", found, cure)


def _chunks(path: Path, cure: str) -> Iterator[bytes]:
    try:
        with _decompressed(path) as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except _BROKEN as error:
        expected = "a whole gzip file" if path.suffix == ".gz" else "a readable file"
        raise _broken(path, expected, error, cure) from error


def _install(
    chunks: Iterator[bytes], file: DataFile, folder: Path, archive: Path, cure: str
) -> None:
    with writing_into(folder), replacing(folder / file.path) as draft:
        write(_checked(chunks, file, f"{archive}, {file.path} in it", cure), draft)


def _checked(chunks: Iterator[bytes], file: DataFile, where: str, cure: str) -> Iterator[bytes]:
    """The chunks themselves, as long as they can be the file's; an error at the end if not."""
    algorithm = file.checksum.partition(":")[0]
    digest = hashlib.new(algorithm, usedforsecurity=False)
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if file.size is not None and size > file.size:
            raise corrupt(where, f"{file.size} bytes", "more", cure)
        digest.update(chunk)
        yield chunk
    found = f"{algorithm}:{digest.hexdigest()}"
    if found != file.checksum:
        raise corrupt(where, file.checksum, f"{found} ({size} bytes)", cure)


def _broken(path: Path, expected: str, error: BaseException, cure: str) -> DataCorrupt:
    return corrupt(path, expected, str(error).rstrip(".") or type(error).__name__, cure)
