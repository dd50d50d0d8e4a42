"""The commands. Nothing heavy is imported until a command needs it."""

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

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
Executor = Annotated[
    Literal["local", "slurm"], typer.Option(help="Processes on this machine, or jobs of Slurm.")
]
SeedsAtOnce = Annotated[
    int,
    typer.Option(
        min=1,
        help="Seeds of a method that a worker trains at once, side by side in one network; "
        "equal to training each alone up to rounding. Local only.",
    ),
]
ClusterFile = Annotated[
    Path | None, typer.Option("--cluster", help="With slurm: the cluster, a TOML file.")
]

SplitBy = Annotated[
    list[str] | None,
    typer.Option(
        help="Give runs that differ in this rows of their own: device, torch, timm, precision, "
        "threads, data, ascent-batch. May be repeated."
    ),
]

SplitOption = Annotated[Literal["train", "test", "both"], typer.Option(help="On whose images.")]
SamplesOption = Annotated[
    int | None, typer.Option(min=1, help="At most so many images, drawn at random.")
]

_CLOSED = "closed; the jobs go on: the same command follows them, `make cancel` ends them"
_DATA, _RUNS, _RESULTS = Path("data"), Path("runs"), Path("results")


def main() -> None:
    """Run the command line; a user's mistake is one line, never a traceback."""
    console = Console(stderr=True)
    # How fetching and decoding data goes on: it may take minutes.
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("pof.data").setLevel(logging.INFO)
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
    executor: Executor = "local",
    cluster: ClusterFile = None,
    seeds_at_once: SeedsAtOnce = 1,
) -> None:
    """Train what a profile asks for and is not trained yet, and write its table."""
    tables, complete = _train(
        profile=profile,
        jobs=jobs,
        data_dir=data_dir,
        runs_dir=runs_dir,
        results_dir=results_dir,
        device=device,
        retry_failed=retry_failed,
        max_gpu_hours=max_gpu_hours,
        executor=executor,
        cluster=cluster,
        seeds_at_once=seeds_at_once,
    )
    _print(f"\n{tables}")
    if not complete:
        sys.exit(1)


