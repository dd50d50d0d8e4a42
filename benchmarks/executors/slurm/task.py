"""What a job does: carries out its runs, a worker process each, until they end or it must go.

When Slurm says that the job's time is up, every run leaves a checkpoint and the job goes back
into the queue. submitit's own handling of signals is not used: it takes every job shorter than
ten minutes for timed out, and saves nothing between.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks import plan as planning
from benchmarks.errors import UserError
from benchmarks.executors.slurm import scheduler
from benchmarks.executors.slurm.attempts import Attempts, Cause, verdict
from benchmarks.executors.slurm.cluster import Retries
from benchmarks.files import CannotWrite, writing
from benchmarks.run import Run
from benchmarks.store import Busy, RunFolder, State, Store

LOG = "worker.log"
_RESERVE = ".reserve"
_BUSY_SECONDS = 2.0
_CONTROLLER_SECONDS = 60.0
_SHARED_SECONDS = 60.0
_TAIL = 40  # lines


@dataclass(frozen=True)
class Order:
    """What one job is to do; called by submitit.

    Attributes:
        runs: Identities.
        runs_dir: Where the run folders are.
        plan_file: The plan they belong to.
        data_dir: Where data sets are.
        device: What computes.
        cpus: Cores of the job.
        minutes: Its time limit.
        signal_seconds: How long before it the job is told.
        retries: Bounds, as ``Retries`` has them.
        command: Starts a worker process.
    """

    runs: tuple[str, ...]
    runs_dir: Path
    plan_file: Path
    data_dir: Path
    device: str
    cpus: int
    minutes: int
    signal_seconds: int
    retries: dict[str, int]
    command: tuple[str, ...] = ("-m", "benchmarks", "work")

    def __call__(self) -> None:
        """Work. The exit status tells Slurm whether jobs that depend on this one may start."""
        # SystemExit passes through submitit, which then writes no pickle of a result.
        sys.exit(_Task(self).work())


class _Seat:
    """One run of the job and the worker process at it."""

    def __init__(self, run: Run, folder: RunFolder) -> None:
        self.run = run
        self.folder = folder
        self.attempts = Attempts(folder)
        self.process: subprocess.Popen[bytes] | None = None
        self.begun = False
        self.log_began = 0
        self.again_at = 0.0
        self.over = False

    def tail(self) -> str:
        """The end of what the latest worker said."""
        with suppress(OSError), (self.folder.path / LOG).open("rb") as log:
            log.seek(self.log_began)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-_TAIL:])
        return ""


class _Task:
    def __init__(self, order: Order) -> None:
        self.order = order
        self.began = time.monotonic()
        self.signals: list[int] = []
        self.job = job_id()
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, lambda received, _: self.signals.append(received))
        self.retries = Retries(**order.retries)
        self.selector = selectors.DefaultSelector()
        self.told = False
        store = Store(order.runs_dir)
        self.plan = planning.read(order.plan_file) if order.runs else None
        runs = self.plan.by_identity() if self.plan else {}
        self.parents = {
            name: store.folder(runs[runs[name].parent or ""])
            for name in order.runs
            if runs[name].parent is not None
        }
        self.seats = [_Seat(runs[name], store.folder(runs[name])) for name in order.runs]

    def work(self) -> int:
        """Carry out every run; returns the exit status."""
        while not all(seat.over for seat in self.seats):
            if not self.signals:
                for seat in self.seats:
                    self._start(seat)
            elif not self.told:
                self._stop()
            for key, _ in self.selector.select(timeout=0.2):
                self._hear(key.data)
        if self.signals and not all(_is_final(seat) for seat in self.seats):
            return self._leave()
        # One run that goes on is enough for the jobs behind: each looks at its own parent.
        fine = any(seat.folder.state_of_files() is State.DONE for seat in self.seats)
        return 0 if fine or not self.seats else 1

    def _start(self, seat: _Seat) -> None:
        """Start a worker at a run, unless it is at one, or must wait, or need not start."""
        if seat.over or seat.process is not None or time.monotonic() < seat.again_at:
            return
        state = seat.folder.state()
        if state is State.RUNNING:  # by a process that Slurm lost sight of
            seat.again_at = time.monotonic() + _BUSY_SECONDS
            return
        parent = self.parents.get(seat.run.identity)
        if state in (State.DONE, State.FAILED):
            seat.over = True
        elif parent is not None and parent.state_of_files() is not State.DONE:
            # A shared file system may show late what another node has written.
            late = time.monotonic() - self.began < _SHARED_SECONDS
            if late and parent.state_of_files() is not State.FAILED:
                seat.again_at = time.monotonic() + _BUSY_SECONDS
                return
            _say(f"{seat.run.name}: not started, since its parent is not done")
            seat.over = True
        else:
            try:
                self._spawn(seat)
            except CannotWrite as error:
                self._fail(seat, str(error), "")

    def _spawn(self, seat: _Seat) -> None:
        reason = verdict(seat.attempts.read(), self.retries)
        if reason is not None:
            self._fail(seat, reason, seat.tail())
            return
        reserve(seat.folder)
        if not seat.begun:
            seat.attempts.begin(self.job)
            seat.begun = True
        order, threads = self.order, max(1, self.order.cpus // len(self.seats))
        arguments = [
            *("--runs-dir", str(order.runs_dir), "--plan-file", str(order.plan_file)),
            *("--data-dir", str(order.data_dir), "--device", order.device),
        ]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "PYTHONFAULTHANDLER": "1",
        }
        with writing(seat.folder.path), (seat.folder.path / LOG).open("ab") as log:
            seat.log_began = log.tell()
            seat.process = subprocess.Popen(
                [sys.executable, *order.command, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,
                preexec_fn=_ignore_warnings,
            )
        assert seat.process.stdin is not None
        assert seat.process.stdout is not None
        with suppress(BrokenPipeError):
            seat.process.stdin.write(seat.run.identity.encode() + b"\n")
            seat.process.stdin.close()
        self.selector.register(seat.process.stdout, selectors.EVENT_READ, seat)

    def _hear(self, seat: _Seat) -> None:
        """A worker says how its run ended, or nothing: it is gone."""
        process = seat.process
        assert process is not None
        assert process.stdout is not None
        line = process.stdout.readline()
        self.selector.unregister(process.stdout)
        process.stdout.close()
        code = process.wait()
        seat.process = None
        answer = json.loads(line) if line.endswith(b"\n") else {"ending": "GONE", "reason": ""}
        ending = answer["ending"]
        if ending == "BUSY":
            seat.again_at = time.monotonic() + _BUSY_SECONDS
        elif ending == "DONE":
            self._end(seat, Cause.DONE)
        elif ending == "FAILED":
            self._fail(seat, answer["reason"], seat.tail())
        elif self.signals:
            seat.over = True
        else:
            self._crashed(seat, code)

    def _crashed(self, seat: _Seat, code: int) -> None:
        """A worker died, or stopped without being told to: once more, a bounded number of times."""
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        _say(f"{seat.run.name}: the worker process {how}")
        try:
            seat.attempts.end(self.job, Cause.CRASHED)
            seat.begun = False
            reason = verdict(seat.attempts.read(), self.retries)
        except UserError as error:
            reason = str(error)
        if reason is not None:
            killed = " (out of memory?)" if code == -signal.SIGKILL else ""
            self._fail(seat, f"the worker process {how}{killed}: {reason}", seat.tail())

    def _end(self, seat: _Seat, cause: Cause) -> None:
        seat.over = True
        with suppress(UserError):  # a record for people: the state of the run stands elsewhere
            if seat.begun:
                seat.attempts.end(self.job, cause)
                seat.begun = False
        release(seat.folder)

    def _fail(self, seat: _Seat, reason: str, trace: str) -> None:
        """See to it that a failed run says so, on a full disk too."""
        _say(f"{seat.run.name}: {reason}")
        release(seat.folder)
        try:
            write_failure(seat.run, seat.folder, reason, trace)
        except Busy:
            seat.again_at = time.monotonic() + _BUSY_SECONDS
            return
        except UserError as error:
            _say(f"{seat.run.name}: {error}")
        self._end(seat, Cause.FAILED)

    def _stop(self) -> None:
        """Tell every worker to leave a checkpoint and go."""
        self.told = True
        _say(f"{signal.Signals(self.signals[0]).name}: leaving checkpoints")
        for seat in self.seats:
            if seat.process is not None:
                seat.process.terminate()
            else:
                seat.over = True

    def _leave(self) -> int:
        """Note why the runs stopped, and go back into the queue unless Slurm decided already."""
        found = None
        deadline = time.monotonic() + _CONTROLLER_SECONDS
        while found is None and time.monotonic() < deadline:
            found = scheduler.own_state()
            if found is None:
                time.sleep(2.0)
        state, preempted = found or ("", False)
        cause = Cause.STOPPED
        if state == "RUNNING":
            cause = Cause.PREEMPTED if preempted or not self._near_end() else Cause.TIMED_OUT
        for seat in self.seats:
            if seat.begun:
                self._end(seat, cause)
        if state == "RUNNING" and scheduler.requeue_self():
            _say(f"{cause}: back in the queue")
        return 1

    def _near_end(self) -> bool:
        """Whether it can be the time limit: Slurm tells up to a minute before it was asked to."""
        if signal.SIGUSR2 not in self.signals:
            return False
        early = self.order.signal_seconds + 65
        return time.monotonic() - self.began > 60 * self.order.minutes - early


def job_id() -> str:
    """The id of the job or array task this process runs in, as squeue shows it."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def write_failure(run: Run, folder: RunFolder, reason: str, trace: str) -> None:
    """Mark a run as failed, unless it ended meanwhile.

    Raises:
        Busy: Somebody is training it.
        UserError: The folder cannot be written.
    """
    with folder.lock():
        if folder.state_of_files() not in (State.DONE, State.FAILED):
            folder.create(run)
            folder.write_failure(reason, trace or reason)


def reserve(folder: RunFolder) -> None:
    """Set room aside, so that a run that fills the disk can still say that it failed."""
    with writing(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
        (folder.path / _RESERVE).write_bytes(bytes(32768))


def release(folder: RunFolder) -> None:
    """Give the room back."""
    with suppress(OSError):
        (folder.path / _RESERVE).unlink(missing_ok=True)


def _ignore_warnings() -> None:
    """Leave Slurm's word that the end is near to the task, which passes it on as SIGTERM.

    Slurm signals every process of a job, in whatever session, and a worker would die of it.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _is_final(seat: _Seat) -> bool:
    return seat.folder.state_of_files() in (State.DONE, State.FAILED)


def _say(line: str) -> None:
    """Into the job's log, which a full disk may refuse."""
    with suppress(OSError):
        print(line, flush=True)
