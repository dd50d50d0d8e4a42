"""What a sweep will cost, before it is launched; afterwards, what it cost beside that.

Joins the plan with measured or estimated times (``cost``) and simulates the schedule. Loads
PyTorch only where a network was never measured and its operations have to be counted.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks import plan as planning
from benchmarks.cost import (
    Calibration,
    Estimate,
    Images,
    Measurement,
    Outline,
    RunCost,
    Start,
    WorkerKind,
    priorities,
    run_cost,
    work,
)
from benchmarks.display import duration
from benchmarks.errors import UserError
from benchmarks.executors.slurm.arrays import arrange
from benchmarks.executors.slurm.cluster import Cluster
from benchmarks.plan import Arm, Plan
from benchmarks.run import Run, RunSettings
from benchmarks.settings import Profile
from benchmarks.simulate import Limits, Machine, Schedule, Task, simulate
from benchmarks.store import State, Store

_DAY = 86_400.0
_MAX_ARRAY_SIZE = 1001  # Slurm's, unless a cluster has another


class Calibrated(NamedTuple):
    """Measured times and the kind of worker they are of."""

    calibration: Calibration
    worker: WorkerKind


class Jobs(NamedTuple):
    """How a sweep is carried out as jobs.

    Attributes:
        cluster: What they ask for, and how many runs share one.
        start_seconds: From a job's turn to the start of its process.
        requeue_seconds: From the end of a job whose time is up until it may start again; two
            minutes is the lifetime of Slurm's credentials, which it waits for.
    """

    cluster: Cluster
    start_seconds: float = 0.0
    requeue_seconds: float = 121.0

    def describe(self) -> str:
        """One line for people."""
        together, asked = self.cluster.runs_per_gpu, self.cluster.resources
        return (
            f"{'every run' if together == 1 else f'{together} runs'} a job, at most "
            f"{asked.array_throttle} of an array at once, {span(60.0 * asked.minutes)} each"
        )

    def tasks(self, forecast: "Forecast", runs: Iterable[Run]) -> list[Task]:
        """The jobs of runs in the order in which they are submitted and start."""
        cluster, known = self.cluster, forecast.plan.by_identity()
        arrays = arrange(
            forecast.plan,
            {run.identity for run in runs},
            cluster,
            max_array_size=cluster.max_array_size or _MAX_ARRAY_SIZE,
        )
        names = {id(array): f"{i}" for i, array in enumerate(arrays)}
        # Times of runs that were alone on their device say nothing of how several share one: then
        # they are taken to gain nothing.
        source = forecast.source
        side_by_side = source is not None and source.worker.jobs == cluster.runs_per_gpu
        loading = forecast.start.loading
        tasks: list[Task] = []
        for array in arrays:
            limits = Limits(
                throttle=array.resources.array_throttle,
                time_limit=60.0 * array.resources.minutes,
                margin=array.resources.signal_seconds,
                requeue=self.requeue_seconds,
            )
            for index, identities in enumerate(array.tasks):
                together = [known[identity] for identity in identities]
                datasets = {run.settings.dataset for run in together}
                each = [forecast.costs[identity].occupied for identity in identities]
                after = names.get(id(array.after))
                tasks.append(
                    Task(
                        name=f"{names[id(array)]}_{index}",
                        seconds=max(each, default=0.0) if side_by_side else sum(each),
                        parent=after and f"{after}_{index}",
                        priority=-len(tasks),
                        array=names[id(array)],
                        data=" ".join(sorted(datasets)),
                        loading=max((loading.get(name, 0.0) for name in datasets), default=0.0),
                        limits=limits,
                    )
                )
        return tasks


class Stage(NamedTuple):
    """Runs that differ in nothing but their seed.

    Attributes:
        cell: Dataset, backbone and augmentation.
        method: As in the plan.
        first_epoch: Epochs before.
        last_epoch: Epochs after.
        runs: One a seed.
    """

    cell: str
    method: str
    first_epoch: int
    last_epoch: int
    runs: list[Run]

    @property
    def name(self) -> str:
        """Method and epochs."""
        return f"{self.method} {self.first_epoch}–{self.last_epoch}"


@dataclass(frozen=True)
class Forecast:
    """The predicted cost of every run of a plan.

    Attributes:
        plan: What is to be run.
        costs: By identity.
        priority: By identity: the order in which an executor starts what is ready.
        source: What the measured times were measured on; ``None``: all are estimates.
        estimate: What the others rest on.
    """

    plan: Plan
    costs: dict[str, RunCost]
    priority: dict[str, float]
    source: Calibrated | None
    estimate: Estimate

    @property
    def unit(self) -> str:
        """What an hour of one worker is called."""
        alone = self.source is None or (
            self.source.calibration.kind != "cpu" and self.source.worker.jobs == 1
        )
        return "GPU-hours" if alone else "worker-hours"

    @property
    def start(self) -> Start:
        """What a worker process costs beside its runs."""
        return self.source.calibration.start_of(self.source.worker) if self.source else Start()

    def seconds(self, runs: Iterable[Run]) -> float:
        """Worker-seconds that runs occupy."""
        return sum(self.costs[run.identity].occupied for run in runs)

    def estimated(self, runs: Iterable[Run]) -> bool:
        """Whether the time of any of these runs is an estimate."""
        return any(self.costs[run.identity].basis == "estimate" for run in runs)

    def amount(self, runs: Sequence[Run]) -> str:
        """What runs cost, for people: ``12.3 GPU-hours (estimate)``."""
        label = " (estimate)" if self.estimated(runs) else ""
        return f"{hours(self.seconds(runs))} {self.unit}{label}"

    def schedule(
        self, workers: int, runs: Sequence[Run] | None = None, jobs: Jobs | None = None
    ) -> Schedule:
        """Simulate runs on so many workers of the kind that was measured.

        Args:
            workers: At once.
            runs: All unless given; what is not among them counts as finished.
            jobs: How they are jobs; ``None``: the workers are processes that stay.

        Raises:
            UserError: A time limit leaves no time to train.
        """
        runs = self.plan.runs if runs is None else runs
        startup = self.start.process + (jobs.start_seconds if jobs else 0.0)
        machine = Machine(workers, startup=startup, stays=jobs is None)
        try:
            return simulate(jobs.tasks(self, runs) if jobs else self._tasks(runs), machine)
        except ValueError as error:
            raise UserError(str(error)) from error

    def _tasks(self, runs: Iterable[Run]) -> list[Task]:
        return [
            Task(
                name=run.identity,
                seconds=self.costs[run.identity].occupied,
                parent=run.parent,
                priority=self.priority[run.identity],
                data=run.settings.dataset,
                loading=self.start.loading.get(run.settings.dataset, 0.0),
            )
            for run in runs
        ]

    def refuse_above(self, limit: float, runs: Sequence[Run]) -> None:
        """Refuse runs that cost more than ``limit`` hours of a worker.

        Raises:
            UserError: They do.
        """
        if self.seconds(runs) > 3600.0 * limit:
            raise UserError(
                f"predicted {self.amount(runs)} for {len(runs)} runs, more than the limit of "
                f"{limit:g} (--max-gpu-hours): nothing was started"
            )


def predict(plan: Plan, source: Calibrated | None, estimate: Estimate) -> Forecast:
    """The cost of every run of a plan.

    Args:
        plan: What is to be run.
        source: Measured times, used wherever they fit.
        estimate: For what was not measured.

    Raises:
        UserError: A network that was not measured cannot be built.
    """
    found: dict[str, Measurement | None] = {}
    outlines: dict[str, Outline] = {}
    costs: dict[str, RunCost] = {}
    whole: dict[str, Images] = {}
    for run in plan.runs:
        settings = run.settings.model_copy(update={"seed": 0})
        case = settings.model_dump_json()
        if case not in found:
            found[case] = source.calibration.find(settings, source.worker) if source else None
        measured = found[case]
        if measured is not None:
            costs[run.identity] = run_cost(run, measured.rates, measured.outline, "measured")
            whole[run.settings.dataset] = measured.outline.images
            continue
        outline = _outline(settings, outlines)
        rates = estimate.rates(settings, outline)
        costs[run.identity] = run_cost(run, rates, outline, "estimate")
        whole[run.settings.dataset] = outline.images
    priority = priorities(plan, lambda run: work(run, whole[run.settings.dataset]))
    return Forecast(plan, costs, priority, source, estimate)


def _outline(settings: RunSettings, known: dict[str, Outline]) -> Outline:
    """Count a network once."""
    key = f"{settings.dataset} {settings.backbone} {settings.network}"
    if key not in known:
        from benchmarks.calibrate import outline  # PyTorch

        known[key] = outline(settings)
    return known[key]


def choose(
    calibrations: Sequence[Calibration], plan: Plan, together: int | None = None
) -> Calibrated | None:
    """The device and kind of worker of which most of a plan was measured; of equals the latest.

    Args:
        calibrations: The latest first.
        plan: What is to be run.
        together: How many workers share a device, preferred among equals.
    """
    best, most = None, (0, False)
    cases = [run.settings for run in {_case(run): run for run in plan.runs}.values()]
    for calibration in calibrations:
        for worker in calibration.workers():
            count = sum(calibration.find(case, worker) is not None for case in cases)
            if count and (count, worker.jobs == together) > most:
                best, most = Calibrated(calibration, worker), (count, worker.jobs == together)
    return best


def measured_here(
    calibrations: Sequence[Calibration], device: str, worker: WorkerKind
) -> Calibrated | None:
    """What was measured on this device with this kind of worker, if anything was."""
    here = [c for c in calibrations if c.device == device]
    return next((Calibrated(c, worker) for c in here if worker in c.workers()), None)


def _case(run: Run) -> str:
    """Equal for runs whose steps cost the same."""
    same = {"seed": 0, "first_epoch": 0, "last_epoch": 0}
    return run.settings.model_copy(update=same).model_dump_json()


def expand_without_data(profile: Profile, plan_file: Path) -> Plan:
    """A profile's plan, whether or not its data sets are there.

    Args:
        profile: What is asked for.
        plan_file: The plan of the last sweep, if there was one: it knows the fingerprints, and
            with them the runs that are done are found.
    """
    fingerprints: dict[str, str] = {name: f"unknown:{name}" for name in profile.datasets}
    if plan_file.exists():
        try:
            earlier = planning.read(plan_file).runs
        except UserError:
            earlier = []  # of another version: nothing of it can be used
        seen = {run.settings.dataset: run.settings.fingerprint for run in earlier}
        fingerprints |= {name: seen[name] for name in profile.datasets if name in seen}
    return planning.expand(profile, fingerprints, {})


def stages(plan: Plan) -> list[Stage]:
    """The runs of a plan, those of one stage together, in the plan's order of cells."""
    found: dict[tuple[str, str, int, int], Stage] = {}
    for run in plan.runs:
        s = run.settings
        cell = f"{s.dataset} {s.backbone} {s.augmentation.kind}"
        key = (cell, run.method, s.first_epoch, s.last_epoch)
        found.setdefault(key, Stage(*key, [])).runs.append(run)
    return list(found.values())