def _train(
    *,
    profile: str,
    jobs: int,
    data_dir: Path,
    runs_dir: Path,
    results_dir: Path,
    device: str,
    executor: Literal["local", "slurm"],
    cluster: Path | None,
    retry_failed: bool = False,
    max_gpu_hours: float | None = None,
    seeds_at_once: int = 1,
) -> tuple[str, bool]:
    """Train what is missing and write the results; their tables, and whether every run is done."""
    from benchmarks import cost, forecast, inventory, settings
    from benchmarks import plan as planning
    from benchmarks.display import Display, counts_line
    from benchmarks.executors import local
    from benchmarks.executors.slurm.commands import OnSlurm
    from benchmarks.files import exclusive
    from benchmarks.report import write_report
    from benchmarks.report.index import write_index
    from benchmarks.store import RunFolder, State, Store
    from benchmarks.worker import choose_device, device_name

    console = Console()

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    chosen = settings.load_profile(profile)
    name = settings.profile_name(profile)
    store, published = Store(runs_dir), Store(results_dir / name / "runs")
    if published.root.resolve() == runs_dir.resolve():
        raise UserError(f"{runs_dir}: runs cannot be kept where finished records are published")
    if executor == "slurm" and seeds_at_once > 1:
        raise UserError(
            "--seeds-at-once is for this machine's own workers; on a cluster, runs_per_gpu in its "
            "file lets several runs share a GPU"
        )
    on_slurm = OnSlurm(cluster, runs_dir, data_dir, device) if executor == "slurm" else None
    computes = choose_device("cpu" if on_slurm else device)  # a login node's says nothing
    kind = computes.type
    tell(f"profile {name}: {chosen.title}")
    found = inventory.take(chosen, data_dir, tell)
    plan = planning.expand(chosen, found.fingerprints, found.unavailable)
    plan_file = _plan_file(runs_dir, name)
    plan.write(plan_file)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as for Ctrl-C
    failed = [r for r in plan.runs if store.folder(r).state() is State.FAILED]
    for run in failed if retry_failed else []:
        (on_slurm.retry if on_slurm else RunFolder.retry)(store.folder(run))
    options = local.Options(
        runs_dir=runs_dir.resolve(),
        plan_file=plan_file.resolve(),
        data_dir=data_dir.resolve(),
        jobs=jobs,
        device=kind if device == "auto" else device,
        seeds_at_once=seeds_at_once,
    )
    unfinished = [r for r in plan.runs if store.folder(r).state() in local.STARTABLE]
    workers = jobs or local.default_jobs(options.device, len(unfinished))
    worker = cost.WorkerKind(local.threads_each(workers), workers)
    calibrations = cost.read_calibrations(runs_dir)
    if on_slurm is None:
        jobs_of, source = None, forecast.measured_here(calibrations, device_name(computes), worker)
    else:
        jobs_of = forecast.Jobs(on_slurm.options.cluster)
        source = forecast.choose(calibrations, plan, on_slurm.options.cluster.runs_per_gpu)
    launch = forecast.before_launch(plan, store, source, jobs=jobs_of, max_hours=max_gpu_hours)
    launched = time.time()
    began = time.monotonic()
    try:
        with Display(console) as display:
            if on_slurm is None:
                sweep = local.execute(plan, options, display.observe)
            else:
                sweep = on_slurm.execute(plan, display.observe, tell)
    except KeyboardInterrupt:
        tell(
            "stopped; every run left a checkpoint: the same command continues where it was"
            if on_slurm is None
            else _CLOSED
        )
        raise
    wall = time.monotonic() - began
    with exclusive(runs_dir / "plans" / f"{name}.lock"):
        store.publish(plan, published)
        plan.write(results_dir / name / planning.FILE)
        tables = write_report(results_dir / name)
        write_index(results_dir)
    tell(counts_line(sweep.states))
    if failed and not retry_failed:
        tell(f"{len(failed)} runs had failed before and were not tried again (--retry-failed)")
    at_once = on_slurm.jobs_at_once(plan, launched) if on_slurm else workers
    if launch is not None and (compared := forecast.after_sweep(launch, store, wall, at_once)):
        console.print(compared)
    return tables, not sweep.unfinished()


@app.command()
def resubmit(
    cluster: ClusterFile = None,
    profile: ProfileOption = "quick",
    data_dir: DataDir = _DATA,
    runs_dir: RunsDir = _RUNS,
    results_dir: ResultsDir = _RESULTS,
    device: Device = "auto",
) -> None:
    """Start failed runs again on Slurm, with whatever else is not done, and write the table."""
    reproduce_table(
        profile=profile,
        data_dir=data_dir,
        runs_dir=runs_dir,
        results_dir=results_dir,
        device=device,
        retry_failed=True,
        executor="slurm",
        cluster=cluster,
    )


@app.command()
def cancel(profile: ProfileOption = "quick", runs_dir: RunsDir = _RUNS) -> None:
    """Cancel the Slurm jobs of a profile's runs and nothing else; they leave checkpoints."""
    from benchmarks import plan as planning
    from benchmarks.executors.slurm.commands import Watcher
    from benchmarks.settings import profile_name

    name = profile_name(profile)
    file = _plan_file(runs_dir, name)
    jobs = Watcher(planning.read(file), runs_dir, name).cancel() if file.exists() else []
    print(f"cancelled {len(jobs)} jobs" + (f": {', '.join(jobs)}" if jobs else ""))


@app.command()
def report(
    profile: ProfileOption = "quick",
    results_dir: ResultsDir = _RESULTS,
    split_by: SplitBy = None,
) -> None:
    """Rebuild a profile's tables, plots and pages from the records of its runs; trains nothing."""
    from benchmarks.report import write_report
    from benchmarks.report.index import write_index

    text = write_report(_results(results_dir, profile), split_by=split_by or ())
    write_index(results_dir)
    _print(text)


