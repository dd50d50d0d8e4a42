"""Submits what a plan still wants, follows it from the run folders, and can be left at any time.

What a run's state is, its folder says. Slurm is asked for one thing only: whether the job of a run
that is not finished still exists.
"""

import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.errors import UserError
from benchmarks.executors.local import STARTABLE, Sweep
from benchmarks.executors.slurm.arrays import Array, arrange
from benchmarks.executors.slurm.attempts import Attempts, Cause, Event, verdict
from benchmarks.executors.slurm.cluster import Cluster
from benchmarks.executors.slurm.scheduler import Away, Job, Queue, Scheduler
from benchmarks.executors.slurm.submissions import JobOf, Submission, Submissions, jobs_by_run
from benchmarks.executors.slurm.task import Order, write_failure
from benchmarks.files import canonical_json, exclusive, sha256
from benchmarks.plan import Plan
from benchmarks.run import Run
from benchmarks.store import Busy, State, Store

FOLDER = "slurm"  # in RUNS_DIR
_LOOKS = 2  # a job is gone when this many answers in a row do not have it
_OF_SLURM = {
    "CANCELLED": Cause.CANCELLED,
    "DEADLINE": Cause.TIMED_OUT,
    "BOOT_FAIL": Cause.NODE_FAILED,
    "NODE_FAIL": Cause.NODE_FAILED,
    "OUT_OF_MEMORY": Cause.OUT_OF_MEMORY,
    "PREEMPTED": Cause.PREEMPTED,
    "REVOKED": Cause.CANCELLED,
    "TIMEOUT": Cause.TIMED_OUT,
    "FAILED": Cause.CRASHED,
    "COMPLETED": Cause.CRASHED,  # and yet its run is not finished
}
_TAIL = 40  # lines


@dataclass(frozen=True)
class Options:
    """How to run on a cluster.

    Attributes:
        runs_dir: Where the run folders are; every node must see it.
        data_dir: Where data sets are; every node must see it.
        device: What computes.
        cluster: What jobs ask for.
        command: Starts a worker process.
    """

    runs_dir: Path
    data_dir: Path
    device: str
    cluster: Cluster
    command: tuple[str, ...] = ("-m", "benchmarks", "work")


def execute(
    plan: Plan,
    options: Options,
    scheduler: Scheduler,
    observe: Callable[[Sweep, Run | None], None],
    tell: Callable[[str], None],
) -> Sweep:
    """Carry out every run of a plan that is not done, failed or blocked.

    Args:
        plan: What to run.
        options: Where and how.
        scheduler: Slurm.
        observe: Called with the run that has just changed state, and with ``None`` at each look.
        tell: Takes a line for the user.

    Returns:
        The sweep when nothing of it is left in Slurm.

    Raises:
        KeyboardInterrupt: The jobs go on.
    """
    launcher = Launcher(plan, options, scheduler, observe, tell)
    while launcher.step():
        observe(launcher.sweep, None)
        time.sleep(options.cluster.polling.folders_seconds)
    return launcher.sweep


