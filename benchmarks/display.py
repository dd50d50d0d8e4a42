"""What a person sees while runs are carried out: a live table, or plain lines in a log."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import track
from rich.table import Table
from rich.text import Text

from benchmarks.cost import work
from benchmarks.executors.local import Sweep
from benchmarks.plan import Plan
from benchmarks.run import Run
from benchmarks.store import RunFolder, State, Store

_PLAIN_SECONDS = 30.0
_STYLES = {
    State.DONE: "green",
    State.RUNNING: "cyan",
    State.FAILED: "red",
    State.BLOCKED: "red",
    State.UNAVAILABLE: "yellow",
    State.INTERRUPTED: "yellow",
}
_UNDER_WAY = (State.PENDING, State.INTERRUPTED, State.RUNNING)


class Display:
    """Follows a sweep.

    Args:
        console: Where to; a terminal gets a live table, anything else plain lines.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Live | None = None
        self._last_plain = time.monotonic()
        self._work_at_start: float | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def observe(self, sweep: Sweep, changed: Run | None) -> None:
        """Show a change at once, and progress from time to time."""
        if self._work_at_start is None:
            self._work_at_start = work_done(sweep.plan, sweep.store, sweep.states)
        if changed is not None:
            self._announce(sweep, changed)
        if self._live is not None:
            self._live.update(Group(runs_table(sweep.running(), sweep.store), self._total(sweep)))
        elif changed is None and time.monotonic() - self._last_plain > _PLAIN_SECONDS:
            self._last_plain = time.monotonic()
            for run in sweep.running():
                line = f"  {run.label}: {progress_line(sweep.store.folder(run), run)}"
                self.console.print(line, markup=False, highlight=False, soft_wrap=True)
            self.console.print(self._total(sweep))

    def _announce(self, sweep: Sweep, run: Run) -> None:
        state = sweep.states[run.identity]
        if state is State.RUNNING and self._live is not None:
            return
        line = Text.assemble((f"{state:<11}", _STYLES.get(state, "")), " ", run.label)
        if state is State.DONE:
            line.append(f": {outcome_line(sweep.store.folder(run))}")
        elif run.identity in sweep.reasons:
            line.append(f": {sweep.reasons[run.identity]}")
        self.console.print(line, soft_wrap=True)

    def _total(self, sweep: Sweep) -> Text:
        """Over all: how many runs stand where, and the time left at the pace so far."""
        done = work_done(sweep.plan, sweep.store, sweep.states)
        total = sum(work(run) for run in sweep.plan.runs)
        stuck = (State.FAILED, State.BLOCKED)
        hopeless = sum(work(r) for r in sweep.plan.runs if sweep.states[r.identity] in stuck)
        elapsed = time.monotonic() - sweep.began
        pace = (done - (self._work_at_start or 0.0)) / elapsed if elapsed > 0 else 0.0
        left = duration((total - hopeless - done) / pace) if pace > 0 else "unknown"
        return Text(f"{counts_line(sweep.states)} · {duration(elapsed)} so far · {left} left")


def measuring(console: Console, runs: list[Run]) -> Iterator[Run]:
    """Go through runs that are to be measured, showing progress and the time left."""
    if not runs:
        console.print("everything is measured already")
        return
    if console.is_terminal:
        yield from track(runs, "measuring", console=console, transient=True)
    else:
        for i, run in enumerate(runs, 1):
            console.print(f"measuring {i}/{len(runs)}: {run.label}", soft_wrap=True)
            yield run


def work_done(plan: Plan, store: Store, states: dict[str, State]) -> float:
    """Work done on all runs, in the unit of ``cost.work``."""
    shares = {State.DONE: 1.0, State.PENDING: 0.0, State.FAILED: 0.0, State.BLOCKED: 0.0}
    return sum(
        work(run)
        * (
            shares[s]
            if (s := states[run.identity]) in shares
            else share_done(store.folder(run), run)
        )
        for run in plan.runs
    )


