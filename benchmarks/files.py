"""Small files on disk: written whole or not at all, read with one clear line when broken."""

import errno
import fcntl
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.errors import UserError

_DRAFT = ".draft-"


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256(text: str | bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


class CannotWrite(UserError):
    """The disk is full or the folder cannot be written: no fault of what was to be written."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk or a folder that cannot be written into one clear line.

    Raises:
        CannotWrite: Whatever the operating system refused.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CannotWrite(f"{path}: no space left to write; free some and run again") from error
        raise CannotWrite(f"{path}: cannot be written ({error.strerror or error})") from error


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replace ``path`` by ``content`` in one step, whole or not at all.

    Args:
        path: Its folder is made if need be.
        content: All of the file.
        durable: Whether it must survive a power cut (which waits for the disk).

    Raises:
        UserError: The disk is full or the folder cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=_DRAFT)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """A file to be written that takes its place under its name only when it is whole.

    Raises:
        CannotWrite: The disk is full or the folder cannot be written.
    """
    draft = path.with_name(f"{_DRAFT}{path.name}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def remove_drafts(folder: Path) -> None:
    """Remove what a process killed in the middle of ``write_bytes`` left in its folder.

    Only for a folder in which nobody else writes.
    """
    for draft in folder.glob(f"{_DRAFT}*"):
        draft.unlink(missing_ok=True)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Let in one process at a time; the others wait.

    Args:
        path: The lock's file, which stays.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with writing(path):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """``write_bytes`` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write indented JSON with sorted keys, so that equal values are equal bytes."""
    text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n"
    write_bytes(path, text.encode(), durable=durable)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: The file is missing, unreadable or no JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file; a last line cut off by a crash is left out."""
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0]
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise UserError(f"{path}: a line is no JSON ({error})") from error


def finite(value: float) -> float | None:
    """A number for a file. JSON has no NaN or infinity: a number that does not exist is null."""
    return value if math.isfinite(value) else None