class Launcher:
    """One look at a time at where the runs stand; see ``execute``."""

    def __init__(
        self,
        plan: Plan,
        options: Options,
        scheduler: Scheduler,
        observe: Callable[[Sweep, Run | None], None] = lambda sweep, run: None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.plan = plan
        self.options = options
        self.cluster = options.cluster
        self.scheduler = scheduler
        self.observe = observe
        self.tell = tell
        self.store = Store(options.runs_dir)
        self.folder = options.runs_dir / FOLDER
        self.submissions = Submissions(self.folder)
        self.sweep = Sweep(plan, self.store, self.store.states(plan))
        self.left: set[str] = set()  # cancelled while we looked: they stay so
        self._seen: set[str] = set()  # jobs that were active while we looked
        self._missed: dict[str, int] = {}  # job → answers in a row that did not have it
        self._ended: dict[str, str] = {}  # job → Slurm's last word on it
        self._hopeless: set[str] = set()  # jobs cancelled because they waited in vain
        self._answer: Queue | None = None
        self._refused: Queue | None = None  # sbatch failed after this answer: wait for the next
        self._away = False
        self._plan_file: Path | None = None

    def step(self) -> bool:
        """Look once and do what is due.

        Returns:
            Whether there is anything left to wait for.
        """
        queue = self._ask()  # before the folders: what is gone has written its last word
        self._look_at_folders()
        self._clear_up(queue)
        jobs = jobs_by_run(self.submissions.read())
        states = self.sweep.states
        active = {name for name, job in jobs.items() if queue is None or not self._is_gone(job)}
        gone = [
            run
            for run in self.plan.runs
            if states[run.identity] in STARTABLE
            and run.identity in jobs
            and run.identity not in active | self.left
        ]
        self._ask_about([jobs[run.identity] for run in gone], queue)
        for run in gone:
            parents = jobs.get(run.parent or "") if run.parent in active else None
            self._settle(run, jobs[run.identity], parents)
        self._look_at_folders()
        self._cancel_hopeless(jobs, queue)
        wanted = self._wanted(active)
        if wanted and self._answer is not self._refused:
            self._submit(wanted, jobs, active)
        waited_for = (*STARTABLE, State.BLOCKED)
        return bool(wanted) or any(
            states[run.identity] is State.RUNNING
            or (states[run.identity] in waited_for and run.identity in active)
            for run in self.plan.runs
        )

    # Looking

    def _ask(self) -> Queue | None:
        """Slurm's latest answer; ``None`` if it is away. Counts what each new answer lacks."""
        queue = self.scheduler.queue()
        if (queue is None) is not self._away:
            self._away = queue is None
            how = "does not answer; following the run folders alone" if self._away else "is back"
            self.tell(f"Slurm's controller {how}")
        if queue is not None and queue is not self._answer:
            self._answer = queue
            active = {job.id for job in queue.jobs.values() if job.active}
            self._seen |= active
            known = {job.id for job in jobs_by_run(self.submissions.read()).values()}
            self._missed = {job: self._missed.get(job, 0) + 1 for job in known - active}
        return queue

    def _look_at_folders(self) -> None:
        states = self.sweep.states
        for run in self.plan.runs:
            before = states[run.identity]
            if before in (State.DONE, State.FAILED):
                continue
            folder = self.store.folder(run)
            state = folder.state()
            if state in STARTABLE and states.get(run.parent or "") in (State.FAILED, State.BLOCKED):
                state = State.BLOCKED
            if state is State.FAILED:
                self.sweep.reasons[run.identity] = folder.failure()["reason"]
            if state is not before:
                states[run.identity] = state
                self.observe(self.sweep, run)

    def _is_gone(self, job: JobOf) -> bool:
        """Whether Slurm has said, and said again, that a job is no more."""
        return self._missed.get(job.id, 0) >= _LOOKS

    def _ask_about(self, gone: Sequence[JobOf], queue: Queue | None) -> None:
        """Find out the final states of jobs that are gone: each once, all in one query."""
        jobs = {} if queue is None else queue.jobs
        for job in gone:
            if job.id in jobs and jobs[job.id].name == job.submission.name:
                self._ended[job.id] = jobs[job.id].state
        unknown = sorted({job.id for job in gone} - self._ended.keys())
        if unknown:
            self._ended |= dict.fromkeys(unknown, "") | self.scheduler.ended(unknown)

    # Deciding

    def _settle(self, run: Run, job: JobOf, waited_for: JobOf | None) -> None:
        """Note how a run's last job ended; give the run up where that happened too often.

        Args:
            run: The run.
            job: Its last job, which is gone.
            waited_for: The job of its parent, where Slurm still has that.
        """
        attempts = Attempts(self.store.folder(run))
        events = attempts.read()
        last = events[-1] if events and events[-1].job == job.id else None
        if last is None and self.sweep.states.get(run.parent or "", State.DONE) is not State.DONE:
            # It never began, since its parent is not done: it goes where that goes. But Slurm does
            # not drop a job while what it waits for is there: somebody has cancelled it.
            dropped = waited_for is None or waited_for.submission.time > job.submission.time
            if dropped or job.id in self._hopeless or job.id not in self._seen:
                return
        cause = self._cause(job, last)
        if cause is Cause.CANCELLED and job.id in self._seen:
            self.left.add(run.identity)
            self.tell(f"{run.label}: its job {job.id} was cancelled; it is left as it is")
            return
        if last is None or last.cause in (None, Cause.STOPPED):
            attempts.end(job.id, cause)
        reason = verdict(attempts.read(), self.cluster.retries)
        if reason is not None:
            with suppress(Busy):
                write_failure(run, self.store.folder(run), reason, self._log(job))

    def _cause(self, job: JobOf, last: Event | None) -> Cause:
        """Why a job that is gone ended, as far as Slurm still tells."""
        cause = _OF_SLURM.get(self._ended[job.id])
        if last is None:  # it never began
            return cause or Cause.CANCELLED
        if last.cause is Cause.STOPPED:
            return Cause.PREEMPTED if cause in (None, Cause.CRASHED) else cause
        return cause or Cause.NODE_FAILED

    def _log(self, job: JobOf) -> str:
        """The end of what a job said."""
        path = self.folder / "jobs" / (job.submission.job or "") / f"{job.id}_0_log.err"
        with suppress(OSError):
            return "\n".join(path.read_text(errors="replace").splitlines()[-_TAIL:])
        return ""

    def _wanted(self, active: set[str]) -> set[str]:
        """Runs that no job has and that could start, now or after a parent that is under way."""
        states, wanted = self.sweep.states, set[str]()
        for run in self.plan.runs:
            if run.parent in self.left:
                self.left.add(run.identity)
            follows = run.parent is None or states[run.parent] is State.DONE
            if (
                states[run.identity] in STARTABLE
                and run.identity not in active | self.left
                and (follows or run.parent in active | wanted)
            ):
                wanted.add(run.identity)
        return wanted

    def _cancel_hopeless(self, jobs: Mapping[str, JobOf], queue: Queue | None) -> None:
        """Cancel what waits in vain: all its runs are blocked, or what it depends on failed.

        Slurm does so by itself where it is able to.
        """
        hopeless: dict[str, set[str]] = {}
        for job in jobs.values():
            known = queue.jobs.get(job.id) if queue else None
            if known is None or not known.active or known.name != job.submission.name:
                continue
            blocked = all(self.sweep.states.get(run) is State.BLOCKED for run in job.runs)
            if (known.hopeless or blocked) and job.id not in self._hopeless:
                hopeless.setdefault(job.submission.name, set()).add(job.id)
        for name, ids in hopeless.items():
            if self.scheduler.cancel(name, sorted(ids)):
                self._hopeless |= ids

    def _clear_up(self, queue: Queue | None) -> None:
        """Cancel arrays whose launcher died before it had noted their id: nobody feeds them."""
        if queue is None or not self._intended(queue):
            return
        with exclusive(self.folder / "lock"):
            for submission in self._intended(queue):
                name = submission.name
                ids = [job.id for job in queue.jobs.values() if job.active and job.name == name]
                if not ids or self.scheduler.cancel(name, ids):
                    self.submissions.withdraw(name)

    def _intended(self, queue: Queue) -> list[Submission]:
        """Submissions of which it is not known that they came to be, though Slurm could tell."""
        return [
            s
            for s in self.submissions.read()
            if s.job is None and not s.withdrawn and s.time < queue.time
        ]

    # Submitting

    def _submit(self, wanted: set[str], jobs: Mapping[str, JobOf], active: set[str]) -> None:
        submitted: dict[int, str] = {}
        unfinished = {
            name: jobs[name].array
            for name in active
            if self.sweep.states.get(name) not in (None, State.DONE)
        }
        try:
            with exclusive(self.folder / "lock"):
                if jobs_by_run(self.submissions.read()) != jobs:
                    return  # another launcher was faster: look again
                for array in arrange(
                    self.plan,
                    wanted,
                    self.cluster,
                    max_array_size=self.scheduler.max_array_size(),
                    active=unfinished,
                ):
                    submitted[id(array)] = self._submit_one(array, submitted)
        except Away as error:
            self._refused = self._answer
            self.tell(f"sbatch: no answer ({error}); trying again later")
        except UserError as error:
            if not unfinished and not submitted:
                raise
            self._refused = self._answer
            self.tell(f"{error}; trying again later")
        if submitted:
            self.tell(f"submitted to Slurm: {', '.join(submitted.values())}")

    def _submit_one(self, array: Array, submitted: Mapping[int, str]) -> str:
        name = f"pof-{array.stage}-{uuid.uuid4().hex[:8]}"
        after = None
        if array.after is not None:
            parent = array.after if isinstance(array.after, str) else submitted[id(array.after)]
            after = f"{'afterok' if len(array.tasks) == 1 else 'aftercorr'}:{parent}"
        calls = [self._order(task, array) for task in array.tasks]
        self.submissions.intend(name, array.tasks)
        try:
            job = self.scheduler.submit(array, name, calls, after)
        except UserError:
            self.submissions.withdraw(name)
            raise
        self.submissions.record(name, job)
        return job

    def _order(self, task: tuple[str, ...], array: Array) -> Order:
        return Order(
            runs=task,
            runs_dir=self.options.runs_dir,
            plan_file=self._plan(),
            data_dir=self.options.data_dir,
            device=self.options.device,
            cpus=array.resources.cpus,
            minutes=array.resources.minutes,
            signal_seconds=array.resources.signal_seconds,
            retries=self.cluster.retries.model_dump(),
            command=self.options.command,
        )

    def _plan(self) -> Path:
        """A copy of the plan that stays as it is, whatever becomes of the profile."""
        if self._plan_file is None:
            digest = sha256(canonical_json(self.plan.model_dump(mode="json")))
            self._plan_file = self.folder / "plans" / f"{digest[:16]}.json"
            if not self._plan_file.exists():
                self.plan.write(self._plan_file)
        return self._plan_file


def active_jobs(plan: Plan, runs_dir: Path, scheduler: Scheduler) -> dict[str, Job] | None:
    """The jobs that the runs of a plan wait for or run in, by identity; ``None``: not known."""
    known = jobs_by_run(Submissions(runs_dir / FOLDER).read())
    mine = {run.identity: known[run.identity] for run in plan.runs if run.identity in known}
    if not mine:
        return {}
    queue = scheduler.queue()
    if queue is None:
        return None
    return {
        name: found
        for name, job in mine.items()
        # Slurm's numbers start again when a cluster is set up anew: the name must fit too.
        if (found := queue.jobs.get(job.id)) and found.active and found.name == job.submission.name
    }


def notes(plan: Plan, runs_dir: Path, scheduler: Scheduler) -> dict[str, str]:
    """A line for people about the job of each run that has one, by the run's identity."""
    jobs = active_jobs(plan, runs_dir, scheduler)
    if jobs is None:
        return {run.identity: "Slurm's controller does not answer" for run in plan.runs}
    return {
        name: f"job {job.id} waits ({job.reason})"
        if job.state == "PENDING"
        else f"job {job.id} {job.state.lower()}"
        for name, job in jobs.items()
    }


def cancel(plan: Plan, runs_dir: Path, scheduler: Scheduler) -> list[str]:
    """Cancel the jobs of a plan's runs and nothing else.

    Returns:
        Their ids.

    Raises:
        UserError: Slurm does not answer.
    """
    jobs = active_jobs(plan, runs_dir, scheduler)
    by_name: dict[str, set[str]] = {}
    for job in (jobs or {}).values():
        by_name.setdefault(job.name, set()).add(job.id)
    if jobs is None or not all(scheduler.cancel(name, sorted(by_name[name])) for name in by_name):
        raise UserError("Slurm's controller does not answer; nothing is known to be cancelled")
    return _in_order(job for ids in by_name.values() for job in ids)


def _in_order(ids: Iterable[str]) -> list[str]:
    return sorted(ids, key=lambda job: [int(part) for part in job.split("_")])
