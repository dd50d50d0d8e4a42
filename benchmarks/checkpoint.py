"""Checkpoints: files that carry their own checksum in their name.

``e0012-s000034-<sha256>.pt`` holds the state after 12 epochs and 34 steps. The file appears whole
or not at all, a damaged one does not fit its name, and nothing in it is ever executed: it is
loaded with ``weights_only=True``. The one before the newest is kept, to fall back on.
"""

import hashlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.errors import UserError
from benchmarks.files import remove_drafts, sha256, write_bytes, writing

_NAME = re.compile(r"e(\d+)-s(\d+)-[0-9a-f]+\.pt")


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
    """Write a checkpoint and remove all but it and the ``keep - 1`` before it.

    Any that claims to be of the same place or further on is damaged, or it would have been
    continued from, and goes too.

    Returns:
        SHA-256 of the file.

    Raises:
        UserError: The disk is full or the folder cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(_alone(dict(state)), buffer)
    content = buffer.getvalue()
    checksum = sha256(content)
    written = folder / f"e{epoch:04d}-s{step:06d}-{checksum}.pt"
    write_bytes(written, content)
    before = [path for path in _newest_first(folder) if _place(path) < (epoch, step)]
    kept = {written, *before[: keep - 1]}
    with writing(folder):
        for path in _newest_first(folder):
            if path not in kept:
                path.unlink(missing_ok=True)
        remove_drafts(folder)
    return checksum


def _alone(state: Any) -> Any:
    """The state with tensors that are views copied: torch saves all that a view looks into."""
    if isinstance(state, dict):
        return {key: _alone(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_alone(value) for value in state]
    if isinstance(state, tuple):
        return tuple(_alone(value) for value in state)
    if isinstance(state, torch.Tensor) and state.untyped_storage().nbytes() > state.nbytes:
        return state.clone()
    return state


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
    except Exception as error:  # whatever a made-up file provokes
        raise UserError(f"{path}: not a checkpoint of this project, refused") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a checkpoint of this project, refused")
    return state, found


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("*.pt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_place, reverse=True)


def _place(path: Path) -> tuple[int, int]:
    """Epoch and step of a checkpoint's name."""
    epoch, step, _ = path.name.split("-")
    return int(epoch[1:]), int(step[1:])
