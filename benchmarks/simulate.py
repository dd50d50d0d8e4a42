"""When a sweep would be finished: its schedule, simulated event by event.

List scheduling, as the executors do it: whenever a worker is free, the ready task with the
longest way to the end starts. Free of PyTorch and of everything that is measured.
"""

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a cluster allows the jobs of an array.

    Attributes:
        throttle: Most of them at once; ``None``: no limit.
        time_limit: Most seconds a job may take, overhead included; a longer task continues in a
            further job, which queues again. ``None``: no limit.
        margin: Seconds before the time limit at which a job stops, to save its state.
        requeue: Seconds from there until it may start again.
    """

    throttle: int | None = None
    time_limit: float | None = None
    margin: float = 0.0
    requeue: float = 0.0

    def __post_init__(self) -> None:
        if self.throttle is not None and self.throttle < 1:
            raise ValueError("the throttle must be at least 1")

    def piece(self, overhead: float) -> float:
        """Most seconds of a task that fit into one job beside its overhead.

        Raises:
            ValueError: None do.
        """
        if self.time_limit is None:
            return math.inf
        piece = self.time_limit - self.margin - overhead
        if piece <= 0:
            raise ValueError("the time limit leaves no time to train")
        return piece


@dataclass(frozen=True)
class Task:
    """What occupies one worker: a run, or runs that share a job.

    Attributes:
        name: Unique.
        seconds: For which it occupies a worker.
        parent: What must be finished before; a name that is not simulated counts as finished.
        priority: The highest of those ready starts first; ties in the order given.
        array: The job array it belongs to, which a throttle applies to.
        data: What it needs in memory; a worker process loads that once.
        loading: Seconds to load it.
        limits: Of its array.
    """

    name: str
    seconds: float
    parent: str | None = None
    priority: float = 0.0
    array: str = ""
    data: str = ""
    loading: float = 0.0
    limits: Limits = Limits()


@dataclass(frozen=True)
class Machine:
    """What carries the tasks out.

    Attributes:
        workers: Tasks at once.
        startup: Seconds that a worker process needs to start and end.
        stays: Whether a worker process stays for further tasks, or every task, and every
            continuation of one, is a job that starts a process of its own.
    """

    workers: int
    startup: float = 0.0
    stays: bool = True

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError("workers must be at least 1")


@dataclass(frozen=True)
class Piece:
    """A task, or a part of one, on a worker.

    Attributes:
        task: Name.
        worker: From 0.
        start: Seconds since the sweep began; overhead included.
        end: Likewise.
    """

    task: str
    worker: int
    start: float
    end: float


@dataclass(frozen=True)
class Schedule:
    """A simulated sweep.

    Attributes:
        pieces: In the order of their start.
        makespan: Seconds until the last is finished.
    """

    pieces: list[Piece]
    makespan: float


def simulate(tasks: Sequence[Task], machine: Machine) -> Schedule:
    """Simulate a sweep.

    Raises:
        ValueError: A name is used twice, tasks wait for each other in a circle, a time limit
            leaves no time to train, or it is asked of workers that stay.
    """
    if machine.stays and any(task.limits.time_limit is not None for task in tasks):
        raise ValueError("a time limit is one of jobs, not of workers that stay")
    order = {task.name: index for index, task in enumerate(tasks)}
    if len(order) < len(tasks):
        raise ValueError("two tasks of one name")
    left = {task.name: task.seconds for task in tasks}
    children: dict[str, list[Task]] = {}
    ready: list[tuple[float, int, Task]] = []  # a heap: the highest priority first

    def release(task: Task) -> None:
        heapq.heappush(ready, (-task.priority, order[task.name], task))

    for task in tasks:
        if task.parent in order:
            children.setdefault(task.parent or "", []).append(task)
        else:
            release(task)

    idle = list(range(machine.workers))  # a heap: those that have worked come first
    loaded: dict[int, set[str]] = {}  # by worker process
    busy: list[tuple[float, int, Task]] = []  # a heap by end and worker
    later: list[tuple[float, int, Task]] = []  # a heap of those that may not yet start again
    at_once: Counter[str] = Counter()
    pieces: list[Piece] = []
    now, finished = 0.0, 0

    while ready or busy or later:
        waiting = []
        while ready and idle:
            entry = heapq.heappop(ready)
            task = entry[2]
            throttle = task.limits.throttle
            if throttle is not None and at_once[task.array] >= throttle:
                waiting.append(entry)
                continue
            worker = heapq.heappop(idle)
            overhead = 0.0
            if worker not in loaded or not machine.stays:
                overhead += machine.startup
                loaded[worker] = set()
            if task.data not in loaded[worker]:
                overhead += task.loading
                loaded[worker].add(task.data)
            share = min(left[task.name], task.limits.piece(overhead))
            left[task.name] -= share
            at_once[task.array] += 1
            end = now + overhead + share
            pieces.append(Piece(task.name, worker, now, end))
            heapq.heappush(busy, (end, worker, task))
        for entry in waiting:
            heapq.heappush(ready, entry)
        if not busy and not later:
            break
        now = min(events[0][0] for events in (busy, later) if events)
        while busy and busy[0][0] == now:
            _, worker, task = heapq.heappop(busy)
            heapq.heappush(idle, worker)
            at_once[task.array] -= 1
            if left[task.name] > 0:
                again = now + task.limits.requeue
                heapq.heappush(later, (again, order[task.name], task))
                continue
            finished += 1
            for child in children.get(task.name, []):
                release(child)
        while later and later[0][0] == now:
            release(heapq.heappop(later)[2])
    if finished < len(tasks):
        raise ValueError("tasks wait for each other in a circle")
    return Schedule(pieces, now)
