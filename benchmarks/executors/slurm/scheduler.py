"""Talks to Slurm: one query for all jobs at once, at a bounded rate, and never in a hurry.

An answer that does not come is no answer: from a controller that is away nothing is concluded.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.errors import UserError
from benchmarks.executors.slurm.arrays import Array
from benchmarks.executors.slurm.cluster import Cluster

_ROOT = Path(__file__).resolve().parents[3]
_QUERY_SECONDS = 60.0
_AWAY = ("Unable to contact", "Socket timed out", "Connection refused", "connect failure",
         "Zero Bytes were transmitted", "Transport endpoint", "Resource temporarily",
         "send/recv operation", "I/O error")  # fmt: skip
_ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "REVOKED", "TIMEOUT",
}  # fmt: skip


class Away(Exception):
    """The controller does not answer; it may do so later."""


@dataclass(frozen=True)
class Job:
    """A job, or a task of an array, as Slurm shows it.

    Attributes:
        id: ``12`` or ``12_3``.
        name: As submitted.
        state: Slurm's word.
        reason: Why it waits, in Slurm's word.
    """

    id: str
    name: str
    state: str
    reason: str = ""

    @property
    def active(self) -> bool:
        """Whether it waits, runs or is about to end."""
        return self.state not in _ENDED

    @property
    def hopeless(self) -> bool:
        """Whether it waits for something that cannot come."""
        return self.state == "PENDING" and self.reason == "DependencyNeverSatisfied"


@dataclass(frozen=True)
class Queue:
    """An answer of Slurm's.

    Attributes:
        jobs: The user's jobs by id, recent ones that ended among them.
        time: When it was asked for, in seconds since 1970.
    """

    jobs: dict[str, Job]
    time: float


class Scheduler(Protocol):
    """What the launcher needs of Slurm."""

    def queue(self) -> Queue | None:
        """The latest answer, the same object until Slurm was asked again; ``None``: it is away."""

    def ended(self, ids: Sequence[str]) -> dict[str, str]:
        """The final states of jobs that are gone, where the accounts are kept and tell."""

    def submit(self, array: Array, name: str, calls: Sequence[Any], after: str | None) -> str:
        """Submit an array of calls; returns its id.

        Raises:
            Away: It is not known whether that worked.
            UserError: Slurm refused.
        """

    def cancel(self, name: str, ids: Iterable[str]) -> bool:
        """Cancel jobs that have this name and one of these ids; whether Slurm took the order."""

    def max_array_size(self) -> int:
        """Most tasks of an array."""


class Slurm:
    """The real one.

    Args:
        cluster: What jobs ask for.
        folder: For the jobs' scripts and logs.
        clock: Monotonic seconds.
    """

    def __init__(
        self, cluster: Cluster, folder: Path, clock: Callable[[], float] = time.monotonic
    ) -> None:
        missing = [name for name in ("sbatch", "squeue", "srun") if shutil.which(name) is None]
        if missing:
            raise UserError(
                f"no {missing[0]} here: EXECUTOR=slurm needs Slurm's commands; "
                "run it on the cluster's login node"
            )
        self.cluster = cluster
        self.folder = folder
        self._clock = clock
        self._asked = -float("inf")
        self._queue: Queue | None = None

    def queue(self) -> Queue | None:
        """See ``Scheduler``."""
        if self._clock() - self._asked >= self.cluster.polling.queue_seconds:
            self._asked = self._clock()
            query = ["--states=all", "--array", "--noheader", "--format=%i|%j|%T|%r"]
            now = time.time()
            output = _output(["squeue", f"--user={os.getuid()}", *query])
            self._queue = None if output is None else Queue(_read_queue(output), now)
        return self._queue

    def ended(self, ids: Sequence[str]) -> dict[str, str]:
        """See ``Scheduler``."""
        arrays = sorted({job.partition("_")[0] for job in ids})
        query = ["--allocations", "--noheader", "--parsable2", "--format=JobID,State"]
        output = _output(["sacct", f"--jobs={','.join(arrays)}", *query])
        states = dict(line.split("|", 1) for line in (output or "").splitlines() if "|" in line)
        return {job: states[job].partition(" ")[0] for job in ids if job in states}

    def submit(self, array: Array, name: str, calls: Sequence[Any], after: str | None) -> str:
        """See ``Scheduler``."""
        import submitit  # slow to load, and needed for this alone

        cluster, wanted = self.cluster, array.resources
        executor = submitit.SlurmExecutor(
            self.folder / "%A", python=shlex.quote(cluster.python or sys.executable)
        )
        options: dict[str, Any] = {"requeue": True, "chdir": str(_ROOT)}
        if after is not None:
            options["kill-on-invalid-dep"] = "yes"
        executor.update_parameters(
            job_name=name,
            partition=wanted.partition,
            account=wanted.account,
            qos=wanted.qos,
            gres=wanted.gres,
            constraint=wanted.constraint,
            time=wanted.minutes,
            mem=wanted.memory,
            nodes=1,
            ntasks_per_node=1,
            cpus_per_task=wanted.cpus,
            array_parallelism=wanted.array_throttle,
            signal_delay_s=wanted.signal_seconds,
            dependency=after,
            setup=[_export(name, value) for name, value in cluster.environment.items()]
            + cluster.setup,
            # Since Slurm 22.05 srun does not take over --cpus-per-task by itself.
            srun_args=[f"--cpus-per-task={wanted.cpus}"],
            wckey=None,
            additional_parameters=options | wanted.sbatch,
        )
        try:
            jobs = executor.map_array(_call, calls)
        except submitit.core.utils.FailedJobError as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or ["no reason"]
            if any(word in str(error) for word in _AWAY):
                raise Away(lines[-1]) from error
            raise UserError(f"sbatch refused: {lines[-1].removeprefix('sbatch: ')}") from error
        return jobs[0].job_id.partition("_")[0]

    def cancel(self, name: str, ids: Iterable[str]) -> bool:
        """See ``Scheduler``."""
        done = _run(["scancel", "--quiet", f"--name={name}", *ids])
        # A job that has ended meanwhile is an error to scancel, and none to us.
        return done is not None and not any(word in done.stderr for word in _AWAY)

    def max_array_size(self) -> int:
        """See ``Scheduler``."""
        if self.cluster.max_array_size is not None:
            return self.cluster.max_array_size
        found = re.search(
            r"MaxArraySize\s*=\s*(\d+)", _output(["scontrol", "show", "config"]) or ""
        )
        if found is None:
            raise Away("scontrol did not say MaxArraySize")
        return max(1, int(found[1]))


def _call(call: Callable[[], None]) -> None:
    call()


def _export(name: str, value: str) -> str:
    return f"export {name}={shlex.quote(value)}"


def _read_queue(output: str) -> dict[str, Job]:
    rows = [line.strip().split("|") for line in output.splitlines()]
    return {row[0]: Job(*row) for row in rows if len(row) == 4}


def _output(command: list[str]) -> str | None:
    """What a command says; ``None`` if it failed or did not come back."""
    done = _run(command)
    return done.stdout if done is not None and done.returncode == 0 else None


def _run(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    """A command's outcome; ``None`` if it could not be run or did not come back."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_QUERY_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def requeue_self() -> bool:
    """Put the job this process runs in back into the queue."""
    return _output(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]]) is not None


def own_state() -> tuple[str, bool] | None:
    """The state of the job this process runs in, and whether Slurm is preempting it."""
    output = _output(["scontrol", "show", "job", "--oneliner", os.environ["SLURM_JOB_ID"]])
    if output is None:
        return None
    fields = dict(word.partition("=")[::2] for word in output.split())
    preempted = fields.get("PreemptTime", "None") not in ("None", "N/A", "")
    return fields.get("JobState", ""), preempted