def taken(plan: Plan, store: Store) -> dict[str, float]:
    """Seconds that the finished runs of a plan took, on all of their GPUs, by identity.

    Raises:
        UserError: A result was edited or is damaged.
    """
    folders = [(run, store.folder(run)) for run in plan.runs]
    return {
        run.identity: float(folder.result()["seconds"]) * run.settings.gpus_per_run
        for run, folder in folders
        if folder.state_of_files() is State.DONE
    }


class Sharing(NamedTuple):
    """What training the shared stages once saves.

    Attributes:
        seconds: Worker-seconds with sharing.
        unshared_seconds: If every arm trained all its stages itself.
        epochs: With sharing.
        unshared_epochs: Without.
    """

    seconds: float
    unshared_seconds: float
    epochs: int
    unshared_epochs: int


def sharing(forecast: Forecast, arms: Iterable[Arm] | None = None) -> Sharing:
    """What sharing saves among arms, all of the plan unless given."""
    runs = forecast.plan.by_identity()
    together: dict[str, Run] = {}
    alone: list[Run] = []
    for arm in forecast.plan.arms if arms is None else arms:
        for final in arm.runs.values():
            identity: str | None = final
            while identity is not None:
                run = runs[identity]
                together[identity] = run
                alone.append(run)
                identity = run.parent
    return Sharing(
        forecast.seconds(together.values()),
        forecast.seconds(alone),
        sum(map(_epochs, together.values())),
        sum(map(_epochs, alone)),
    )


