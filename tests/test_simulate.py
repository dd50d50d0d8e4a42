"""The simulated schedule: closed forms, and bounds that every list schedule keeps."""

import itertools
import random
from dataclasses import replace

import pytest

from benchmarks.simulate import Limits, Machine, Task, simulate


def makespan(tasks, workers, **machine):
    return simulate(tasks, Machine(workers, **machine)).makespan


def limited(tasks, **limits):
    return [replace(task, limits=Limits(**limits)) for task in tasks]


def chain(lengths, name="c", priority=0.0):
    return [
        Task(f"{name}{i}", seconds, f"{name}{i - 1}" if i else None, priority)
        for i, seconds in enumerate(lengths)
    ]


def forest(seed, count=14):
    """Random tasks, each with at most one parent among those before it."""
    draw = random.Random(seed)
    tasks, below = [], {}
    for i in range(count):
        parent = draw.choice([None, *(task.name for task in tasks)])
        tasks.append(Task(f"t{i}", draw.uniform(1, 10), parent))
    for task in reversed(tasks):
        below[task.name] = task.seconds + below.get(task.name, 0.0)
        if task.parent:
            below[task.parent] = max(below.get(task.parent, 0.0), below[task.name])
    return [Task(t.name, t.seconds, t.parent, below[t.name]) for t in tasks]


def test_one_worker_takes_the_sum():
    assert makespan(forest(0), 1) == pytest.approx(sum(task.seconds for task in forest(0)))


def test_a_chain_takes_its_length_on_any_number_of_workers():
    assert makespan(chain([3, 5, 2]), 1) == makespan(chain([3, 5, 2]), 7) == 10


def test_a_fork_takes_its_root_and_then_its_longest_branch():
    fork = [Task("root", 4), Task("a", 3, "root"), Task("b", 5, "root"), Task("c", 2, "root")]
    assert makespan(fork, 3) == 4 + 5
    prioritised = [Task(t.name, t.seconds, t.parent, t.seconds) for t in fork]
    assert makespan(prioritised, 2) == 4 + 5  # b beside a and then c
    assert makespan(fork, 2) == 4 + 3 + 2  # a and then c, beside b: as given, without priorities


def test_what_has_the_longest_way_to_the_end_starts_first():
    tasks = [Task("short", 1, priority=1), *chain([1, 9], "long", priority=10)]
    schedule = simulate(tasks, Machine(1))
    assert [piece.task for piece in schedule.pieces] == ["long0", "long1", "short"]
    level = [Task(name, 1.0) for name in "xyz"]
    assert [piece.task for piece in simulate(level, Machine(1)).pieces] == ["x", "y", "z"]


def test_a_parent_that_is_not_among_the_tasks_is_finished():
    assert makespan([Task("child", 2, "done long ago")], 1) == 2


def test_a_throttle_holds_back_its_own_array_only():
    tasks = [Task(f"a{i}", 1.0, array="a") for i in range(6)]
    assert makespan(tasks, 6) == 1
    assert makespan(limited(tasks, throttle=2), 6) == 3
    others = [Task(f"b{i}", 1.0, array="b") for i in range(6)]
    assert makespan(limited([*tasks, *others], throttle=2), 6) == 3
    assert makespan([*limited(tasks, throttle=2), *others], 6) == 3  # each array has its own
    assert makespan([*limited(tasks, throttle=1), *others], 7) == 6
    for throttle, array in itertools.product((1, 2, 3), "ab"):
        names = {task.name for task in [*tasks, *others] if task.array == array}
        schedule = simulate(limited([*tasks, *others], throttle=throttle), Machine(6))
        pieces = [p for p in schedule.pieces if p.task in names]
        assert max(sum(p.start <= q.start < p.end for p in pieces) for q in pieces) == throttle


def test_a_worker_that_stays_starts_once_and_a_job_starts_every_time():
    tasks = chain([2, 2, 2])
    assert makespan(tasks, 1, startup=5) == 5 + 6
    assert makespan(tasks, 1, startup=5, stays=False) == 3 * 5 + 6


