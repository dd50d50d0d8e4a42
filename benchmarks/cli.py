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
) -> None:
    """Train what a profile asks for and is not trained yet, and write its table."""
    from benchmarks import inventory, settings
    from benchmarks import plan as planning
    from benchmarks.display import Display, counts_line
    from benchmarks.executors import local
    from benchmarks.report import write_report
    from benchmarks.store import State, Store
    from benchmarks.worker import choose_device

    console = Console()

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    chosen = settings.load_profile(profile)
    name = settings.profile_name(profile)
    kind = choose_device(device).type
    tell(f"profile {name}: {chosen.title}")
    found = inventory.take(chosen, data_dir, tell)
    plan = planning.expand(chosen, found.fingerprints, found.unavailable)
    plan_file = _plan_file(runs_dir, name)
    plan.write(plan_file)
    store = Store(runs_dir)
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
    try:
        with Display(console) as display:
            sweep = local.execute(plan, options, display.observe)
    except KeyboardInterrupt:
        tell("stopped; every run left a checkpoint: the same command continues where it was")
        raise
    store.publish(plan, Store(results_dir / name / "runs"))
    plan.write(results_dir / name / planning.FILE)
    tell(counts_line(sweep.states))
    if failed and not retry_failed:
        tell(f"{len(failed)} runs had failed before and were not tried again (--retry-failed)")
    tell("")
    tell(write_report(results_dir / name))
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
        console.print(f"profile {name}: nothing has been run yet in {runs_dir}/")
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
    from benchmarks import plan as planning
    from benchmarks.executors.protocol import serve
    from benchmarks.store import Store
    from benchmarks.worker import CHECKPOINT_SECONDS, Worker, choose_device

    stopping = False
    parent = os.getppid()

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
