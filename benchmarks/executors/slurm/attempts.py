"""What came of the attempts at a run, and whether it is tried again.

A run's folder keeps a line for each attempt's beginning and end. An attempt that has no end died
with its node; whoever finds out what happened adds the end.
"""

import socket
import time
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Literal

from benchmarks.executors.slurm.cluster import Retries
from benchmarks.executors.slurm.journal import append
from benchmarks.files import canonical_json, read_json_lines
from benchmarks.plan import Plan
from benchmarks.settings import Strict
from benchmarks.store import RunFolder, Store

_FILE = "attempts.jsonl"


class Cause(StrEnum):
    """Why an attempt ended."""

    DONE = "done"
    FAILED = "failed"  # the run wrote down why itself
    PREEMPTED = "preempted"
    TIMED_OUT = "timed out"
    NODE_FAILED = "node failed"
    CRASHED = "crashed"
    OUT_OF_MEMORY = "out of memory"
    CANCELLED = "cancelled"
    STOPPED = "stopped"  # by Slurm, which has not said what for
    FORGIVEN = "forgiven"  # no attempt: what came before is not held against the run


class Event(Strict):
    """A beginning or an end.

    Attributes:
        event: Which.
        job: Slurm's id.
        host: Where.
        time: When, in seconds since 1970.
        checkpoint: The newest checkpoint's place; empty if there is none.
        cause: Of an end.
    """

    event: Literal["begun", "ended"]
    job: str
    host: str
    time: float
    checkpoint: str
    cause: Cause | None = None


class Attempts:
    """The attempts at one run, kept in its folder.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.path = folder.path / _FILE

    def read(self) -> list[Event]:
        """All of them, oldest first."""
        return [Event.model_validate_json(canonical_json(e)) for e in read_json_lines(self.path)]

    def begin(self, job: str) -> None:
        """Note a beginning."""
        self._add(event="begun", job=job)

    def end(self, job: str, cause: Cause) -> None:
        """Note an end."""
        self._add(event="ended", job=job, cause=cause)

    def _add(self, **content: Any) -> None:
        event = Event(
            host=socket.gethostname(),
            time=time.time(),
            checkpoint=self._checkpoint(),
            **content,
        )
        append(self.path, event.model_dump(mode="json"))

    def _checkpoint(self) -> str:
        names = sorted(path.name for path in self.folder.checkpoints.glob("e*-s*-*.pt"))
        return names[-1].rpartition("-")[0] if names else ""


def causes(events: Sequence[Event]) -> list[tuple[Cause, bool]]:
    """Why each attempt that is over ended, since the last pardon, and whether it got anywhere.

    An attempt without an end that is followed by another died with its node: a process that dies
    alone is noticed by the one that started it. One that Slurm stopped and then started again was
    preempted.
    """
    found: list[tuple[Cause, bool]] = []
    start: Event | None = None
    stopped: Event | None = None
    for event in events:
        if event.event == "begun":
            if stopped is not None and stopped.job == event.job:
                found.append((Cause.PREEMPTED, True))
            elif start is not None:
                found.append((Cause.NODE_FAILED, event.checkpoint != start.checkpoint))
            start, stopped = event, None
        elif event.cause is Cause.FORGIVEN:
            found, start, stopped = [], None, None
        elif event.cause is Cause.STOPPED:
            start, stopped = None, event
        elif event.cause is not None:
            moved = start is None or event.checkpoint != start.checkpoint
            found.append((event.cause, moved))
            start = stopped = None
    return found


def verdict(events: Sequence[Event], retries: Retries) -> str | None:
    """Why a run is given up, in one line; ``None`` if it goes on."""
    ended = causes(events)
    counts = Counter(cause for cause, _ in ended)
    if counts[Cause.OUT_OF_MEMORY]:
        return "out of memory: Slurm killed the job; ask for more ('memory' in the cluster file)"
    limits = {
        Cause.PREEMPTED: retries.preempted,
        Cause.TIMED_OUT: retries.timed_out,
        Cause.NODE_FAILED: retries.node_failed,
        Cause.CRASHED: retries.crashed,
    }
    for cause, limit in limits.items():
        if counts[cause] > limit:
            times = "once" if counts[cause] == 1 else f"{counts[cause]} times"
            return f"{cause} {times}; the cluster file allows {limit} (retries)"
    idle = 0
    for cause, moved in ended:
        if cause is Cause.TIMED_OUT:
            idle = 0 if moved else idle + 1
    if idle >= retries.idle:
        return (
            f"timed out {idle} times without getting any further: "
            "raise 'time_limit' or 'signal_seconds' in the cluster file"
        )
    return None


def most_at_once(plan: Plan, store: Store, since: float) -> int:
    """Most jobs that were at work on a plan's runs at the same time.

    Args:
        plan: The runs.
        store: Their folders.
        since: Seconds since 1970; what happened before is left out.
    """
    events = [
        (event.time, run.identity, event.job if event.event == "begun" else None)
        for run in plan.runs
        for event in Attempts(store.folder(run)).read()
        if event.time >= since
    ]
    at_work: dict[str, str] = {}  # run → job
    most = 0
    for _, run, job in sorted(events, key=lambda event: event[0]):
        at_work.pop(run, None)
        if job is not None:
            at_work[run] = job
        most = max(most, len(set(at_work.values())))
    return most