def test_a_worker_that_stays_loads_each_data_set_once_and_a_job_every_time():
    names = "aabab"
    tasks = [Task(f"{i}", 1, data=name, loading=10) for i, name in enumerate(names)]
    assert makespan(tasks, 1) == 5 + 2 * 10
    assert makespan(tasks, 1, stays=False) == 5 + 5 * 10
    assert makespan([Task("0", 1, data="a", loading=10)], 2, startup=3) == 3 + 10 + 1


def test_a_run_longer_than_the_time_limit_is_chained_with_the_overhead_of_each_job():
    # 10 s of work, 4 − 1 s of it in a job: four jobs.
    long, job = [Task("long", 10)], Machine(1, startup=1, stays=False)
    schedule = simulate(limited(long, time_limit=4), job)
    assert len(schedule.pieces) == 4
    assert schedule.makespan == 10 + 4 * 1
    assert all(piece.end - piece.start <= 4 for piece in schedule.pieces)
    assert len(simulate(limited(long, time_limit=4, margin=2), job).pieces) == 10
    # Between two jobs, somebody else's may run.
    waits = limited([Task("long", 10, priority=1)], time_limit=4, requeue=5)
    assert simulate(waits, job).makespan == 10 + 4 * 1 + 3 * 5
    assert simulate([*waits, Task("other", 4)], job).makespan == 10 + 4 * 1 + 3 * 5
    # On another worker the continuation queues like any other task.
    both = [Task("long", 10, priority=1), Task("urgent", 3, priority=2)]
    assert makespan(limited(both, time_limit=4), 2, startup=1, stays=False) == 14


def test_a_time_limit_that_leaves_no_time_is_refused():
    with pytest.raises(ValueError, match="leaves no time to train"):
        simulate(limited([Task("a", 1)], time_limit=5), Machine(1, startup=5, stays=False))
    with pytest.raises(ValueError, match="of jobs"):
        simulate(limited([Task("a", 1)], time_limit=5), Machine(1))
    with pytest.raises(ValueError, match="at least 1"):
        Machine(0)
    with pytest.raises(ValueError, match="at least 1"):
        Limits(throttle=0)


def test_a_circle_and_a_name_used_twice_are_refused():
    with pytest.raises(ValueError, match="circle"):
        simulate([Task("a", 1, "b"), Task("b", 1, "a")], Machine(2))
    with pytest.raises(ValueError, match="one name"):
        simulate([Task("a", 1), Task("a", 1)], Machine(2))


@pytest.mark.parametrize("seed", range(30))
def test_every_schedule_keeps_the_bounds_of_list_scheduling(seed):
    tasks = forest(seed)
    critical = max(task.priority for task in tasks)
    total = sum(task.seconds for task in tasks)
    for workers in (1, 2, 3, 5, 14):
        found = makespan(tasks, workers)
        lower = max(critical, total / workers)  # no schedule at all can be shorter
        assert found >= lower * (1 - 1e-12)
        # Graham (1966): at most 2 − 1/W times the optimum; here against its lower bounds.
        assert found <= (total - critical) / workers + critical + 1e-9
        assert found <= 2 * lower + 1e-9
    assert makespan(tasks, 14) == pytest.approx(critical)


@pytest.mark.parametrize("seed", range(10))
def test_a_schedule_is_one_that_could_be_carried_out(seed):
    tasks = {task.name: task for task in forest(seed)}
    machine = Machine(3, startup=0.5, stays=False)
    schedule = simulate(limited(tasks.values(), time_limit=4.0), machine)
    for worker in range(3):
        own = sorted((p.start, p.end) for p in schedule.pieces if p.worker == worker)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(own))
    for name, task in tasks.items():
        own = [p for p in schedule.pieces if p.task == name]
        trained = sum(p.end - p.start - 0.5 for p in own)
        assert trained == pytest.approx(task.seconds)
        if task.parent:
            ended = max(p.end for p in schedule.pieces if p.task == task.parent)
            assert min(p.start for p in own) >= ended


def test_a_sweep_of_nothing_is_finished_at_once():
    assert makespan([], 4) == 0
