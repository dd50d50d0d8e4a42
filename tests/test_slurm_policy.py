"""Every rule of the Slurm executor, on a made-up Slurm: what is submitted, and when again."""

import dataclasses
import time
from collections import Counter

import pytest

from benchmarks.errors import UserError
from benchmarks.executors.slurm import launcher
from benchmarks.executors.slurm.arrays import ActiveArray, arrange
from benchmarks.executors.slurm.attempts import Attempts, Cause, causes, most_at_once, verdict
from benchmarks.executors.slurm.cluster import Cluster, Retries
from benchmarks.executors.slurm.journal import append
from benchmarks.executors.slurm.launcher import Launcher, Options
from benchmarks.executors.slurm.scheduler import Away, Job, Queue
from benchmarks.executors.slurm.submissions import Submissions
from benchmarks.files import read_json_lines
from benchmarks.store import State, Store
from tests.harness import finish, make_plan

SAM, POF = "sam", "sam+pof"


class FakeSlurm:
    """Jobs that do what a test says, by the run they carry out."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.jobs: dict[str, Job] = {}
        self.orders: dict[str, tuple[str, ...]] = {}
        self.after: dict[str, str | None] = {}
        self.arrays: list[tuple[str, int, str | None]] = []
        self.cancelled: list[str] = []
        self.accounts: dict[str, str] = {}
        self.asked: list[list[str]] = []
        self.refusal: Exception | None = None
        self.number = 100
        self.away = False

    def queue(self):
        return None if self.away else Queue(dict(self.jobs), time.time())

    def ended(self, ids):
        self.asked.append(list(ids))
        return {job: self.accounts[job] for job in ids if job in self.accounts}

    def submit(self, array, name, calls, after):
        if self.refusal is not None:
            raise self.refusal
        number, self.number = str(self.number), self.number + 1
        self.arrays.append((array.stage, len(calls), after))
        for index, call in enumerate(calls):
            job = number if len(calls) == 1 else f"{number}_{index}"
            self.jobs[job] = Job(job, name, "PENDING", "Dependency" if after else "Priority")
            self.orders[job] = call.runs
        return number

    def cancel(self, name, ids):
        for job in ids:
            assert self.jobs[job].name == name
            self.cancelled.append(job)
            self.become(job, "CANCELLED")
        return not self.away

    def max_array_size(self):
        return 1000

    # What a test makes happen

    def become(self, job: str, state: str, reason: str = "") -> None:
        self.jobs[job] = dataclasses.replace(self.jobs[job], state=state, reason=reason)

    def job_of(self, run) -> str:
        return [job for job, runs in self.orders.items() if run.identity in runs][-1]

    def begin(self, run) -> str:
        job = self.job_of(run)
        self.become(job, "RUNNING")
        Attempts(self.store.folder(run)).begin(job)
        self.store.folder(run).write_progress({})
        return job

    def done(self, run) -> None:
        job = self.begin(run)
        finish(self.store, run, 5.0)
        Attempts(self.store.folder(run)).end(job, Cause.DONE)
        self.become(job, "COMPLETED")

    def fail(self, run) -> None:
        job = self.begin(run)
        self.store.folder(run).create(run)
        self.store.folder(run).write_failure("a reason", "trace")
        Attempts(self.store.folder(run)).end(job, Cause.FAILED)
        self.become(job, "FAILED")

    def vanish(self, run) -> str:
        """The job is gone and Slurm has forgotten it."""
        job = self.job_of(run)
        del self.jobs[job]
        return job


class World:
    def __init__(self, folder, changes=None, **cluster):
        self.plan = make_plan(folder, {"methods": [SAM, POF]} | (changes or {}))
        self.options = Options(folder / "runs", folder, "cpu", Cluster(title="", **cluster))
        self.store = Store(self.options.runs_dir)
        self.slurm = FakeSlurm(self.store)
        self.said: list[str] = []
        self.open()

    def open(self) -> Launcher:
        """Start a launcher; the one before is gone."""
        self.launcher = Launcher(self.plan, self.options, self.slurm, tell=self.said.append)
        return self.launcher

    def look(self, times: int = 4) -> bool:
        """Look as often as it takes until a job that is gone is known to be."""
        return [self.launcher.step() for _ in range(times)][-1]

    def run(self, method, first, seed=0):
        return next(
            run
            for run in self.plan.runs
            if (run.method, run.settings.first_epoch, run.settings.seed) == (method, first, seed)
        )

    def state(self, run) -> State:
        return self.launcher.sweep.states[run.identity]

    def submitted(self, run) -> int:
        return sum(run.identity in runs for runs in self.slurm.orders.values())


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


# What is submitted together


def test_one_array_a_stage_and_children_after_their_parents(tmp_path):
    world = World(tmp_path, {"seeds": [0, 1, 2]})
    world.look()
    assert world.slurm.arrays == [
        ("sam-0-2", 3, None),
        ("sam-2-3", 3, "aftercorr:100"),
        ("sam+pof-2-3", 3, "aftercorr:100"),
    ]


def test_a_child_has_its_parents_number(tmp_path):
    world = World(tmp_path, {"seeds": [0, 1, 2]})
    world.look()
    for run in world.plan.runs:
        if run.parent is not None:
            parent = next(job for job, runs in world.slurm.orders.items() if run.parent in runs)
            assert parent.partition("_")[2] == world.slurm.job_of(run).partition("_")[2]


def test_a_single_job_is_no_array(world):
    world.look()
    assert [after for _, _, after in world.slurm.arrays] == [None, "afterok:100", "afterok:100"]


def test_arrays_are_split_where_slurm_demands_it(tmp_path):
    plan = make_plan(tmp_path, {"seeds": list(range(7)), "methods": [SAM, POF]})
    wanted = {run.identity for run in plan.runs}
    arrays = arrange(plan, wanted, Cluster(title=""), max_array_size=3)
    assert [len(array.tasks) for array in arrays if array.after is None] == [3, 3, 1]
    parents = {run.identity: run.parent for run in plan.runs}
    for array in arrays:
        if array.after is not None:
            assert tuple((parents[task[0]],) for task in array.tasks) == array.after.tasks
    tasks = [name for array in arrays for task in array.tasks for name in task]
    assert sorted(tasks) == sorted(wanted)


def test_runs_share_a_job_and_so_do_their_children(tmp_path):
    plan = make_plan(tmp_path, {"seeds": [0, 1, 2, 3, 4], "methods": [SAM, POF]})
    wanted = {run.identity for run in plan.runs}
    first, *children = arrange(plan, wanted, Cluster(title="", runs_per_gpu=2), max_array_size=1000)
    assert [len(task) for task in first.tasks] == [2, 2, 1]
    parents = {run.identity: run.parent for run in plan.runs}
    for array in children:
        assert tuple(tuple(parents[name] for name in task) for task in array.tasks) == first.tasks


def test_what_asks_for_other_resources_is_another_array(tmp_path):
    cluster = Cluster.model_validate({"title": "", "stages": {"pof": {"time_limit": "20"}}})
    plan = make_plan(tmp_path, {"methods": [SAM, POF]})
    arrays = arrange(plan, {run.identity for run in plan.runs}, cluster, max_array_size=9)
    assert {a.stage: a.resources.time_limit for a in arrays} == {
        "sam-0-2": "4:00:00",
        "sam-2-3": "4:00:00",
        "sam+pof-2-3": "20",
    }


def test_children_of_parents_under_way_keep_their_array_s_order(tmp_path):
    plan = make_plan(tmp_path, {"seeds": [0, 1, 2], "methods": [SAM, POF]})
    parents = [run for run in plan.runs if run.parent is None]
    wanted = {run.identity for run in plan.runs if run.parent == parents[1].identity}
    array = ActiveArray("77", tuple((run.identity,) for run in parents))
    active = {run.identity: array for run in parents}
    made = arrange(plan, wanted, Cluster(title=""), max_array_size=9, active=active)
    assert [(a.after, [len(task) for task in a.tasks]) for a in made] == 2 * [("77", [0, 1, 0])]


def test_five_hundred_runs_take_a_handful_of_calls(tmp_path):
    world = World(tmp_path, {"seeds": list(range(500)), "methods": ["sgd"]})
    world.look(1)
    assert world.slurm.arrays == [("sgd-0-2", 500, None), ("sgd-2-3", 500, "aftercorr:100")]


# Submitting once


def test_nothing_is_submitted_twice(world):
    world.look()
    world.open()
    world.look()
    assert len(world.slurm.arrays) == 3


def test_two_launchers_at_once_submit_once(tmp_path):
    world = World(tmp_path)
    other = Launcher(world.plan, world.options, world.slurm)
    for _ in range(4):
        world.launcher.step()
        other.step()
    assert len(world.slurm.arrays) == 3


def test_a_launcher_that_died_while_it_submitted_leaves_no_orphans(world):
    name = "pof-sam-0-2-0badcafe"
    Submissions(world.options.runs_dir / "slurm").intend(name, [[world.run(SAM, 0).identity]])
    world.slurm.jobs["55"] = Job("55", name, "PENDING", "Priority")
    world.look()
    assert world.slurm.cancelled == ["55"]
    assert world.submitted(world.run(SAM, 0)) == 1


def test_an_sbatch_without_an_answer_is_repeated_when_slurm_is_back(world):
    world.slurm.refusal = Away("Socket timed out")
    assert world.look(1)
    assert world.slurm.arrays == []
    world.slurm.refusal = None
    world.look()
    assert [world.submitted(run) for run in world.plan.runs] == [1, 1, 1]


def test_a_refusal_of_sbatch_ends_the_command(world):
    world.slurm.refusal = UserError("sbatch refused: invalid partition")
    with pytest.raises(UserError, match="invalid partition"):
        world.look()


def test_a_refusal_while_jobs_run_is_waited_out(tmp_path):
    world = World(tmp_path)
    world.look()
    world.slurm.done(world.run(SAM, 0))
    world.slurm.begin(world.run(POF, 2))
    world.slurm.begin(world.run(SAM, 2))
    world.slurm.vanish(world.run(SAM, 2))
    world.slurm.refusal = UserError("sbatch refused: job submit limit")
    assert world.look()
    assert any("job submit limit; trying again later" in line for line in world.said)
    world.slurm.refusal = None
    world.look()
    assert world.submitted(world.run(SAM, 2)) == 2


# To the end


def test_a_sweep_ends_when_every_run_is_done(world):
    world.look()
    for run in world.plan.runs:
        assert world.look()
        world.slurm.done(run)
    assert not world.look()
    assert not world.launcher.sweep.unfinished()


def test_done_parents_are_not_waited_for(world):
    finish(world.store, world.run(SAM, 0), 5.0)
    world.open()
    world.look()
    assert [(count, after) for _, count, after in world.slurm.arrays] == [(1, None), (1, None)]


def test_children_of_a_failed_parent_are_blocked_and_their_jobs_dropped(world):
    world.look()
    children = [world.slurm.job_of(world.run(method, 2)) for method in (SAM, POF)]
    world.slurm.fail(world.run(SAM, 0))
    assert not world.look()
    assert sorted(world.slurm.cancelled) == sorted(children)
    assert world.state(world.run(POF, 2)) is State.BLOCKED
    assert len(world.slurm.arrays) == 3


def test_a_job_that_waits_in_vain_is_cancelled_and_its_run_submitted_again(world):
    world.look()
    child = world.run(POF, 2)
    world.slurm.become(world.slurm.job_of(child), "PENDING", "DependencyNeverSatisfied")
    world.slurm.begin(world.run(SAM, 0))
    world.look(6)
    assert world.slurm.cancelled == ["102"]
    assert world.submitted(child) == 2
    assert world.slurm.arrays[-1] == ("sam+pof-2-3", 1, "afterok:100")


# Again, or not


def test_a_crash_is_tried_once_more_with_its_children(world):
    first = world.run(SAM, 0)
    world.look()
    world.slurm.become(world.slurm.begin(first), "FAILED")
    for method in (SAM, POF):
        world.slurm.become(world.slurm.job_of(world.run(method, 2)), "CANCELLED")
    assert world.look()
    assert [world.submitted(run) for run in world.plan.runs] == [2, 2, 2]
    world.slurm.become(world.slurm.begin(first), "FAILED")
    world.look()
    assert world.state(first) is State.FAILED
    assert world.store.folder(first).failure()["reason"] == (
        "crashed 2 times; the cluster file allows 1 (retries)"
    )
    assert world.state(world.run(POF, 2)) is State.BLOCKED


def test_a_crash_keeps_the_end_of_the_job_s_log(tmp_path):
    world = World(tmp_path, retries=Retries(crashed=0))
    world.look()
    job = world.slurm.begin(world.run(SAM, 0))
    log = world.options.runs_dir / "slurm" / "jobs" / job / f"{job}_0_log.err"
    log.parent.mkdir(parents=True)
    log.write_text("Fatal Python error: Segmentation fault\n")
    world.slurm.become(job, "FAILED")
    world.look()
    failure = world.store.folder(world.run(SAM, 0)).failure()
    assert "Segmentation fault" in failure["traceback"]


def test_out_of_memory_is_not_tried_again(world):
    world.look()
    world.slurm.become(world.slurm.begin(world.run(SAM, 0)), "OUT_OF_MEMORY")
    assert not world.look()
    assert "out of memory" in world.store.folder(world.run(SAM, 0)).failure()["reason"]
    assert world.submitted(world.run(SAM, 0)) == 1


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ("TIMEOUT", Cause.TIMED_OUT),
        ("NODE_FAIL", Cause.NODE_FAILED),
        ("PREEMPTED", Cause.PREEMPTED),
    ],
)
def test_what_the_cluster_did_is_no_crash(tmp_path, state, cause):
    world = World(tmp_path, retries=Retries(crashed=0))
    world.look()
    for attempt in (1, 2):
        assert world.submitted(world.run(SAM, 0)) == attempt
        world.slurm.become(world.slurm.begin(world.run(SAM, 0)), state)
        world.look()
    ended = causes(Attempts(world.store.folder(world.run(SAM, 0))).read())
    assert [found for found, _ in ended] == [cause, cause]
    assert world.state(world.run(SAM, 0)) is not State.FAILED


def test_a_job_without_a_trace_is_tried_again(world):
    world.look()
    world.slurm.begin(world.run(SAM, 0))
    world.slurm.vanish(world.run(SAM, 0))
    world.look()
    assert world.submitted(world.run(SAM, 0)) == 2


def test_the_accounts_are_asked_once_for_all_that_the_queue_forgot(tmp_path):
    world = World(tmp_path, {"seeds": [0, 1, 2]})
    world.look()
    gone = []
    for seed in range(3):
        world.slurm.begin(world.run(SAM, 0, seed))
        gone.append(world.slurm.vanish(world.run(SAM, 0, seed)))
    world.slurm.accounts = {gone[0]: "OUT_OF_MEMORY", gone[1]: "TIMEOUT"}
    world.look()
    assert world.slurm.asked == [gone]
    assert world.state(world.run(SAM, 0, 0)) is State.FAILED
    assert world.submitted(world.run(SAM, 0, 1)) == 2


def test_a_cancelled_run_is_left_with_its_children_until_the_next_command(world):
    world.look()
    world.slurm.become(world.slurm.begin(world.run(SAM, 0)), "CANCELLED")
    for method in (SAM, POF):
        world.slurm.become(world.slurm.job_of(world.run(method, 2)), "CANCELLED")
    assert not world.look()
    assert [world.submitted(run) for run in world.plan.runs] == [1, 1, 1]
    world.open()
    assert world.look()
    assert [world.submitted(run) for run in world.plan.runs] == [2, 2, 2]


def test_children_cancelled_while_their_parent_is_still_ending_are_left_too(world):
    world.look()
    parent = world.slurm.begin(world.run(SAM, 0))
    for method in (SAM, POF):
        world.slurm.become(world.slurm.job_of(world.run(method, 2)), "CANCELLED")
    assert world.look()
    world.slurm.become(parent, "CANCELLED")
    assert not world.look()
    assert [world.submitted(run) for run in world.plan.runs] == [1, 1, 1]


def test_a_child_dropped_with_an_earlier_job_of_its_parent_is_submitted_again(world):
    world.look()
    first = world.slurm.begin(world.run(SAM, 0))
    world.slurm.become(first, "FAILED")
    world.look()
    assert world.submitted(world.run(SAM, 0)) == 2
    for method in (SAM, POF):  # Slurm drops them late
        (child, *_) = (
            j for j, runs in world.slurm.orders.items() if world.run(method, 2).identity in runs
        )
        world.slurm.become(child, "CANCELLED")
    world.look()
    assert [world.submitted(run) for run in world.plan.runs] == [2, 2, 2]


def test_a_job_cancelled_while_it_waited_is_left_too(world):
    world.look()
    world.slurm.done(world.run(SAM, 0))
    world.slurm.become(world.slurm.job_of(world.run(POF, 2)), "CANCELLED")
    world.slurm.done(world.run(SAM, 2))
    assert not world.look()
    assert world.submitted(world.run(POF, 2)) == 1


def test_a_job_cancelled_while_it_waited_to_go_on_is_left_too(world):
    world.look()
    first = world.run(SAM, 0)
    job = world.slurm.begin(first)
    Attempts(world.store.folder(first)).end(job, Cause.TIMED_OUT)
    world.slurm.become(job, "PENDING", "BeginTime")
    world.look()
    for waiting in world.slurm.orders:
        world.slurm.become(waiting, "CANCELLED")
    assert not world.look()
    assert world.submitted(first) == 1


def test_nothing_is_concluded_from_a_controller_that_is_away(world):
    world.look()
    world.slurm.begin(world.run(SAM, 0))
    world.slurm.away = True
    assert world.look()
    world.slurm.away = False
    assert world.look()
    assert len(world.slurm.arrays) == 3
    assert [line for line in world.said if "controller" in line] == [
        "Slurm's controller does not answer; following the run folders alone",
        "Slurm's controller is back",
    ]


def test_one_answer_without_a_job_is_not_enough(world):
    world.look()
    job = world.slurm.begin(world.run(SAM, 0))
    kept = world.slurm.jobs.pop(job)
    world.look(1)
    world.slurm.jobs[job] = kept
    world.look()
    assert len(world.slurm.arrays) == 3


def test_a_run_that_somebody_else_trains_is_not_submitted(world):
    with world.store.folder(world.run(SAM, 0)).lock():
        world.open()
        assert world.look()
        assert world.slurm.arrays == []


# Cancelling, and what status says


def test_cancel_takes_what_is_ours_and_nothing_else(world):
    world.look()
    world.slurm.done(world.run(SAM, 0))
    # Slurm was set up anew and counts from the beginning: the number is somebody else's now.
    theirs = world.slurm.job_of(world.run(SAM, 2))
    world.slurm.jobs[theirs] = Job(theirs, "theirs", "RUNNING")
    world.slurm.jobs["7"] = Job("7", "other", "RUNNING")
    mine = world.slurm.job_of(world.run(POF, 2))
    assert launcher.cancel(world.plan, world.options.runs_dir, world.slurm) == [mine]
    assert world.slurm.cancelled == [mine]


def test_cancel_says_when_slurm_does_not_answer(world):
    world.look()
    world.slurm.away = True
    with pytest.raises(UserError, match="does not answer"):
        launcher.cancel(world.plan, world.options.runs_dir, world.slurm)


def test_status_names_the_job_of_each_run(world):
    world.look()
    world.slurm.begin(world.run(SAM, 0))
    notes = launcher.notes(world.plan, world.options.runs_dir, world.slurm)
    assert notes[world.run(SAM, 0).identity] == "job 100 running"
    assert notes[world.run(POF, 2).identity] == "job 102 waits (Dependency)"


# What is held against a run


def events_of(tmp_path, *ended: tuple[Cause | None, str]):
    """Attempts in jobs of their own; ``None``: no end on record. The text: its checkpoint."""
    tmp_path.mkdir(exist_ok=True)
    world = World(tmp_path)
    folder = world.store.folder(world.run(SAM, 0))
    attempts = Attempts(folder)
    for number, (cause, place) in enumerate(ended):
        attempts.begin(str(number))
        if place:
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
            (folder.checkpoints / f"{place}-abc.pt").touch()
        if cause is not None:
            attempts.end(str(number), cause)
    return attempts


def test_an_attempt_without_an_end_died_with_its_node(tmp_path):
    attempts = events_of(tmp_path, (None, ""), (Cause.DONE, ""))
    assert [cause for cause, _ in causes(attempts.read())] == [Cause.NODE_FAILED, Cause.DONE]


def test_stopped_and_started_again_in_the_same_job_is_preempted(tmp_path):
    attempts = events_of(tmp_path)
    attempts.begin("5")
    attempts.end("5", Cause.STOPPED)
    attempts.begin("5")
    attempts.end("5", Cause.DONE)
    assert [cause for cause, _ in causes(attempts.read())] == [Cause.PREEMPTED, Cause.DONE]


def test_chaining_goes_on_while_it_gets_anywhere(tmp_path):
    steps = [(Cause.TIMED_OUT, f"e{epoch:04d}-s000000") for epoch in range(9)]
    assert verdict(events_of(tmp_path, *steps).read(), Retries()) is None


def test_chaining_without_getting_anywhere_ends(tmp_path):
    moved = [(Cause.TIMED_OUT, "e0001-s000000")]
    idle = [(Cause.TIMED_OUT, "")]
    assert verdict(events_of(tmp_path / "a", *moved, *2 * idle).read(), Retries()) is None
    reason = verdict(events_of(tmp_path / "b", *moved, *3 * idle).read(), Retries())
    assert reason is not None
    assert reason.startswith("timed out 3 times without getting any further: raise 'time_limit'")


@pytest.mark.parametrize(
    ("cause", "name"),
    [
        (Cause.PREEMPTED, "preempted"),
        (Cause.NODE_FAILED, "node_failed"),
        (Cause.CRASHED, "crashed"),
        (Cause.TIMED_OUT, "timed_out"),
    ],
)
def test_each_cause_has_its_own_bound(tmp_path, cause, name):
    bounds = Retries.model_validate(dict.fromkeys(Retries.model_fields, 1) | {name: 2, "idle": 99})
    attempts = events_of(tmp_path, *2 * [(cause, "")])
    assert verdict(attempts.read(), bounds) is None
    attempts.begin("9")
    attempts.end("9", cause)
    assert verdict(attempts.read(), bounds) == (
        f"{cause} 3 times; the cluster file allows 2 (retries)"
    )


def test_a_pardon_forgets_what_came_before(tmp_path):
    attempts = events_of(tmp_path, *2 * [(Cause.CRASHED, "")])
    assert verdict(attempts.read(), Retries()) is not None
    attempts.end("", Cause.FORGIVEN)
    assert verdict(attempts.read(), Retries()) is None


def test_a_line_cut_off_by_a_crash_is_repaired_by_the_next(tmp_path):
    path = tmp_path / "journal"
    append(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"b":')
    append(path, {"c": 3})
    assert read_json_lines(path) == [{"a": 1}, {"c": 3}]


def test_every_run_of_a_large_sweep_is_submitted_once(tmp_path):
    changes = {"seeds": list(range(6)), "methods": ["sgd", "sam", "sgd+pof", "sam+pof"]}
    world = World(tmp_path, changes, runs_per_gpu=4)
    world.look()
    counts = Counter(name for runs in world.slurm.orders.values() for name in runs)
    assert counts == Counter(run.identity for run in world.plan.runs)
    assert len(world.slurm.arrays) == 6


def test_jobs_at_once_are_counted_from_the_attempts(tmp_path, monkeypatch):
    plan = make_plan(tmp_path, {"seeds": [0, 1, 2], "methods": ["sgd"]})
    store = Store(tmp_path / "runs")
    clock = iter(range(100))
    monkeypatch.setattr("benchmarks.executors.slurm.attempts.time.time", lambda: next(clock))
    first, second, third = (Attempts(store.folder(run)) for run in plan.runs[:3])
    first.begin("1_0")  # at 0; its node dies, and it begins again
    first.begin("1_0")
    second.begin("1_0")  # shares the job
    third.begin("1_1")
    first.end("1_0", Cause.DONE)
    second.end("1_0", Cause.DONE)  # at 5
    first.begin("1_2")
    third.end("1_1", Cause.PREEMPTED)
    assert most_at_once(plan, store, since=0) == 2
    assert most_at_once(plan, store, since=5) == 1
    assert most_at_once(plan, store, since=50) == 0
