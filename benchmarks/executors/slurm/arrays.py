"""What is submitted together: a pure function from the runs wanted to arrays of jobs.

Runs of one stage that ask for the same resources form one array. A child's array has one task for
each task of its parents' array, in the same order, so that Slurm's ``aftercorr`` lets each child
start as soon as its own parent is done.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from benchmarks.executors.slurm.cluster import Cluster, Resources
from benchmarks.files import canonical_json
from benchmarks.plan import Plan
from benchmarks.run import Run


@dataclass(frozen=True)
class ActiveArray:
    """An array that Slurm still has.

    Attributes:
        job: Its id.
        tasks: The runs of each task, by identity.
    """

    job: str
    tasks: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Array:
    """Jobs to submit with one call of sbatch.

    Attributes:
        stage: For people: ``sam-0-200``.
        resources: Of each job.
        tasks: The runs of each job, by identity; empty where a job only keeps the order.
        after: The array whose task of the same number must succeed first: one that is submitted
            before, or the id of one that Slurm has.
    """

    stage: str
    resources: Resources
    tasks: tuple[tuple[str, ...], ...]
    after: "Array | str | None" = field(default=None, compare=False)


def stage_name(run: Run) -> str:
    """The stage of a run, for people and for grouping."""
    return f"{run.method}-{run.settings.first_epoch}-{run.settings.last_epoch}"


def arrange(
    plan: Plan,
    wanted: set[str],
    cluster: Cluster,
    *,
    max_array_size: int,
    active: Mapping[str, ActiveArray] | None = None,
) -> list[Array]:
    """Every run wanted in one array, parents' arrays before their children's.

    Args:
        plan: All runs.
        wanted: Identities of those to submit.
        cluster: What jobs ask for.
        max_array_size: Most tasks of an array.
        active: The arrays that run unfinished parents which are not wanted, by the parent's
            identity.
    """
    return _Arrangement(plan, wanted, cluster, max_array_size, active or {}).arrays()


class _Arrangement:
    def __init__(
        self,
        plan: Plan,
        wanted: set[str],
        cluster: Cluster,
        max_array_size: int,
        active: Mapping[str, ActiveArray],
    ) -> None:
        self.runs = [run for run in plan.runs if run.identity in wanted]
        self.wanted = wanted
        self.cluster = cluster
        self.max_array_size = max_array_size
        self.active = active
        self.children: dict[str, list[Run]] = defaultdict(list)
        for run in self.runs:
            if run.parent is not None:
                self.children[run.parent].append(run)
        self.made: list[Array] = []

    def arrays(self) -> list[Array]:
        roots = [run for run in self.runs if run.parent not in self.wanted]
        free = [run for run in roots if run.parent not in self.active]
        # Families of one shape together, so that their children's arrays fit task by task.
        for family in _grouped((self._shape(run), run) for run in free):
            size = self.cluster.runs_per_gpu if family[0].settings.gpus_per_run == 1 else 1
            packs = [tuple(family[i : i + size]) for i in range(0, len(family), size)]
            for first in range(0, len(packs), self.max_array_size):
                self._add(packs[first : first + self.max_array_size], None)
        self._add_to_active([run for run in roots if run.parent in self.active])
        return self.made

    def _key(self, run: Run) -> str:
        resources = self.cluster.resources_of(run.settings.algorithm, run.settings.gpus_per_run)
        return stage_name(run) + canonical_json(resources.model_dump(mode="json"))

    def _shape(self, run: Run) -> str:
        inner = sorted(self._shape(child) for child in self.children[run.identity])
        return canonical_json([self._key(run), inner])

    def _add(self, packs: list[tuple[Run, ...]], after: Array | str | None) -> None:
        """One array, and below it one for each stage of its runs' children."""
        first = next(run for pack in packs for run in pack)
        array = Array(
            stage_name(first),
            self.cluster.resources_of(first.settings.algorithm, first.settings.gpus_per_run),
            tuple(tuple(run.identity for run in pack) for pack in packs),
            after,
        )
        self.made.append(array)
        keys = {
            self._shape(child): None
            for pack in packs
            for run in pack
            for child in self.children[run.identity]
        }
        for shape in keys:
            self._add([self._children(pack, shape) for pack in packs], array)

    def _children(self, pack: Iterable[Run], shape: str) -> tuple[Run, ...]:
        return tuple(
            child
            for run in pack
            for child in self.children[run.identity]
            if self._shape(child) == shape
        )

    def _add_to_active(self, runs: list[Run]) -> None:
        """Children of parents that are under way: aligned with their parents' array."""
        by_job: dict[str, ActiveArray] = {a.job: a for a in self.active.values()}
        groups = _grouped(
            (self.active[run.parent or ""].job + " " + self._shape(run), run) for run in runs
        )
        for group in groups:
            array = by_job[self.active[group[0].parent or ""].job]
            packs = [tuple(run for run in group if run.parent in task) for task in array.tasks]
            self._add(packs, array.job)


def _grouped(pairs: Iterable[tuple[str, Run]]) -> list[list[Run]]:
    groups: dict[str, list[Run]] = {}
    for key, run in pairs:
        groups.setdefault(key, []).append(run)
    return list(groups.values())
