"""A list of profiles, one after the other, in pieces of limited time.

For a machine that is lent by the minute: each piece trains and measures as far as its time goes,
leaves checkpoints, and publishes what is finished; the same command goes on where it stopped, on
another machine too if the runs folder was carried there.
"""

import itertools
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks import plan as planning
from benchmarks.files import drafted, exclusive
from benchmarks.report import write_report
from benchmarks.report.index import write_index
from benchmarks.settings import load_profile, profile_name
from benchmarks.store import RunFolder, State, Store

# What is worth a GPU's time, in this order.
GPU = (
    *("gpu-fashion", "gpu-cifar10-jpeg", "gpu-map"),
    *("gpu-arithmetic-fp32", "gpu-arithmetic-bf16", "gpu-arithmetic-compiled"),
    "gpu-wide",
)

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

    Of finished and measured runs that no other waits for, the records alone are packed, first of
    all: they need not be trained again. Then come unfinished runs, then parents with unfinished
    children, then the rest, each with its newest checkpoint, each whole or not at all, as many as
    fit.

    Args:
        profiles: Names or TOML files. Their plans are in the runs folder, or else follow from the
            data of those that are.
        places: Where things are.
        archive: An uncompressed tar file, to be unpacked in another runs folder.
        megabytes: The most it may hold.

    Returns:
        Names of the runs left out for want of room.

    Raises:
        UserError: The archive cannot be written.
    """
    store, parts = Store(places.runs_dir), dict[str, _Part]()
    plans = _plans(profiles, places)
    waited_for = {
        run.parent
        for plan in plans
        for run in plan.runs
        if store.folder(run).state() is not State.DONE
    }
    for plan in plans:
        states = store.states(plan)
        for run in plan.runs:
            if states[run.identity] is not State.PENDING:
                done = states[run.identity] is State.DONE
                parts[run.name] = _part(store.folder(run), done, run.identity in waited_for)
    plan_files = list(filter(Path.exists, _plan_files(profiles, places)))
    room = megabytes * 1e6 - tarfile.RECORDSIZE - sum(map(_size_in_tar, plan_files))
    chosen, left_out = [plan_files], []
    for name, part in sorted(parts.items(), key=lambda item: (item[1].rank, item[0])):
        size = sum(map(_size_in_tar, part.files))
        if size > room:
            left_out.append(name)
            continue
        room -= size
        chosen.append(part.files)
    with drafted(archive) as draft, tarfile.open(draft, "w") as tar:
        for path in itertools.chain.from_iterable(chosen):
            tar.add(path, path.relative_to(places.runs_dir))
    return left_out


def _size_in_tar(path: Path) -> int:
    """At most: blocks of content, a header, and what its name and time may need in another."""
    block = tarfile.BLOCKSIZE
    return -(-path.stat().st_size // block) * block + 3 * block


class _Part(NamedTuple):
    """What is packed of a run.

    Attributes:
        rank: The lower, the earlier.
        files: All of it.
    """

    rank: int
    files: list[Path]


def _part(folder: RunFolder, done: bool, waited_for: bool) -> _Part:
    from benchmarks.measure import Request, missing  # loads PyTorch

    checkpoints = sorted(folder.checkpoints.glob("*.pt"))  # the newest last, by their names
    over = done and not waited_for and not missing(folder, Request())
    behind = set(checkpoints if over else checkpoints[:-1])
    files = [p for p in sorted(folder.path.rglob("*")) if p.is_file() and p not in behind]
    if not done:
        return _Part(1, files)
    return _Part(0 if over else 2 if waited_for else 3, files)


def _plan_files(profiles: Sequence[str], places: Places) -> list[Path]:
    return [planning.file_of(places.runs_dir, profile_name(p)) for p in profiles]


def _plans(profiles: Sequence[str], places: Places) -> list[planning.Plan]:
    """The plans of the profiles, of those that have not had their turn as far as is known."""
    files = _plan_files(profiles, places)
    plans = [planning.read(file) for file in files if file.exists()]
    known = {run.settings.dataset: run.settings.fingerprint for p in plans for run in p.runs}
    for profile, file in zip(profiles, files, strict=True):
        if not file.exists():
            plans.append(planning.expand(load_profile(profile), known, {}))
    return plans
