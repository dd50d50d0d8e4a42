"""The commands. Nothing heavy is imported until a command needs it."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.errors import UserError

app = typer.Typer(
    help="Does SAM + PoF beat SAM? Train, post-train, and see.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

ProfileOption = Annotated[
    str, typer.Option("--profile", "-p", help="A name in benchmarks/profiles, or a TOML file.")
]
DataDir = Annotated[Path, typer.Option(help="Where data sets are found and put.")]
RunsDir = Annotated[Path, typer.Option(help="Where runs are kept: checkpoints and records.")]
MaxHours = Annotated[
    float | None, typer.Option(min=0.0, help="Refuse to start what is predicted to cost more.")
]
ResultsDir = Annotated[Path, typer.Option(help="Where tables and finished runs' records go.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]

_DATA, _RUNS, _RESULTS = Path("data"), Path("runs"), Path("results")


def main() -> None:
    """Run the command line; a user's mistake is one line, never a traceback."""
    console = Console(stderr=True)
    try:
        app(standalone_mode=True)
    except UserError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


@app.command("reproduce-table")
def reproduce_table(
    profile: ProfileOption = "quick",
    jobs: Annotated[
        int, typer.Option(min=0, help="Worker processes; 0: one a core, or one on a GPU.")
    ] = 0,
    data_dir: DataDir = _DATA,
    runs_dir: RunsDir = _RUNS,
    results_dir: ResultsDir = _RESULTS,
    device: Device = "auto",
    retry_failed: Annotated[bool, typer.Option(help="Try failed runs again.")] = False,
    max_gpu_hours: MaxHours = None,
) -> None:
    """Train what a profile asks for and is not trained yet, and write its table."""
    from benchmarks import forecast, inventory, settings
    from benchmarks import plan as planning
    from benchmarks.cost import WorkerKind
    from benchmarks.display import Display, counts_line
    from benchmarks.executors import local
    from benchmarks.files import exclusive
    from benchmarks.report import write_report
    from benchmarks.store import State, Store
    from benchmarks.worker import choose_device, device_name

    console = Console()

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    chosen = settings.load_profile(profile)
    name = settings.profile_name(profile)
    computes = choose_device(device)
    kind = computes.type
    tell(f"profile {name}: {chosen.title}")
    found = inventory.take(chosen, data_dir, tell)
    plan = planning.expand(chosen, found.fingerprints, found.unavailable)
    plan_file = _plan_file(runs_dir, name)
    plan.write(plan_file)
    store, published = Store(runs_dir), Store(results_dir / name / "runs")
    if published.root.resolve() == runs_dir.resolve():
        raise UserError(f"{runs_dir}: runs cannot be kept where finished records are published")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as for Ctrl-C
    failed = [r for r in plan.runs if store.folder(r).state() is State.FAILED]
    for run in failed if retry_failed else []:
        store.folder(run).retry()
    options = local.Options(
        runs_dir=runs_dir.resolve(),
        plan_file=plan_file.resolve(),
        data_dir=data_dir.resolve(),
        jobs=jobs,
        device=kind if device == "auto" else device,
    )
    unfinished = [r for r in plan.runs if store.folder(r).state() in local.STARTABLE]
    workers = jobs or local.default_jobs(options.device, len(unfinished))
    worker = WorkerKind(local.threads_each(workers), workers)
    launch = forecast.before_launch(
        plan, runs_dir, device_name(computes), worker, max_hours=max_gpu_hours
    )
    began = time.monotonic()
    try:
        with Display(console) as display:
            sweep = local.execute(plan, options, display.observe)
    except KeyboardInterrupt:
        tell("stopped; every run left a checkpoint: the same command continues where it was")
        raise
    wall = time.monotonic() - began
    with exclusive(runs_dir / "plans" / f"{name}.lock"):
        store.publish(plan, published)
        plan.write(results_dir / name / planning.FILE)
        tables = write_report(results_dir / name)
    tell(counts_line(sweep.states))
    if failed and not retry_failed:
        tell(f"{len(failed)} runs had failed before and were not tried again (--retry-failed)")
    tell("")
    tell(tables)
    if launch is not None and (compared := forecast.after_sweep(launch, store, wall)):
        console.print(compared)
    if sweep.unfinished():
        sys.exit(1)


