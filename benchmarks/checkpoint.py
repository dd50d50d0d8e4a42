"""Checkpoints: files that carry their own checksum in their name.

``e0012-s000034-<sha256>.pt`` holds the state after 12 epochs and 34 steps. The file appears whole
or not at all, a damaged one does not fit its name, and nothing in it is ever executed: it is
loaded with ``weights_only=True``. The one before the newest is kept, to fall back on.
"""

import hashlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.errors import UserError
from benchmarks.files import sha256, write_bytes


class Loaded(NamedTuple):
    """A checkpoint read back.

    Attributes:
        state: What was saved; ``None`` if no checkpoint was usable.
        checksum: SHA-256 of the file.
        warnings: What was wrong with newer ones, a line each.
    """

    state: dict[str, Any] | None
    checksum: str
    warnings: list[str]


def save(folder: Path, state: Mapping[str, Any], *, epoch: int, step: int, keep: int = 2) -> str:
    """Write a checkpoint and remove all but the newest ``keep``.

    Returns:
        SHA-256 of the file.

    Raises:
        UserError: The disk is full or the folder cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getvalue()
    checksum = sha256(content)
    write_bytes(folder / f"e{epoch:04d}-s{step:06d}-{checksum}.pt", content)
    for old in _newest_first(folder)[keep:]:
        old.unlink(missing_ok=True)
    return checksum


def load_newest(folder: Path) -> Loaded:
    """The newest checkpoint that is whole, with a warning for each that is not."""
    warnings = []
    for path in _newest_first(folder):
        try:
            state, checksum = load(path)
        except UserError as error:
            warnings.append(str(error))
            continue
        return Loaded(state, checksum, warnings)
    return Loaded(None, "", warnings)


def load(path: Path) -> tuple[dict[str, Any], str]:
    """Read one checkpoint, checking it against the checksum in its name.

    Raises:
        UserError: It is missing, damaged, or holds anything but tensors and plain values.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    expected = path.stem.rpartition("-")[2]
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise UserError(
            f"{path}: damaged checkpoint: SHA-256 {found[:12]}…, expected {expected[:12]}…"
        )
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not a checkpoint of this project, refused") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a checkpoint of this project, refused")
    return state, found


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("e*-s*-*.pt"), key=lambda p: p.name.split("-")[:2], reverse=True)