def share_done(folder: RunFolder, run: Run) -> float:
    """The part of a run that is trained, in [0, 1]."""
    progress = folder.progress()
    if not progress:
        return 0.0
    first, last = run.settings.first_epoch, run.settings.last_epoch
    within = progress["step"] / progress["steps"] if progress["steps"] else 0.0
    return min(1.0, float(progress["epoch"] - first + within) / (last - first))


def runs_table(runs: list[Run], store: Store) -> Table:
    """Runs at work: stage, epoch, loss, error, speed and time left."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("run", overflow="fold")
    for column in ("epoch", "train loss", "test error", "images/s", "left"):
        table.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(run.label, *_progress_cells(store.folder(run), run))
    return table


def status_view(
    plan: Plan, store: Store, jobs: Mapping[str, str] | None = None
) -> tuple[Group, bool]:
    """Where the runs of a plan stand, read from disk, and whether any of them runs.

    Args:
        plan: The runs.
        store: Their folders.
        jobs: What is to be said of a run's job, by identity.
    """
    jobs = jobs or {}
    states = store.states(plan)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("state", "run", ""):
        table.add_column(column, overflow="fold")
    for run in plan.runs:
        state, folder = states[run.identity], store.folder(run)
        note = ""
        if state is State.DONE:
            note = outcome_line(folder)
        elif state is State.FAILED:
            note = folder.failure()["reason"]
        elif state in (State.RUNNING, State.INTERRUPTED):
            note = progress_line(folder, run)
        if state in _UNDER_WAY and run.identity in jobs:
            note = f"{note} · {jobs[run.identity]}".removeprefix(" · ")
        table.add_row(Text(state, _STYLES.get(state, "")), run.label, Text(note))
    for dataset, reason in plan.unavailable.items():
        table.add_row(Text(State.UNAVAILABLE, _STYLES[State.UNAVAILABLE]), dataset, Text(reason))
    active = any(
        state is State.RUNNING or (state in _UNDER_WAY and name in jobs)
        for name, state in states.items()
    )
    return Group(table, Text(counts_line(states))), active


def progress_line(folder: RunFolder, run: Run) -> str:
    """A run's progress in one line."""
    epoch, loss, error, speed, left = _progress_cells(folder, run)
    return f"epoch {epoch}, train loss {loss}, test error {error}, {speed} images/s, {left} left"


def _progress_cells(folder: RunFolder, run: Run) -> tuple[str, str, str, str, str]:
    progress = folder.progress()
    last = run.settings.last_epoch
    if not progress:
        return (f"{run.settings.first_epoch}/{last}", "–", "–", "–", "–")
    latest = progress["latest"] or {}
    tested = latest if "test_error" in latest else {}
    epoch = progress["epoch"] + (progress["step"] / progress["steps"] if progress["steps"] else 0)
    speed = progress["images_per_second"] or latest.get("images_per_second")
    images = progress["steps"] * run.settings.batch_size
    left = duration((last - epoch) * images / speed) if speed and images else "–"
    return (
        f"{epoch:.1f}/{last}",
        _number(latest.get("train_loss"), "{:.4f}"),
        _number(tested.get("test_error"), "{:.2f}%"),
        _number(speed, "{:.0f}"),
        left,
    )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def outcome_line(folder: RunFolder) -> str:
    """What a finished run gave."""
    result = folder.result()
    line = (
        f"test error {result['test_error']:.2f}%, train loss {result['train_loss']:.4f} "
        f"({duration(result['seconds'])})"
    )
    return line + (" RUNAWAY" if result.get("runaway") else "")


def counts_line(states: dict[str, State]) -> str:
    """How many runs stand where."""
    counts = Counter(states.values())
    parts = [f"{counts[state]} {state.lower()}" for state in State if counts[state]]
    return f"{len(states)} runs: " + ", ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds % 60:02d} s" if minutes else f"{seconds} s"
