"""What a job does with its runs, with worker processes and a ``scontrol`` that are made up."""

import errno
import fcntl
import json
import os
import signal
from pathlib import Path

import pytest

from benchmarks.errors import UserError
from benchmarks.executors.slurm import task
from benchmarks.executors.slurm.attempts import Attempts, Cause, causes
from benchmarks.executors.slurm.cluster import Retries
from benchmarks.executors.slurm.task import Order
from benchmarks.files import CannotWrite
from benchmarks.store import RunFolder, State, Store
from tests.harness import ROOT, exit_status, finish, fork, make_plan, wait_until

SCONTROL = """\
#!/bin/sh
echo "$1" >> {folder}/scontrol-calls
[ "$1" = requeue ] || cat {folder}/job
"""


class Desk:
    """A job's surroundings: two runs with a common parent, and what becomes of their workers."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder = folder
        self.plan = make_plan(folder, {"methods": ["sam", "sam+pof"]})
        self.plan.write(folder / "plan.json")
        self.store = Store(folder / "runs")
        self.parent, self.sam, self.pof = self.plan.runs
        (folder / "scontrol").write_text(SCONTROL.format(folder=folder))
        (folder / "scontrol").chmod(0o755)
        self.job("JobState=RUNNING PreemptTime=None")
        self.orders({})
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
        monkeypatch.setenv("FAKE_ORDERS", str(folder / "orders"))
        monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def job(self, line: str) -> None:
        """What ``scontrol show job`` says."""
        (self.folder / "job").write_text(line + "\n")

    def orders(self, orders: dict) -> None:
        (self.folder / "orders").write_text(json.dumps(orders))

    def start(self, *runs, minutes: int = 240, **changes) -> int:
        order = Order(
            runs=tuple(run.identity for run in runs),
            runs_dir=self.store.root,
            plan_file=self.folder / "plan.json",
            data_dir=self.folder,
            device="cpu",
            cpus=2,
            minutes=minutes,
            signal_seconds=60,
            retries=Retries().model_dump() | changes,
            command=("-m", "tests.fake_worker", "work"),
        )

        def work() -> None:
            try:
                order()
            except SystemExit as ending:
                os._exit(ending.code)

        return fork(work)

    def work(self, *runs, **changes) -> int:
        return exit_status(self.start(*runs, **changes))

    def state(self, run) -> State:
        return self.store.folder(run).state()

    def causes(self, run) -> list[Cause]:
        return [cause for cause, _ in causes(Attempts(self.store.folder(run)).read())]

    def requeued(self) -> bool:
        path = self.folder / "scontrol-calls"
        return path.exists() and "requeue" in path.read_text()

    def interrupt(self, run, number: signal.Signals, **changes) -> int:
        """Start a run that takes for ever and signal its job when it is at it."""
        self.orders({run.label: ["wait"]})
        job = self.start(run, **changes)
        wait_until(lambda: self.state(run) is State.RUNNING)
        os.kill(job, number)
        return exit_status(job)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    return Desk(tmp_path, monkeypatch)


def test_a_run_is_carried_out_and_the_job_succeeds(desk):
    assert desk.work(desk.parent) == 0
    assert desk.state(desk.parent) is State.DONE
    assert desk.causes(desk.parent) == [Cause.DONE]


def test_a_job_without_runs_succeeds(desk):
    assert desk.work() == 0


def test_a_failed_run_fails_the_job(desk):
    desk.orders({desk.parent.label: ["fail"]})
    assert desk.work(desk.parent) == 1
    assert desk.store.folder(desk.parent).failure()["reason"] == "a reason"


def test_one_run_that_goes_on_is_enough_for_the_jobs_behind(desk):
    finish(desk.store, desk.parent, 5.0)
    desk.orders({desk.sam.label: ["fail"]})
    assert desk.work(desk.sam, desk.pof) == 0
    assert desk.state(desk.sam) is State.FAILED
    assert desk.state(desk.pof) is State.DONE


def test_a_child_of_a_failed_parent_is_not_started(desk):
    desk.store.folder(desk.parent).create(desk.parent)
    desk.store.folder(desk.parent).write_failure("a reason", "trace")
    assert desk.work(desk.pof) == 1
    assert desk.state(desk.pof) is State.PENDING
    assert not (desk.store.root / "tries").exists()


def test_a_child_of_an_unfinished_parent_is_not_started(desk, monkeypatch):
    monkeypatch.setattr(task, "_SHARED_SECONDS", 0.0)
    assert desk.work(desk.pof) == 1
    assert not (desk.store.root / "tries").exists()


def test_a_finished_run_is_not_carried_out_again(desk):
    finish(desk.store, desk.parent, 5.0)
    assert desk.work(desk.parent) == 0
    assert not (desk.store.root / "tries").exists()


def test_a_killed_worker_is_replaced_within_the_job(desk):
    desk.orders({desk.parent.label: ["crash"]})
    assert desk.work(desk.parent) == 0
    assert desk.causes(desk.parent) == [Cause.CRASHED, Cause.DONE]


def test_the_second_crash_is_a_failure_with_its_reason(desk):
    desk.orders({desk.parent.label: ["crash", "crash"]})
    assert desk.work(desk.parent) == 1
    assert desk.store.folder(desk.parent).failure()["reason"] == (
        "the worker process was killed by SIGKILL (out of memory?): "
        "crashed 2 times; the cluster file allows 1 (retries)"
    )


def test_what_a_dying_worker_said_is_kept(desk):
    (desk.folder / "orders").write_text("not JSON")
    assert desk.work(desk.parent, crashed=0) == 1
    failure = desk.store.folder(desk.parent).failure()
    assert "exited with 1" in failure["reason"]
    assert "JSONDecodeError" in failure["traceback"]


def test_too_many_attempts_before_this_one_end_the_run(desk):
    attempts = Attempts(desk.store.folder(desk.parent))
    for _ in range(3):
        attempts.begin("7")
        attempts.end("7", Cause.PREEMPTED)
    assert desk.work(desk.parent, preempted=2) == 1
    assert "preempted 3 times" in desk.store.folder(desk.parent).failure()["reason"]
    assert not (desk.store.root / "tries").exists()


def test_a_run_that_somebody_is_at_is_waited_for(desk, monkeypatch):
    monkeypatch.setattr(task, "_BUSY_SECONDS", 0.05)
    folder = desk.store.folder(desk.parent)
    looked = folder.path / "looked"
    state = RunFolder.state

    def look(self: RunFolder) -> State:
        found = state(self)
        if found is State.RUNNING:
            looked.touch()
        return found

    def hold() -> None:
        with folder.lock():
            signal.pause()

    holder = fork(hold)
    wait_until(lambda: folder.state() is State.RUNNING)
    monkeypatch.setattr(RunFolder, "state", look)
    job = desk.start(desk.parent)
    wait_until(lambda: looked.exists())
    assert not (desk.store.root / "tries").exists()
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert exit_status(job) == 0
    assert desk.state(desk.parent) is State.DONE


def test_slurm_s_warning_to_every_process_kills_no_worker(desk):
    desk.orders({desk.parent.label: ["wait"]})
    job = desk.start(desk.parent)
    wait_until(lambda: desk.state(desk.parent) is State.RUNNING)
    (worker,) = (desk.store.root / "workers").iterdir()
    lines = Path(f"/proc/{worker.name}/status").read_text().splitlines()
    ignored = int(next(line for line in lines if line.startswith("SigIgn:")).split()[1], 16)
    os.kill(job, signal.SIGUSR2)
    assert exit_status(job) == 1
    assert all(ignored >> (number - 1) & 1 for number in (signal.SIGUSR1, signal.SIGUSR2))


def test_near_its_time_limit_a_job_requeues_itself(desk):
    assert desk.interrupt(desk.parent, signal.SIGUSR2, minutes=1) == 1
    assert desk.requeued()
    assert desk.causes(desk.parent) == [Cause.TIMED_OUT]


def test_far_from_its_time_limit_it_is_preempted(desk):
    assert desk.interrupt(desk.parent, signal.SIGUSR2, minutes=600) == 1
    assert desk.requeued()
    assert desk.causes(desk.parent) == [Cause.PREEMPTED]


def test_a_short_job_that_is_preempted_is_not_taken_for_timed_out(desk):
    desk.job("JobState=RUNNING PreemptTime=2026-01-01T00:00:00")
    assert desk.interrupt(desk.parent, signal.SIGTERM, minutes=1) == 1
    assert desk.causes(desk.parent) == [Cause.PREEMPTED]


def test_a_job_whose_fate_slurm_has_decided_is_not_requeued(desk):
    desk.job("JobState=COMPLETING PreemptTime=None")
    assert desk.interrupt(desk.parent, signal.SIGTERM) == 1
    assert not desk.requeued()
    assert Attempts(desk.store.folder(desk.parent)).read()[-1].cause is Cause.STOPPED


def test_room_is_kept_for_the_reason_of_a_failure(desk):
    folder = desk.store.folder(desk.parent)
    task.reserve(folder)
    assert (folder.path / ".reserve").stat().st_size > 0
    task.release(folder)
    task.write_failure(desk.parent, folder, "no space left", "")
    assert folder.failure() == {"reason": "no space left", "traceback": "no space left"}
    assert not (folder.path / ".reserve").exists()


def test_a_run_that_ended_meanwhile_is_not_marked_as_failed(desk):
    finish(desk.store, desk.parent, 5.0)
    task.write_failure(desk.parent, desk.store.folder(desk.parent), "late", "")
    assert desk.state(desk.parent) is State.DONE


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, number):
    folder = RunFolder(tmp_path / "run")
    with folder.lock():
        pass

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    for use in (lambda: folder.lock().__enter__(), folder.state):
        with pytest.raises(UserError, match=r"no file locks \(flock\).*-o flock") as caught:
            use()
        assert not isinstance(caught.value, CannotWrite)