@app.command()
def explain(
    where: Annotated[Path, typer.Argument(help="A table, page or folder of results/<profile>.")],
    cell: Annotated[
        str | None, typer.Argument(help="A row's place, e.g. digits/wrn_10_1/none/sam+pof.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Rows of this data set.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Rows of this backbone.")] = None,
    augmentation: Annotated[str | None, typer.Option(help="Rows of this augmentation.")] = None,
    method: Annotated[
        str | None, typer.Option(help="An arm (sam+pof), or what follows the plus (pof).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="This seed alone.")] = None,
) -> None:
    """List the runs behind a number, with everything that could have moved it."""
    from benchmarks.report import provenance

    choice = provenance.Choice(cell, dataset, backbone, augmentation, method, seed)
    _print(provenance.explain(where, choice))


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="A results folder, or a profile.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    results_dir: ResultsDir = _RESULTS,
) -> None:
    """Say in which settings and results two profiles or result folders differ."""
    from benchmarks.report.compare import compare as compared

    _print(compared(first, second, results_dir))


@app.command()
def seeds(
    profile: ProfileOption = "quick",
    results_dir: ResultsDir = _RESULTS,
    claim: Annotated[str | None, typer.Option(help="One claim alone.")] = None,
    effect: Annotated[
        float | None,
        typer.Option(help="The true effect to ask about (points, or a ratio); else the one found."),
    ] = None,
) -> None:
    """Say what this many seeds could have seen, and how many a decision would take."""
    from benchmarks.report.seeds import seeds as counted

    _print(counted(_results(results_dir, profile), claim=claim, effect=effect))


@app.command()
def export(
    profile: ProfileOption = "quick",
    results_dir: ResultsDir = _RESULTS,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("export"),
    split_by: SplitBy = None,
) -> None:
    """Write LaTeX and Markdown tables for a paper, and one tidy CSV of all runs."""
    from benchmarks.report.export import export as exported

    for path in exported(_results(results_dir, profile), out, split_by=split_by or ()):
        _print(str(path))


@app.command()
def hessian(
    profile: ProfileOption = "quick",
    block: Annotated[
        str, typer.Option(help="classifier, network, or the path of a module within the network.")
    ] = "classifier",
    matrix: Annotated[
        Literal["hessian", "gauss-newton"], typer.Option(help="Which matrix of the block.")
    ] = "hessian",
    split: SplitOption = "both",
    top: Annotated[int, typer.Option(min=1, help="How many of the largest eigenvalues.")] = 10,
    samples: SamplesOption = None,
    trace_probes: Annotated[
        int, typer.Option(min=2, help="Random vectors that a block's trace is estimated from.")
    ] = 30,
    density_probes: Annotated[
        int, typer.Option(min=1, help="Lanczos runs that a spectral density is averaged over.")
    ] = 4,
    density_steps: Annotated[
        int, typer.Option(min=1, help="Products with the matrix in each of these runs.")
    ] = 50,
    jobs: Annotated[
        int, typer.Option(min=0, help="Worker processes for what is still to be trained.")
    ] = 0,
    data_dir: DataDir = _DATA,
    runs_dir: RunsDir = _RUNS,
    results_dir: ResultsDir = _RESULTS,
    device: Device = "auto",
    executor: Executor = "local",
    cluster: ClusterFile = None,
    seeds_at_once: SeedsAtOnce = 1,
) -> None:
    """Measure the landscape around every finished network; train first what is missing."""
    from dataclasses import asdict

    from benchmarks import measure
    from benchmarks import plan as planning
    from benchmarks.display import measuring
    from benchmarks.executors.slurm.commands import OnSlurm
    from benchmarks.files import exclusive
    from benchmarks.report import write_report
    from benchmarks.report.index import write_index
    from benchmarks.settings import profile_name
    from benchmarks.store import Store
    from benchmarks.worker import choose_device

    # Some run may not be done: those that are, are measured.
    _, complete = _train(
        profile=profile,
        jobs=jobs,
        data_dir=data_dir,
        runs_dir=runs_dir,
        results_dir=results_dir,
        device=device,
        executor=executor,
        cluster=cluster,
        seeds_at_once=seeds_at_once,
    )
    console = Console()

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    name = profile_name(profile)
    planned = planning.read(_plan_file(runs_dir, name))
    request = measure.Request(
        block=block,
        matrix=matrix,
        splits=_splits(split),
        top=top,
        samples=samples,
        trace_probes=trace_probes,
        density_probes=density_probes,
        density_steps=density_steps,
    )
    computes = choose_device("cpu" if executor == "slurm" else device)
    measurer = measure.Measurer(Store(runs_dir), planned, data_dir, computes, request)
    missing = measurer.to_do()
    amiss = []
    if executor == "slurm" and missing:
        tell(f"measuring {len(missing)} networks, in jobs")
        on_slurm = OnSlurm(cluster, runs_dir, data_dir, device)
        try:
            amiss = on_slurm.measure(planned, name, missing, asdict(request), tell)
        except KeyboardInterrupt:
            tell(_CLOSED)
            raise
    else:
        for run in measuring(console, missing):
            amiss += measurer.measure(run)
    with exclusive(runs_dir / "plans" / f"{name}.lock"):
        Store(runs_dir).publish(planned, Store(results_dir / name / "runs"))
        tables = write_report(results_dir / name)
        write_index(results_dir)
    _print("\n".join([*amiss, "", tables]))
    if amiss or not complete:
        sys.exit(1)


@app.command()
def score(
    authors: Annotated[
        Path, typer.Option(help="Folder with the authors' files fet_N.pth and clf_N.pth.")
    ],
    dataset: Annotated[str, typer.Option(help="What they were trained on.")] = "cifar10",
    split: SplitOption = "both",
    samples: SamplesOption = None,
    data_dir: DataDir = _DATA,
    results_dir: ResultsDir = _RESULTS,
    device: Device = "auto",
) -> None:
    """Score the authors' released checkpoints and measure the landscape around them."""
    from benchmarks import authors as released
    from benchmarks import measure, scoring
    from benchmarks.assembly import load_dataset
    from benchmarks.worker import choose_device
    from pof.data import DATASETS

    computes = choose_device(device)
    pairs = released.pairs(authors)
    if dataset not in DATASETS:
        raise UserError(f"no data set {dataset!r}; there are: {', '.join(DATASETS)}")
    images = load_dataset(dataset, data_dir)
    request = measure.Request(splits=_splits(split), samples=samples)
    records, refused = [], []
    for pair in pairs:
        try:
            records += scoring.score(pair, images, computes, request, _print)
        except UserError as error:
            refused.append(f"error: {error}")
    if records:
        table = scoring.write(records, results_dir / "authors")
        _print(f"\n{table}\n\nMore in {results_dir / 'authors'}/scores.csv and scores.json")
    for line in refused:
        _print(line)
    if refused or not all(record["converged"] for record in records):
        sys.exit(1)


@app.command()
def status(
    profile: ProfileOption = "quick",
    runs_dir: RunsDir = _RUNS,
    watch: Annotated[bool, typer.Option(help="Refresh until nothing runs any more.")] = False,
) -> None:
    """Show where the runs of a profile stand."""
    from benchmarks import plan as planning
    from benchmarks.display import status_view
    from benchmarks.executors.slurm.commands import Watcher
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
    watcher = Watcher(plan, runs_dir, name)
    while True:
        view, active = status_view(plan, store, watcher.notes())
        measured, measuring = watcher.measurements()
        if watch and console.is_terminal:
            console.clear()
        console.print(view)
        for line in measured:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if not (watch and (active or measuring)):
            return
        time.sleep(2.0)


@app.command()
def plan(
    profile: ProfileOption = "quick",
    workers: Annotated[str, typer.Option(help="Numbers of GPUs to finish on.")] = "1,4,16,64",
    cluster: Annotated[
        Path | None, typer.Option(help="A cluster's TOML file: what its jobs are allowed.")
    ] = None,
    job_seconds: Annotated[
        float, typer.Option(min=0.0, help="On a cluster: from a job's turn to its start.")
    ] = 0.0,
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
    jobs = None
    if cluster is not None:
        from benchmarks.executors.slurm.cluster import load_cluster

        jobs = forecast.Jobs(load_cluster(cluster), job_seconds)
    together = jobs.cluster.runs_per_gpu if jobs else None
    source = forecast.choose(read_calibrations(runs_dir), expanded, together)
    predicted = forecast.predict(expanded, source, Estimate(peak_tflops, utilisation))
    actual = forecast.taken(expanded, Store(runs_dir))
    console = Console(highlight=False)
    console.print(f"profile {name}: {chosen.title}", markup=False)
    console.print(forecast.plan_view(predicted, actual, counts, jobs))
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
    data_dir: DataDir = _DATA,
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
        expanded,
        computes,
        worker,
        tell,
        data_dir=data_dir.resolve(),
        scratch=runs_dir,
        seconds=seconds,
    )
    path = cost.calibration_file(runs_dir, measured.device)
    with exclusive(path.with_suffix(".lock")):
        if path.exists():
            measured = cost.read_calibration(path).with_newer(measured)
        cost.write_calibration(path, measured)
    tell(f"{measured.device}: kept in {path}")


@app.command()
def campaign(
    profiles: Annotated[
        list[str] | None, typer.Argument(help="Profiles, in this order. [default: gpu-…]")
    ] = None,
    minutes: Annotated[
        float, typer.Option(min=1.0, help="Stop, resumably, before so many minutes are over.")
    ] = 9.5,
    pack: Annotated[
        Path | None, typer.Option(help="Then pack the runs into this tar, to go on elsewhere.")
    ] = None,
    pack_megabytes: Annotated[float, typer.Option(min=0.0, help="Most that it may hold.")] = 60.0,
    pack_results: Annotated[
        Path | None, typer.Option(help="Then pack records, tables and plots into this .tar.gz.")
    ] = None,
    results_megabytes: Annotated[
        float, typer.Option(min=0.0, help="Most that it may take.")
    ] = 16.0,
    speed: Annotated[
        bool, typer.Option(help="Measure speed first, what is not measured yet.")
    ] = True,
    row: Annotated[
        list[str] | None,
        typer.Option(help="A row of it; may be repeated. [default: what a GPU is judged by]"),
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=0, help="Worker processes; 0: one a core, or one on a GPU.")
    ] = 0,
    data_dir: DataDir = _DATA,
    runs_dir: RunsDir = _RUNS,
    results_dir: ResultsDir = _RESULTS,
    device: Device = "auto",
    seeds_at_once: SeedsAtOnce = 1,
) -> None:
    """Measure speed, train and measure profiles in pieces of limited time: a machine on loan."""
    from benchmarks import campaign as campaigning
    from benchmarks.packing import pack_results as packed

    if row:
        from benchmarks.speed import suite
        from benchmarks.worker import choose_device

        suite.choose(
            row, choose_device(device).type
        )  # a wrong name would cost every piece its time
    names = profiles or list(campaigning.GPU)
    places = campaigning.Places(data_dir, runs_dir, results_dir)
    options = ["--jobs", str(jobs), "--device", device, "--seeds-at-once", str(seeds_at_once)]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    stop = time.monotonic() + 60.0 * minutes - campaigning.CLOSING_SECONDS
    complete = campaigning.carry_on(
        names,
        places,
        out_of_time=lambda: time.monotonic() > stop,
        options=options,
        speed=[*(row or campaigning.SPEED), "--device", device] if speed else None,
        tell=_print,
    )
    if pack is not None:
        for name in campaigning.pack(names, places, pack, megabytes=pack_megabytes):
            _print(f"no room in {pack} for {name}")
    if pack_results is not None:
        left = packed(names, results_dir, pack_results, megabytes=results_megabytes)
        if left:
            _print(f"no room in {pack_results} for {len(left)} plots and pages: see make report")
    if not complete:
        sys.exit(1)


