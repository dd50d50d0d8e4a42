"""The local executor: a few worker processes on this machine, the cores divided among them.

A worker is ``python -m benchmarks work``: it reads the names of runs from its standard input, one
a line, and answers with a line of JSON when a run has ended. It outlives its runs, so PyTorch is
loaded once, and dies alone: a crash costs its run a retry and the others nothing.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from benchmarks.cost import priorities
from benchmarks.files import writing
from benchmarks.plan import Plan
from benchmarks.run import Run
from benchmarks.store import Busy, State, Store

CRASHES_ALLOWED = 1  # per run; then it is FAILED
_STOP_SECONDS = 60.0


@dataclass(frozen=True)
class Options:
    """How to run locally.

    Attributes:
        runs_dir: Where the run folders are.
        plan_file: The plan, written.
        data_dir: Where data sets are.
        jobs: Worker processes; 0: one a core on a CPU, one on a GPU.
        device: ``auto``, ``cpu``, ``cuda``, ….
    """

    runs_dir: Path
    plan_file: Path
    data_dir: Path
    jobs: int
    device: str


@dataclass
class Sweep:
    """The state of a sweep as its observer sees it.

    Attributes:
        plan: All runs.
        store: Their folders.
        states: By identity, kept up to date.
        reasons: Why runs failed, by identity.
        began: When, in monotonic seconds.
    """

    plan: Plan
    store: Store
    states: dict[str, State]
    reasons: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def running(self) -> list[Run]:
        """Runs at work now."""
        return [r for r in self.plan.runs if self.states[r.identity] is State.RUNNING]

    def unfinished(self) -> list[Run]:
        """Runs that are not done."""
        return [r for r in self.plan.runs if self.states[r.identity] is not State.DONE]


def default_jobs(device: str, runs: int) -> int:
    """One worker a core on a CPU, one on a GPU, and no more than there are runs."""
    return max(1, min(_cores(), runs)) if device == "cpu" else 1


def threads_each(jobs: int) -> int:
    """Threads of a worker: the cores divided among them."""
    return max(1, _cores() // jobs)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def execute(
    plan: Plan,
    options: Options,
    observe: Callable[[Sweep, Run | None], None],
) -> Sweep:
    """Carry out every run of a plan that is not done, failed or blocked.

    Args:
        plan: What to run.
        options: Where and how.
        observe: Called with the run that has just changed state, and with ``None`` a few times a
            second.

    Returns:
        The sweep at its end.

    Raises:
        KeyboardInterrupt: After the workers have left resumable checkpoints.
    """
    store = Store(options.runs_dir)
    sweep = Sweep(plan, store, store.states(plan))
    pool = _Pool(sweep, options, observe)
    with pool.shutting_down():
        pool.run()
    return sweep


class _WorkerProcess:
    """One worker process and the run it is at."""

    def __init__(self, options: Options, threads: int, log: IO[bytes]) -> None:
        self.run: Run | None = None
        environment = os.environ | {
            name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        }
        arguments = [
            *("--runs-dir", str(options.runs_dir)),
            *("--plan-file", str(options.plan_file)),
            *("--data-dir", str(options.data_dir)),
            *("--device", options.device),
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks", "work", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which stops the workers
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def give(self, run: Run) -> bool:
        """Hand over a run; ``False`` if the worker is gone."""
        self.run = run
        try:
            self.stdin.write(run.identity.encode() + b"\n")
            self.stdin.flush()
        except BrokenPipeError:
            return False
        return True

    def end(self) -> None:
        """No more runs."""
        with suppress(BrokenPipeError):
            self.stdin.close()


class _Pool:
    """Keeps the workers busy until no run is left that could start."""

    def __init__(
        self, sweep: Sweep, options: Options, observe: Callable[[Sweep, Run | None], None]
    ) -> None:
        self.sweep = sweep
        self.options = options
        self.observe = observe
        self.workers: list[_WorkerProcess] = []
        self.crashes: dict[str, int] = {}
        # runs that another process works on
        self.elsewhere = {i for i, state in sweep.states.items() if state is State.RUNNING}
        self.selector = selectors.DefaultSelector()
        unfinished = [s for s in sweep.states.values() if s in STARTABLE]
        self.jobs = options.jobs or default_jobs(options.device, len(unfinished))
        self.threads = threads_each(self.jobs)
        self.priority = priorities(sweep.plan)
        self.log_path = options.runs_dir / "workers.log"

    def run(self) -> None:
        with writing(self.options.runs_dir):
            self.options.runs_dir.mkdir(parents=True, exist_ok=True)
        while True:
            self._look_elsewhere()
            ready = self._ready()
            for run in ready[: self.jobs - self._busy()]:
                self._start(run)
            if not self._busy() and not self.elsewhere and not self._ready():
                return
            for key, _ in self.selector.select(timeout=0.25):
                self._hear(key.data)
            self.observe(self.sweep, None)

    def _ready(self) -> list[Run]:
        """Runs that could start now, the longest way to the end first."""
        states = self.sweep.states
        ready = [
            run
            for run in self.sweep.plan.runs
            if states[run.identity] in STARTABLE
            and run.identity not in self.elsewhere
            and (run.parent is None or states[run.parent] is State.DONE)
        ]
        return sorted(ready, key=lambda run: -self.priority[run.identity])

    def _busy(self) -> int:
        return sum(worker.run is not None for worker in self.workers)

    def _start(self, run: Run) -> None:
        idle = [worker for worker in self.workers if worker.run is None]
        worker = idle[0] if idle else self._new_worker()
        self._set(run, State.RUNNING)
        if not worker.give(run):
            self._lost(worker)

    def _new_worker(self) -> _WorkerProcess:
        with writing(self.log_path), self.log_path.open("ab") as log:
            worker = _WorkerProcess(self.options, self.threads, log)
        self.workers.append(worker)
        self.selector.register(worker.stdout, selectors.EVENT_READ, worker)
        return worker

    def _hear(self, worker: _WorkerProcess) -> None:
        """A worker has something to say: how its run ended, or nothing: it is gone."""
        line = worker.stdout.readline()
        if not line:
            self._lost(worker)
            return
        answer = json.loads(line)
        run, worker.run = worker.run, None
        assert run is not None
        if answer["ending"] == "BUSY":
            self.elsewhere.add(run.identity)
            return
        if answer["ending"] == "INTERRUPTED":  # somebody asked the worker to stop: it leaves
            self._dismiss(worker)
        if answer["reason"]:
            self.sweep.reasons[run.identity] = answer["reason"]
        self._set(run, State(answer["ending"]))

    def _lost(self, worker: _WorkerProcess) -> None:
        """A worker died: try its run again, a bounded number of times."""
        run, worker.run = worker.run, None
        code = self._dismiss(worker)
        if run is None:
            return
        count = self.crashes[run.identity] = self.crashes.get(run.identity, 0) + 1
        if count <= CRASHES_ALLOWED:
            self._set(run, State.INTERRUPTED)
            return
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        reason = f"the worker process {how} {count} times (out of memory?); see {self.log_path}"
        folder = self.sweep.store.folder(run)
        try:
            with folder.lock():
                folder.create(run)
                folder.write_failure(reason, reason)
        except Busy:
            self.elsewhere.add(run.identity)
            return
        self.sweep.reasons[run.identity] = reason
        self._set(run, State.FAILED)

    def _dismiss(self, worker: _WorkerProcess) -> int:
        """Part with a worker that is gone or about to go; returns its exit status."""
        self.selector.unregister(worker.stdout)
        self.workers.remove(worker)
        worker.end()
        status = worker.process.wait()
        worker.stdout.close()
        return status

    def _look_elsewhere(self) -> None:
        """See how runs stand that other processes work on."""
        for run in self.sweep.plan.runs:
            if run.identity in self.elsewhere:
                folder = self.sweep.store.folder(run)
                state = folder.state()
                if state is not State.RUNNING:
                    self.elsewhere.discard(run.identity)
                    if state is State.FAILED:
                        self.sweep.reasons[run.identity] = folder.failure()["reason"]
                    self._set(run, state)

    def _set(self, run: Run, state: State) -> None:
        self.sweep.states[run.identity] = state
        if state is State.FAILED:
            for child in self.sweep.plan.runs:
                if child.parent == run.identity and self.sweep.states[child.identity] in STARTABLE:
                    self._set(child, State.BLOCKED)
        self.observe(self.sweep, run)

    @contextmanager
    def shutting_down(self) -> Iterator[None]:
        """End the workers, however the launcher ends; interrupted runs leave a checkpoint."""
        try:
            yield
        finally:
            for worker in self.workers:
                worker.end()
                if worker.run is not None:
                    worker.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + _STOP_SECONDS
            for worker in self.workers:
                try:
                    worker.process.wait(max(0.0, deadline - time.monotonic()))
                except (subprocess.TimeoutExpired, KeyboardInterrupt):
                    worker.process.kill()
                    worker.process.wait()


STARTABLE = (State.PENDING, State.INTERRUPTED)
