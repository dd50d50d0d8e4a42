"""Run folders on disk: what each holds, what state it is in, and who may work in it.

The folder is the truth: a state is read from it and kept nowhere else.
"""

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from benchmarks.errors import UserError
from benchmarks.files import (
    canonical_json,
    read_json,
    read_json_lines,
    remove_drafts,
    sha256,
    write_bytes,
    write_json,
    write_text,
    writing,
)
from benchmarks.plan import Plan
from benchmarks.run import SCHEMA, Run
from benchmarks.settings import explain

COMMITTED = ("config.json", "environment.json", "metrics.jsonl", "result.json")
MEASUREMENTS = "measurements"


# What a sign of life holds at least.
PROGRESS = frozenset({"epoch", "step", "steps", "images_per_second", "latest"})


class State(StrEnum):
    """Where a run stands."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"  # somebody holds its lock
    INTERRUPTED = "INTERRUPTED"  # begun, nobody is at it: it continues from its checkpoint
    DONE = "DONE"
    FAILED = "FAILED"
    BLOCKED = "BLOCKED"  # its parent failed
    UNAVAILABLE = "UNAVAILABLE"  # its data could not be had


class Busy(UserError):
    """Another process works on the run."""


class RunFolder:
    """The folder of one run.

    Args:
        path: Where it is, or will be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"

    def create(self, run: Run) -> None:
        """Make the folder and write down what the run is. Idempotent; for the lock's holder."""
        remove_drafts(self.path)
        config = {
            "schema": SCHEMA,
            "identity": run.identity,
            "run": run.model_dump(mode="json"),
        }
        path = self.path / "config.json"
        if not path.exists() or read_json(path) != config:
            write_json(path, config)

    def run(self) -> Run:
        """The run of this folder.

        Raises:
            UserError: The configuration is of another version or does not fit its identity.
        """
        path = self.path / "config.json"
        config = read_json(path)
        if config.get("schema") != SCHEMA:
            raise UserError(f"{path}: schema version {config.get('schema')}, expected {SCHEMA}")
        try:
            run = Run.model_validate_json(json.dumps(config.get("run")))
        except ValidationError as error:
            raise UserError(f"{path}: {explain(error)}") from error
        if run.identity != config.get("identity"):
            raise UserError(f"{path}: settings and identity do not fit: the file was edited")
        return run

    def state(self) -> State:
        """The run's state as the folder shows it (parents and data aside)."""
        state = self.state_of_files()
        return State.RUNNING if state is not State.DONE and self._locked() else state

    def state_of_files(self) -> State:
        """The state when nobody is at work."""
        if (self.path / "result.json").exists():
            return State.DONE
        if (self.path / "failure.json").exists():
            return State.FAILED
        begun = self.checkpoints.is_dir() or (self.path / "progress.json").exists()
        return State.INTERRUPTED if begun else State.PENDING

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run; the lock goes with the process, however it ends.

        Raises:
            Busy: Another process holds it.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with writing(self.path), _locking(self.path):
                free = _try_lock(handle)
            if not free:
                raise Busy(f"{self.path.name}: another process is training this run")
            try:
                yield
            finally:
                # Said aloud: a child forked meanwhile has the handle too, and would hold on to it.
                fcntl.flock(handle, fcntl.LOCK_UN)
        finally:
            os.close(handle)

    def _locked(self) -> bool:
        try:
            handle = os.open(self.path / "lock", os.O_RDONLY)
        except OSError:
            return False
        try:
            with _locking(self.path):
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False

    # What a run writes

    def add_environment(self, environment: dict[str, Any], *, epoch: int, step: int) -> None:
        """Note where the run is being trained from ``epoch`` and ``step`` on.

        A run that stays in one environment has one segment, however often it was continued.
        """
        path = self.path / "environment.json"
        segments = read_json(path)["segments"] if path.exists() else []
        segments = [s for s in segments if (s["epoch"], s["step"]) < (epoch, step)]
        if not segments or segments[-1]["environment"] != environment:
            segments.append({"epoch": epoch, "step": step, "environment": environment})
        write_json(path, {"segments": segments})

    def environments(self) -> list[dict[str, Any]]:
        """Where the run was trained: one entry, or more where it moved.

        Raises:
            UserError: It is not on record.
        """
        path = self.path / "environment.json"
        try:
            return [segment["environment"] for segment in read_json(path)["segments"]]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: not a record of environments") from error

    def metrics(self) -> list[dict[str, Any]]:
        """One record an epoch."""
        return read_json_lines(self.path / "metrics.jsonl")

    def keep_metrics(self, epochs: int) -> list[dict[str, Any]]:
        """Drop the records of epochs after ``epochs``: they will be trained again."""
        kept = [record for record in self.metrics() if record["epoch"] <= epochs]
        write_text(self.path / "metrics.jsonl", "".join(canonical_json(r) + "\n" for r in kept))
        return kept

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one epoch's record; on the disk before any checkpoint that comes after it."""
        with writing(self.path), (self.path / "metrics.jsonl").open("a") as file:
            file.write(canonical_json(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def progress(self) -> dict[str, Any]:
        """The latest sign of life; empty if there is none that can be read."""
        try:
            progress = read_json(self.path / "progress.json")
        except UserError:  # not yet there, or cut off by a power failure: a new one comes soon
            return {}
        return progress if progress.keys() >= PROGRESS else {}

    def write_progress(self, progress: dict[str, Any]) -> None:
        """Leave a sign of life."""
        write_json(self.path / "progress.json", progress, durable=False)

    def measurements(self) -> list[Path]:
        """What was measured on the finished run's network, a file each."""
        return sorted((self.path / MEASUREMENTS).glob("*.json"))

    def result(self) -> dict[str, Any]:
        """The result of a finished run.

        Raises:
            UserError: There is none, or a number in it was edited.
        """
        path = self.path / "result.json"
        result = read_json(path)
        content = {key: value for key, value in result.items() if key != "digest"}
        if result.get("digest") != sha256(canonical_json(content)):
            raise UserError(f"{path}: its digest does not fit: the file was edited or damaged")
        return result

    def write_result(self, result: dict[str, Any]) -> None:
        """Finish the run."""
        write_json(self.path / "result.json", result | {"digest": sha256(canonical_json(result))})
        (self.path / "failure.json").unlink(missing_ok=True)

    def failure(self) -> dict[str, Any]:
        """Why the run failed: ``reason`` and ``traceback``; empty if it did not."""
        path = self.path / "failure.json"
        return {"reason": "unknown"} | read_json(path) if path.exists() else {}

    def write_failure(self, reason: str, traceback: str) -> None:
        """Mark the run as failed."""
        write_json(self.path / "failure.json", {"reason": reason, "traceback": traceback})

    def retry(self) -> None:
        """Let a failed run be tried again; the failure stays on record under another name."""
        failure = self.path / "failure.json"
        if failure.exists():
            failure.rename(self.path / f"failure-{len(self.earlier_failures()) + 1}.json")

    def earlier_failures(self) -> list[str]:
        """Reasons of the failures before ``retry``, oldest first."""
        return [read_json(p)["reason"] for p in sorted(self.path.glob("failure-*.json"))]


@contextmanager
def _locking(path: Path) -> Iterator[None]:
    """Say in one line that a file system has no locks, which some clusters' need to be asked for.

    Raises:
        UserError: Locks are not supported.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise UserError(
                f"{path}: this file system has no file locks (flock), without which two processes "
                "could train one run; mount it with them (Lustre: -o flock) or choose another "
                "RUNS_DIR"
            ) from error
        raise


def _try_lock(handle: int) -> bool:
    """Take the lock; a moment's patience, since whoever asks for the state holds it briefly."""
    for _ in range(20):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05)
    return False


class Store:
    """A folder of run folders. Profiles that ask for the same run share it.

    Args:
        root: ``RUNS_DIR``, or ``results/<profile>/runs``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, run: Run) -> RunFolder:
        """The folder of a run."""
        return RunFolder(self.root / run.name)

    def states(self, plan: Plan) -> dict[str, State]:
        """The state of every run of a plan, by identity; children of a failed run are BLOCKED."""
        states: dict[str, State] = {}
        for run in plan.runs:
            state = self.folder(run).state()
            parent = states.get(run.parent or "")
            stuck = parent in (State.FAILED, State.BLOCKED)
            unstarted = state in (State.PENDING, State.INTERRUPTED)
            states[run.identity] = State.BLOCKED if stuck and unstarted else state
        return states

    def publish(self, plan: Plan, target: "Store") -> None:
        """Copy the small files of every finished or failed run; remove runs not in the plan.

        Raises:
            UserError: A file of a run is missing, or the target cannot be written.
        """
        wanted = {run.name for run in plan.runs}
        with writing(target.root):
            for stale in _folders(target.root):
                if stale.name not in wanted:
                    shutil.rmtree(stale)
            for run in plan.runs:
                self._publish(self.folder(run), target.folder(run))

    def _publish(self, source: RunFolder, copy: RunFolder) -> None:
        files = {State.DONE: COMMITTED, State.FAILED: ("config.json", "failure.json")}
        names = list(files.get(source.state(), ()))
        if "result.json" in names:
            names += [f"{MEASUREMENTS}/{path.name}" for path in source.measurements()]
        for name in names:
            try:
                content = (source.path / name).read_bytes()
            except FileNotFoundError:
                raise UserError(
                    f"{source.path / name}: missing; remove its folder to train the run anew"
                ) from None
            target = copy.path / name
            if not target.exists() or target.read_bytes() != content:
                write_bytes(target, content)
        for extra in [*_files(copy.path), *copy.measurements()]:
            if str(extra.relative_to(copy.path)) not in names:
                extra.unlink()
        if not names and copy.path.exists():
            shutil.rmtree(copy.path)


def _folders(path: Path) -> Iterable[Path]:
    return [p for p in path.iterdir() if p.is_dir()] if path.is_dir() else []


def _files(path: Path) -> Iterable[Path]:
    return [p for p in path.iterdir() if p.is_file()] if path.is_dir() else []