@app.command()
def report(profile: ProfileOption = "quick", results_dir: ResultsDir = _RESULTS) -> None:
    """Rebuild a profile's table from the records of its runs; trains nothing."""
    from benchmarks.report import write_report
    from benchmarks.settings import profile_name

    Console().print(
        write_report(results_dir / profile_name(profile)),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def status(
    profile: ProfileOption = "quick",
    runs_dir: RunsDir = _RUNS,
    watch: Annotated[bool, typer.Option(help="Refresh until nothing runs any more.")] = False,
) -> None:
    """Show where the runs of a profile stand."""
    from benchmarks import plan as planning
    from benchmarks.display import status_view
    from benchmarks.settings import load_profile, profile_name
    from benchmarks.store import Store

    console = Console()
    load_profile(profile)
    name = profile_name(profile)
    file = _plan_file(runs_dir, name)
    if not file.exists():
        line = f"profile {name}: nothing has been run yet in {runs_dir}/"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    plan, store = planning.read(file), Store(runs_dir)
    while True:
        view, active = status_view(plan, store)
        if watch and console.is_terminal:
            console.clear()
        console.print(view)
        if not (watch and active):
            return
        time.sleep(2.0)


@app.command()
def plan(
    profile: ProfileOption = "quick",
    workers: Annotated[str, typer.Option(help="Numbers of GPUs to finish on.")] = "1,4,16,64",
    throttle: Annotated[
        int | None, typer.Option(min=1, help="Most jobs of one array at once.")
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option(min=0.0, help="Hours a job may take; it continues in another.")
    ] = None,
    peak_tflops: Annotated[
        float | None,
        typer.Option(min=0.001, help="For estimates: the device's peak (an A100's unless given)."),
    ] = None,
    utilisation: Annotated[
        float, typer.Option(min=0.001, max=1.0, help="For estimates: the share of it reached.")
    ] = 0.35,
    max_gpu_hours: MaxHours = None,
    runs_dir: RunsDir = _RUNS,
) -> None:
    """Say what a profile costs before it is launched: time, disk, and when it is finished."""
    from benchmarks import forecast
    from benchmarks.cost import Estimate, read_calibrations
    from benchmarks.settings import load_profile, profile_name
    from benchmarks.store import Store

    try:
        counts = [int(number) for number in workers.split(",")]
        if min(counts) < 1:
            raise ValueError
    except ValueError:
        message = f"--workers {workers!r}: give numbers above 0, like 1,4,16"
        raise UserError(message) from None
    chosen = load_profile(profile)
    name = profile_name(profile)
    expanded = forecast.expand_without_data(chosen, _plan_file(runs_dir, name))
    source = forecast.choose(read_calibrations(runs_dir), expanded)
    predicted = forecast.predict(expanded, source, Estimate(peak_tflops, utilisation))
    actual = forecast.taken(expanded, Store(runs_dir))
    limit = None if time_limit is None else 3600.0 * time_limit
    console = Console(highlight=False)
    console.print(f"profile {name}: {chosen.title}", markup=False)
    console.print(
        forecast.plan_view(predicted, actual, counts, throttle=throttle, time_limit=limit)
    )
    if max_gpu_hours is not None:
        left = [run for run in expanded.runs if run.identity not in actual]
        predicted.refuse_above(max_gpu_hours, left)


@app.command()
def calibrate(
    profile: ProfileOption = "quick",
    jobs: Annotated[
        int, typer.Option(min=0, help="Workers at once; 0: as many as reproduce-table starts.")
    ] = 0,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="About how long to measure one kind of step.")
    ] = 3.0,
    runs_dir: RunsDir = _RUNS,
    device: Device = "auto",
) -> None:
    """Measure what the steps of a profile cost on this device; needs no data set."""
    from benchmarks import calibrate as calibration
    from benchmarks import cost, forecast
    from benchmarks.executors import local
    from benchmarks.files import exclusive, writing
    from benchmarks.settings import load_profile, profile_name
    from benchmarks.worker import choose_device

    console = Console()

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    computes = choose_device(device)
    chosen = load_profile(profile)
    expanded = forecast.expand_without_data(chosen, _plan_file(runs_dir, profile_name(profile)))
    workers = jobs or local.default_jobs(computes.type, len(expanded.runs))
    worker = cost.WorkerKind(local.threads_each(workers), workers)
    with writing(runs_dir):
        runs_dir.mkdir(parents=True, exist_ok=True)
    tell(f"measuring with {workers} at once, {worker.threads} threads each …")
    measured = calibration.calibrate(
        expanded, computes, worker, tell, scratch=runs_dir, seconds=seconds
    )
    path = cost.calibration_file(runs_dir, measured.device)
    with exclusive(path.with_suffix(".lock")):
        if path.exists():
            measured = cost.read_calibration(path).with_newer(measured)
        cost.write_calibration(path, measured)
    tell(f"{measured.device}: kept in {path}")


@app.command()
def doctor(data_dir: DataDir = _DATA, runs_dir: RunsDir = _RUNS) -> None:
    """Check data sets, packages, device, disk and write access."""
    from benchmarks.doctor import examine

    if not examine(Console(), data_dir, runs_dir):
        sys.exit(1)


@app.command(hidden=True)
def work(
    runs_dir: RunsDir,
    plan_file: Annotated[Path, typer.Option(help="The plan, written by reproduce-table.")],
    data_dir: DataDir = _DATA,
    device: Device = "auto",
) -> None:
    """Carry out runs whose identities come in on standard input (used by the executors)."""
    parent = os.getppid()  # before the slow imports: the launcher may be gone when they end

    from benchmarks import plan as planning
    from benchmarks.executors.protocol import serve
    from benchmarks.store import Store
    from benchmarks.worker import CHECKPOINT_SECONDS, Worker, choose_device

    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    worker = Worker(
        Store(runs_dir),
        planning.read(plan_file),
        data_dir,
        device=choose_device(device),
        should_stop=lambda: stopping or os.getppid() != parent,
        checkpoint_seconds=float(os.environ.get("POF_CHECKPOINT_SECONDS", CHECKPOINT_SECONDS)),
    )
    serve(worker)


def _plan_file(runs_dir: Path, name: str) -> Path:
    return runs_dir / "plans" / f"{name}.json"