@app.command("pack-data")
def pack_data(
    profiles: Annotated[
        list[str] | None, typer.Argument(help="Whose data. [default: gpu-…]")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to gather it in.")] = Path("packed-data"),
    megabytes: Annotated[float, typer.Option(min=0.0, help="Most that it may take.")] = 60.0,
    data_dir: DataDir = _DATA,
) -> None:
    """Gather the data of profiles for a machine without network: its --data-dir."""
    from benchmarks import campaign as campaigning
    from benchmarks.packing import pack_data as packed

    names = profiles or list(campaigning.GPU)
    files = packed(names, data_dir, out, megabytes=megabytes, tell=_print)
    size = sum(path.stat().st_size for path in files)
    _print(f"{size / 1e6:.1f} MB in {out}; there: --data-dir {out}, or DATA_DIR={out}")


@app.command()
def speed(
    rows: Annotated[
        list[str] | None,
        typer.Argument(help="Rows to measure, like sam-step or 'sam-step/wrn*'; all unless given."),
    ] = None,
    data_dir: DataDir = _DATA,
    results_dir: ResultsDir = _RESULTS,
    device: Device = "auto",
    show: Annotated[bool, typer.Option(help="Only show what was measured.")] = False,
    new: Annotated[
        bool, typer.Option(help="Leave out rows with a figure of this machine and revision.")
    ] = False,
) -> None:
    """Measure speed side by side with what one would use instead, and with the arithmetic."""
    import torch

    from benchmarks.speed import suite, table
    from benchmarks.speed.row import Bench
    from benchmarks.worker import choose_device, device_name

    console = Console(highlight=False)
    computes = choose_device(device)
    here = table.machine(device_name(computes), torch.get_num_threads())
    file = table.file_of(results_dir / "speed", here["device"], here["threads"])
    chosen = suite.choose(rows or (), computes.type)
    if show:
        console.print(table.show(table.read(file)))
        return
    if new:
        known = table.measured(file, here, suite.revision())
        chosen = [(r, v) for r, v in chosen if suite.name_of(r, v) not in known]
        if not chosen:
            _print(f"speed: every row asked for has its figure of this revision in {file}")
            return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end what rows have started
    bench = Bench(computes, data_dir)
    broken = []
    for number, (row, variant) in enumerate(chosen, 1):
        name = suite.name_of(row, variant)
        console.print(f"{number}/{len(chosen)} {name}: {row.compares}", markup=False, style="dim")
        try:
            result = suite.measure(bench, row, variant)
        except Exception as error:  # the other rows have their turn all the same
            broken.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
            continue
        if table.merge(file, here, [result], suite.names()):
            console.print("what was measured on another machine or other packages was dropped")
    measured = {suite.name_of(row, variant) for row, variant in chosen}
    console.print(table.show(r for r in table.read(file) if r.row in measured))
    console.print(f"in {file}", markup=False, soft_wrap=True)
    for line in broken:
        _print(f"not measured: {line}")
    if broken:
        sys.exit(1)


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
    serve(worker, worker.carry_out_at_once)


@app.command(hidden=True)
def measure(
    runs_dir: RunsDir,
    plan_file: Annotated[Path, typer.Option(help="The plan of the measurements.")],
    trained_dir: Annotated[Path, typer.Option(help="Where the runs measured are.")],
    trained_plan: Annotated[Path, typer.Option(help="Their plan.")],
    request: Annotated[str, typer.Option(help="What to measure, in JSON.")],
    data_dir: DataDir = _DATA,
    device: Device = "auto",
) -> None:
    """Carry out measurements whose identities come in on standard input (used by jobs)."""
    import json

    from benchmarks import plan as planning
    from benchmarks.executors.protocol import serve
    from benchmarks.measure import Measurer, Request
    from benchmarks.measure_worker import MeasuringWorker
    from benchmarks.store import Store
    from benchmarks.worker import choose_device, compute_deterministically

    compute_deterministically()
    wanted = json.loads(request)
    measurer = Measurer(
        Store(trained_dir),
        planning.read(trained_plan),
        data_dir,
        choose_device(device),
        Request(**wanted | {"splits": tuple(wanted["splits"])}),
    )
    serve(MeasuringWorker(Store(runs_dir), planning.read(plan_file), measurer))


def _print(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _splits(split: Literal["train", "test", "both"]) -> tuple[Literal["train", "test"], ...]:
    return ("train", "test") if split == "both" else (split,)


def _results(results_dir: Path, profile: str) -> Path:
    from benchmarks.settings import profile_name

    return results_dir / profile_name(profile)


def _plan_file(runs_dir: Path, name: str) -> Path:
    from benchmarks import plan as planning

    return planning.file_of(runs_dir, name)