def _epochs(run: Run) -> int:
    return run.settings.last_epoch - run.settings.first_epoch


def plan_view(
    forecast: Forecast,
    actual: Mapping[str, float],
    workers: Sequence[int],
    jobs: Jobs | None = None,
) -> Group:
    """Everything about a plan before it is launched.

    Args:
        forecast: Of the plan.
        actual: Seconds that finished runs took, by identity.
        workers: Numbers of workers for which to say when it is finished.
        jobs: How they are jobs on a cluster; ``None``: workers that stay.
    """
    plan = forecast.plan
    parts: list[RenderableType] = [stages_table(forecast, actual), Text()]
    parts += [Text(line) for line in _summary(forecast, actual, max(workers))]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("workers" if jobs is None else "jobs at once", justify="right")
    table.add_column("finished after", justify="right")
    table.add_column("busy", justify="right")
    for count in workers:
        schedule = forecast.schedule(count, jobs=jobs)
        makespan = schedule.makespan
        occupied = sum(piece.end - piece.start for piece in schedule.pieces)
        busy = occupied / (count * makespan) if makespan else 0.0
        table.add_row(f"{count}", span(makespan), f"{100 * busy:.0f}%")
    notes = ["schedule simulated"]
    notes += ["estimate"] if forecast.estimated(plan.runs) else []
    notes += [jobs.describe()] if jobs is not None else []
    parts += [Text(), Text(f"Finish ({', '.join(notes)})"), table]
    return Group(*parts)


