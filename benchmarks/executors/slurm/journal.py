"""Files that only grow, a line of JSON at a time, and survive a writer that dies in mid-line."""

import fcntl
import os
from pathlib import Path
from typing import Any

from benchmarks.files import canonical_json, writing


def append(path: Path, value: dict[str, Any]) -> None:
    """Add a line; what a dead writer left of its last one is cut off first.

    Raises:
        CannotWrite: The disk is full or the folder cannot be written; nothing was added.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            whole = file.read().rpartition(b"\n")
            size = len(whole[0]) + len(whole[1])
            file.truncate(size)
            try:
                file.write(canonical_json(value).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(path, size)
                raise
