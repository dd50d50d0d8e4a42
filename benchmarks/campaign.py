"""A list of profiles, one after the other, in pieces of limited time.

For a machine that is lent by the minute: each piece trains and measures as far as its time goes,
leaves checkpoints, and publishes what is finished; the same command goes on where it stopped, on
another machine too if the runs folder was carried there.
"""

import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks import plan as planning
from benchmarks.files import exclusive, writing
from benchmarks.report import write_report
from benchmarks.report.index import write_index
from benchmarks.settings import load_profile, profile_name
from benchmarks.store import State, Store

# What is worth a GPU's time, in this order.
GPU = ("gpu-fashion", "gpu-cifar10-jpeg", "gpu-map", "gpu-wide")

# Of the rows of ``benchmarks speed``, those that say something on a GPU.
SPEED = (
    *("matmul-share", "plain-loop", "pair-minutes", "seeds-at-once", "peak-memory"),
    *("sam-step", "pof-step", "pof-epoch", "pair", "range-search", "input-share"),
    *("bf16-step", "host-waits"),
)

# Left at the end of a piece for the last checkpoints and the report.
CLOSING_SECONDS = 30.0
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Places:
    """Where things are.

    Attributes:
        data_dir: Data sets.
        runs_dir: Runs, checkpoints and all.
        results_dir: Finished runs' records, tables, plots.
    """

    data_dir: Path
    runs_dir: Path
    results_dir: Path

    def options(self) -> list[str]:
        """As options of every command."""
        return [
            *("--data-dir", str(self.data_dir)),
            *("--runs-dir", str(self.runs_dir)),
            *("--results-dir", str(self.results_dir)),
        ]


def carry_on(
    profiles: Sequence[str],
    places: Places,
    *,
    out_of_time: Callable[[], bool],
    options: Sequence[str] = (),
    speed: Sequence[str] | None = None,
    tell: Callable[[str], None],
) -> bool:
    """Measure speed, then train and measure the profiles in order, as far as the time goes.

    Args:
        profiles: Names or TOML files.
        places: Where things are.
        out_of_time: Asked a few times a second; then what is running is stopped.
        options: More options of ``benchmarks hessian`` (``--jobs``, ``--device``).
        speed: Rows and options of ``benchmarks speed``; ``None``: it is not measured. A row that
            has a figure of this machine and revision is not measured again.
        tell: Takes lines for people.

    Returns:
        Whether all is complete. A profile with failed runs is not, nor are rows that broke off,
        and neither keeps the next from its turn.

    Raises:
        UserError: A profile is wrong.
    """
    for profile in profiles:
        load_profile(profile)
    complete = True
    if speed is not None:
        where = ("--data-dir", str(places.data_dir), "--results-dir", str(places.results_dir))
        ended = _run(["speed", "--new", *speed, *where], out_of_time)
        if ended is None:
            tell("time is up in the rows of speed: the same command goes on from here")
            return False
        complete = ended == 0
    for profile in profiles:
        command = ["hessian", "--profile", profile, *places.options(), *options]
        ended = _run(command, out_of_time)
        if ended is None:
            _publish(profile, places)
            tell(f"time is up in {profile}: the same command goes on from here")
            return False
        complete = complete and ended == 0
    return complete


def _run(command: Sequence[str], out_of_time: Callable[[], bool]) -> int | None:
    """Carry out one of our commands; its exit status, or ``None`` if time ran out."""
    process = subprocess.Popen([sys.executable, "-m", "benchmarks", *command])
    try:
        while not out_of_time():
            with suppress(subprocess.TimeoutExpired):
                return process.wait(_POLL_SECONDS)
        return None
    finally:
        if process.poll() is None:
            process.terminate()  # runs leave checkpoints; SIGINT is ignored in the background
            process.wait()


def _publish(profile: str, places: Places) -> None:
    """Write the tables of what is done so far."""
    name = profile_name(profile)
    plan_file = planning.file_of(places.runs_dir, name)
    if not plan_file.exists():
        return
    plan, folder = planning.read(plan_file), places.results_dir / name
    with exclusive(plan_file.with_suffix(".lock")):
        Store(places.runs_dir).publish(plan, Store(folder / "runs"))
        plan.write(folder / planning.FILE)
        write_report(folder)
        write_index(places.results_dir)


def pack(profiles: Sequence[str], places: Places, archive: Path, *, megabytes: float) -> list[str]:
    """Pack the runs of profiles so that another machine can go on: records and checkpoints.

    Unfinished runs come first, then parents with unfinished children, then the rest, each whole
    or not at all, as many as fit.

    Args:
        profiles: Names or TOML files, whose plans are in the runs folder.
        places: Where things are.
        archive: An uncompressed tar file, to be unpacked in another runs folder.
        megabytes: The most it may hold.

    Returns:
        Names of the runs left out for want of room.

    Raises:
        UserError: The archive cannot be written.
    """
    store, folders = Store(places.runs_dir), dict[str, int]()
    files = [planning.file_of(places.runs_dir, profile_name(p)) for p in profiles]
    for file in filter(Path.exists, files):
        plan = planning.read(file)
        states = store.states(plan)
        waited_for = {r.parent for r in plan.runs if states[r.identity] is not State.DONE}
        for run in plan.runs:
            if states[run.identity] is State.PENDING:
                continue
            done = states[run.identity] is State.DONE
            rank = (1 if run.identity in waited_for else 2) if done else 0
            folders[run.name] = min(rank, folders.get(run.name, rank))
    room, left_out = megabytes * 1e6, []
    with writing(archive), tarfile.open(archive, "w") as tar:
        for file in filter(Path.exists, files):
            tar.add(file, file.relative_to(places.runs_dir))
        for name in sorted(folders, key=lambda name: (folders[name], name)):
            folder = places.runs_dir / name
            size = sum(p.stat().st_size + 1024 for p in folder.rglob("*"))
            if size > room:
                left_out.append(name)
                continue
            room -= size
            tar.add(folder, name)
    return left_out