def stages_table(forecast: Forecast, actual: Mapping[str, float]) -> Table:
    """Every stage: runs, epochs, predicted time, what the times rest on; and what it took."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage", overflow="fold")
    for column in ("runs", "epochs", "each", "total", "basis"):
        table.add_column(column, justify="right", no_wrap=True)
    if actual:
        table.add_column("done", justify="right", no_wrap=True)
        table.add_column("took", justify="right", no_wrap=True)
    cell = ""
    for stage in stages(forecast.plan):
        if stage.cell != cell:
            cell = stage.cell
            table.add_row(Text(cell, "bold"))
        costs = [forecast.costs[run.identity] for run in stage.runs]
        seconds = sum(cost.seconds for cost in costs)
        took = [actual[run.identity] for run in stage.runs if run.identity in actual]
        table.add_row(
            f"  {stage.name}",
            f"{len(stage.runs)}",
            f"{sum(map(_epochs, stage.runs)):,}",
            span(seconds / len(stage.runs)),
            span(seconds),
            costs[0].basis,
            *([f"{len(took)}", span(sum(took) / len(took)) if took else "–"] if actual else []),
        )
    return table


def _summary(forecast: Forecast, actual: Mapping[str, float], most_workers: int) -> Iterator[str]:
    """Totals, sharing, disk, and what the times rest on."""
    runs = forecast.plan.runs
    yield f"Total: {len(runs)} runs, {sum(map(_epochs, runs)):,} epochs, {forecast.amount(runs)}"
    left = [run for run in runs if run.identity not in actual]
    if actual:
        yield f"Still to do: {len(left)} runs, {forecast.amount(left)}"
    share = sharing(forecast)
    saved = share.unshared_seconds - share.seconds
    if saved > 0:
        yield (
            f"Sharing: training the shared stage once saves {hours(saved)} of "
            f"{hours(share.unshared_seconds)} {forecast.unit} "
            f"({100 * saved / share.unshared_seconds:.0f}%)"
            + (", estimate" if forecast.estimated(runs) else "")
        )
        yield from _pair_line(forecast)
    most_workers = min(most_workers, len(runs))
    sizes = [forecast.costs[run.identity].checkpoint_bytes for run in runs]
    yield (
        f"Disk: {size(sum(sizes))} of checkpoints (weights and momentum) at the end, "
        f"up to {size(2 * most_workers * max(sizes))} more while {most_workers} train"
    )
    if forecast.source is not None and not all(
        forecast.costs[run.identity].basis == "estimate" for run in runs
    ):
        calibration, worker = forecast.source
        threads = "1 thread" if worker.threads == 1 else f"{worker.threads} threads"
        where = f"{threads} a worker, {worker.jobs} at once"
        yield f"Measured: on {calibration.device}" + (
            f", {where}" if calibration.kind == "cpu" else ""
        )
    if forecast.estimated(runs):
        yield (
            f"Estimate: {forecast.estimate.describe()}; small networks take longer. "
            "`make calibrate` measures this device"
        )


def _pair_line(forecast: Forecast) -> Iterator[str]:
    """Epochs of one base method and its post-training: SAM's where there is one."""
    arms = {(a.dataset, a.backbone, a.augmentation, a.method): a for a in forecast.plan.arms}
    sam_first = sorted(arms.items(), key=lambda item: not item[0][3].startswith("sam"))
    for (*cell, method), arm in sam_first:
        base = arms.get((cell[0], cell[1], cell[2], method.partition("+")[0]))
        if "+" in method and base is not None and arm.runs:
            seed = min(arm.runs)
            pair = [a.model_copy(update={"runs": {seed: a.runs[seed]}}) for a in (base, arm)]
            one = sharing(forecast, pair)
            yield (
                f"  (the pair {base.method}, {method} of a seed costs {one.epochs} epochs "
                f"and not {one.unshared_epochs})"
            )
            return


