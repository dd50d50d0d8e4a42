"""Checkpoints: whole or refused, never executed, the one before to fall back on."""

import errno
import hashlib
import io
import os
import pickle
from pathlib import Path

import pytest
import torch

from benchmarks import checkpoint
from benchmarks.errors import UserError


def save(folder, epoch, step, **more):
    return checkpoint.save(folder, {"epoch": epoch, "step": step} | more, epoch=epoch, step=step)


def file_of(folder, checksum):
    (path,) = folder.glob(f"*{checksum}.pt")
    return path


def test_what_was_saved_comes_back_bit_for_bit_under_the_files_own_checksum(tmp_path):
    weights = torch.randn(3, 4)
    checksum = save(tmp_path, 1, 2, weights=weights)
    content = file_of(tmp_path, checksum).read_bytes()
    assert hashlib.sha256(content).hexdigest() == checksum
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded.checksum == checksum
    assert loaded.warnings == []
    assert torch.equal(loaded.state["weights"], weights)


def test_the_newest_two_are_kept_counting_as_numbers_do(tmp_path):
    for epoch, step in [(9998, 5), (9999, 999_999), (9999, 1_000_000), (10_000, 0), (10_001, 3)]:
        save(tmp_path, epoch, step)
    assert checkpoint.load_newest(tmp_path).state == {"epoch": 10_001, "step": 3}
    kept = [path.name.split("-")[0] for path in tmp_path.iterdir()]
    assert sorted(kept) == ["e10000", "e10001"]


@pytest.mark.parametrize("damage", ["cut", "empty", "bit"])
def test_a_damaged_one_is_named_and_the_one_before_serves(tmp_path, damage):
    save(tmp_path, 1, 0)
    path = file_of(tmp_path, save(tmp_path, 2, 0))
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[: {"cut": len(content) // 2, "empty": 0, "bit": None}[damage]])
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded.state == {"epoch": 1, "step": 0}
    (warning,) = loaded.warnings
    assert warning.startswith(f"{path}: damaged checkpoint")


def test_saving_after_a_fall_back_removes_the_damaged_one_not_the_good_one(tmp_path):
    save(tmp_path, 1, 0)
    damaged = file_of(tmp_path, save(tmp_path, 3, 0))
    damaged.write_bytes(b"")
    save(tmp_path, 2, 0)
    assert not damaged.exists()
    assert [checkpoint.load(p)[0]["epoch"] for p in sorted(tmp_path.iterdir())] == [1, 2]


def test_of_two_at_the_same_place_the_one_just_written_stays(tmp_path):
    for attempt in range(8):
        checksum = checkpoint.save(tmp_path, {"attempt": attempt}, epoch=3, step=0, keep=1)
        assert checkpoint.load_newest(tmp_path).checksum == checksum


def test_with_none_whole_nothing_is_loaded(tmp_path):
    assert checkpoint.load_newest(tmp_path / "absent") == (None, "", [])
    file_of(tmp_path, save(tmp_path, 1, 0)).write_bytes(b"x")
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded.state is None
    assert len(loaded.warnings) == 1


class Malice:
    """Creates a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_malicious_pickle_under_its_right_checksum_is_refused_unexecuted(tmp_path, form):
    target = tmp_path / "executed"
    folder = tmp_path / "checkpoints"
    save(folder, 1, 0)
    buffer = io.BytesIO()
    if form == "torch":
        torch.save({"trainer": Malice(target)}, buffer)
    else:
        pickle.dump({"trainer": Malice(target)}, buffer, protocol=2)
    content = buffer.getvalue()
    name = f"e0002-s000000-{hashlib.sha256(content).hexdigest()}.pt"
    (folder / name).write_bytes(content)
    loaded = checkpoint.load_newest(folder)
    assert not target.exists()
    assert loaded.state == {"epoch": 1, "step": 0}
    assert "refused" in loaded.warnings[0]
    pickle.loads(pickle.dumps(Malice(target)))
    assert target.exists()  # it would have been


def test_any_other_content_is_refused(tmp_path):
    for content in (b"", b"garbage", torch_bytes([1, 2])):
        path = tmp_path / f"e0001-s000000-{hashlib.sha256(content).hexdigest()}.pt"
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a checkpoint of this project"):
            checkpoint.load(path)


def torch_bytes(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_earlier_one_and_nothing_half_written(tmp_path, monkeypatch, call):
    checksum = save(tmp_path, 1, 0)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match="no space left to write; free some and run again"):
        save(tmp_path, 2, 0)
    assert list(tmp_path.iterdir()) == [file_of(tmp_path, checksum)]


def test_drafts_of_a_killed_process_do_not_pile_up(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        patch.setattr(Path, "unlink", killed)  # a killed process cleans nothing up
        with pytest.raises(Killed):
            save(tmp_path, 1, 0)
    assert len(list(tmp_path.iterdir())) == 1
    assert checkpoint.load_newest(tmp_path).state is None
    path = file_of(tmp_path, save(tmp_path, 1, 0))
    assert list(tmp_path.iterdir()) == [path]
