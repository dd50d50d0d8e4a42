"""Files on disk: held against checksums, written whole or not at all, one writer at a time."""

import errno
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pof.errors import DataCorrupt, PofError

_log = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def corrupt(path: Path | str, expected: str, found: str, cure: str) -> DataCorrupt:
    """The one line that a user reads about a data file that is not what it should be."""
    return DataCorrupt(f"{path}: expected {expected}, found {found}; {cure}")


def checksum(path: Path, algorithm: str) -> str:
    """The file's checksum as "ALGORITHM:HEX".

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False))
    return f"{algorithm}:{digest.hexdigest()}"


def verify(path: Path, expected: str, cure: str, size: int | None = None) -> None:
    """Hold a file against its checksum, and first against its size where that is known.

    Raises:
        DataCorrupt: It differs or cannot be read.
    """
    try:
        actual_size = path.stat().st_size
        if size is not None and actual_size != size:
            raise corrupt(path, f"{size} bytes ({expected})", f"{actual_size} bytes", cure)
        found = checksum(path, expected.partition(":")[0])
    except OSError as error:
        raise corrupt(path, expected, f"an unreadable file ({error.strerror})", cure) from error
    if found != expected:
        raise corrupt(path, expected, f"{found} ({actual_size} bytes)", cure)


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Turn what goes wrong with the disk into one line.

    Raises:
        PofError: The disk is full, or the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            cure = "make room there, or name another data folder"
        else:
            cure = "make it writable, or name another data folder"
        reason = error.strerror or str(error)
        raise PofError(f"{folder}: data cannot be written here ({reason}); {cure}") from error


def require_room(folder: Path, size: int) -> None:
    """Stop before a long transfer that would end with a full disk.

    Raises:
        PofError: The disk has no room for so many bytes.
    """
    with writing_into(folder):
        free = shutil.disk_usage(folder).free
    if free < size:
        raise PofError(
            f"{folder}: data needs {size / 1e6:.0f} MB here, {free / 1e6:.0f} MB are free; "
            "make room there, or name another data folder"
        )


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to; renamed to `target` if the block ends well.

    Raises:
        OSError: The disk is full, or the folder cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield draft
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def write(chunks: Iterable[bytes], path: Path) -> None:
    """Write a new file and wait until it is on the disk.

    Raises:
        OSError: It cannot be written.
    """
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def exclusive(folder: Path, name: str) -> Iterator[None]:
    """Let one process at a time in; a second waits until the first is done.

    Where the file system has no locks all go on: every file is renamed in place whole and
    verified, so that costs work done twice, never a broken file.

    Raises:
        PofError: The folder cannot be written.
    """
    with writing_into(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f".{name}.lock").open("w")
    with lock:
        with writing_into(folder):
            try:
                _acquire(lock, folder)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
        yield


def _acquire(lock: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _log.info("waiting for another process that is writing data into %s", folder)
        fcntl.flock(lock, fcntl.LOCK_EX)