class Launch(NamedTuple):
    """What is known of a sweep just before it is launched.

    Attributes:
        forecast: Of its plan.
        left: Runs that it will carry out.
        fresh: Whether none of them was begun before, so that the whole sweep can be compared.
        jobs: How they are jobs on a cluster; ``None``: workers that stay.
    """

    forecast: Forecast
    left: list[Run]
    fresh: bool
    jobs: Jobs | None = None


def before_launch(
    plan: Plan,
    store: Store,
    source: Calibrated | None,
    *,
    jobs: Jobs | None = None,
    max_hours: float | None = None,
) -> Launch | None:
    """Predict what a sweep is about to cost.

    Args:
        plan: What is to be run.
        store: Where its runs are.
        source: What was measured.
        jobs: How they are jobs on a cluster; ``None``: workers that stay.
        max_hours: Refuse above so many worker-hours.

    Returns:
        ``None`` where nothing was measured and nothing is to be refused.

    Raises:
        UserError: The sweep costs more than ``max_hours``.
    """
    if source is None and max_hours is None:
        return None
    states = {run.identity: store.folder(run).state() for run in plan.runs}
    left = [r for r in plan.runs if states[r.identity] not in (State.DONE, State.FAILED)]
    forecast = predict(plan, source, Estimate())
    if max_hours is not None:
        forecast.refuse_above(max_hours, left)
    fresh = all(states[run.identity] is State.PENDING for run in left)
    return Launch(forecast, left, fresh, jobs)


def after_sweep(launch: Launch, store: Store, wall: float, workers: int) -> Group | None:
    """Predicted beside actual; ``None`` where nothing was measured or nothing was done.

    Args:
        launch: Made before the sweep.
        store: Where its runs are.
        wall: Seconds that the sweep took.
        workers: How many there were at once.
    """
    forecast = launch.forecast
    runs = [r for r in launch.left if forecast.costs[r.identity].basis == "measured"]
    all_taken = taken(forecast.plan, store)
    actual = {r.identity: all_taken[r.identity] for r in runs if r.identity in all_taken}
    if not actual:
        return None
    whole = None
    if launch.fresh and workers and len(actual) == len(launch.left):
        name = "whole sweep" + (f", {workers} jobs at once" if launch.jobs else "")
        whole = (name, forecast.schedule(workers, launch.left, launch.jobs).makespan, wall)
    return comparison(forecast, actual, whole)


def comparison(
    forecast: Forecast, actual: Mapping[str, float], whole: tuple[str, float, float] | None
) -> Group:
    """Predicted beside actual, for the runs of a sweep that has just ended.

    Args:
        forecast: Made before it.
        actual: Seconds that its runs took, by identity.
        whole: What to call the sweep, and the seconds from its start to its end: as simulated
            and as they were. ``None``: unknown.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("predicted beside actual", overflow="fold")
    for column in ("runs", "predicted", "took", "deviation"):
        table.add_column(column, justify="right", no_wrap=True)
    cell = ""
    for stage in stages(forecast.plan):
        done = [run.identity for run in stage.runs if run.identity in actual]
        if not done:
            continue
        if stage.cell != cell:
            cell = stage.cell
            table.add_row(Text(cell, "bold"))
        predicted = sum(forecast.costs[i].seconds for i in done)
        took = sum(actual[i] for i in done)
        table.add_row(f"  {stage.name}", f"{len(done)}", *_beside(predicted, took))
    if whole is not None:
        table.add_row(whole[0], f"{len(actual)}", *_beside(*whole[1:]))
    return Group(Text(), table)


def _beside(predicted: float, took: float) -> tuple[str, str, str]:
    deviation = f"{100 * (predicted / took - 1):+.0f}%" if took > 0 else "–"
    return span(predicted), span(took), deviation


def hours(seconds: float) -> str:
    """Seconds as a number of hours."""
    value = seconds / 3600.0
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def span(seconds: float) -> str:
    """Seconds as a person says them, short ones to a tenth and long ones in days."""
    if seconds >= 2 * _DAY:
        return f"{seconds / _DAY:,.1f} days"
    return f"{seconds:.1f} s" if seconds < 9.95 else duration(seconds)


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000.0
    return f"{count:.3g} TB"
