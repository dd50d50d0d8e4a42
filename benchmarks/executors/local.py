"""The local executor: a few worker processes on this machine, the cores divided among them.

A worker is ``python -m benchmarks work``: it reads the names of runs from its standard input and
answers with a line of JSON when a run has ended. It outlives its runs, so PyTorch is loaded once,
and dies alone: a crash costs its runs a retry and the others nothing.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
        seeds_at_once: Runs that a worker trains at once, if they differ in nothing but the seed.
    """

    runs_dir: Path
    plan_file: Path
    data_dir: Path
    jobs: int
    device: str
    seeds_at_once: int = 1


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
    """One worker process and the runs it is at, by identity."""

    def __init__(self, options: Options, threads: int, log: IO[bytes]) -> None:
        self.runs: dict[str, Run] = {}
        self.leaving = False
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
        self._heard = b""

    def give(self, runs: Sequence[Run]) -> bool:
        """Hand over runs to be carried out at once; ``False`` if the worker is gone."""
        self.runs = {run.identity: run for run in runs}
        try:
            self.stdin.write(" ".join(self.runs).encode() + b"\n")
            self.stdin.flush()
        except BrokenPipeError:
            return False
        return True

    def answers(self) -> list[dict[str, str]] | None:
        """What the worker has said; ``None``: it is gone."""
        said = os.read(self.stdout.fileno(), 65536)
        if not said:
            return None
        *lines, self._heard = (self._heard + said).split(b"\n")
        return [json.loads(line) for line in lines]

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
            while self._busy() < self.jobs and (ready := self._ready()):
                self._start(self._at_once(ready))
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

    def _at_once(self, ready: Sequence[Run]) -> list[Run]:
        """The first of the runs, and others to be trained with it."""
        first = ready[0]
        if first.settings.gpus_per_run > 1 or first.identity in self.crashes:
            return [first]  # of several that died together, one may have brought the others down
        alike = [
            run
            for run in ready
            if run.apart_from_seed == first.apart_from_seed and run.identity not in self.crashes
        ]
        return alike[: self.options.seeds_at_once]

    def _busy(self) -> int:
        return sum(bool(worker.runs) for worker in self.workers)

    def _start(self, runs: Sequence[Run]) -> None:
        idle = [worker for worker in self.workers if not worker.runs]
        worker = idle[0] if idle else self._new_worker()
        for run in runs:
            self._set(run, State.RUNNING)
        if not worker.give(runs):
            self._lost(worker)

    def _new_worker(self) -> _WorkerProcess:
        with writing(self.log_path), self.log_path.open("ab") as log:
            worker = _WorkerProcess(self.options, self.threads, log)
        self.workers.append(worker)
        self.selector.register(worker.stdout, selectors.EVENT_READ, worker)
        return worker

    def _hear(self, worker: _WorkerProcess) -> None:
        """A worker has something to say: how runs ended, or nothing: it is gone."""
        answers = worker.answers()
        if answers is None:
            self._lost(worker)
            return
        for answer in answers:
            run = worker.runs.pop(answer["run"])
            ending = answer["ending"]
            if ending == "BUSY":
                self.elsewhere.add(run.identity)
                continue
            if ending == "INTERRUPTED":  # somebody asked the worker to stop: it leaves
                worker.leaving = True
            if answer["reason"]:
                self.sweep.reasons[run.identity] = answer["reason"]
            self._set(run, State(ending))
        if worker.leaving and not worker.runs:
            self._dismiss(worker)

    def _lost(self, worker: _WorkerProcess) -> None:
        """A worker died: try its runs again, a bounded number of times."""
        runs = list(worker.runs.values())
        worker.runs = {}
        code = self._dismiss(worker)
        for run in runs:
            self._crashed(run, code)

    def _crashed(self, run: Run, code: int) -> None:
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
                if worker.runs:
                    worker.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + _STOP_SECONDS
            for worker in self.workers:
                try:
                    worker.process.wait(max(0.0, deadline - time.monotonic()))
                except (subprocess.TimeoutExpired, KeyboardInterrupt):
                    worker.process.kill()
                    worker.process.wait()


STARTABLE = (State.PENDING, State.INTERRUPTED)
