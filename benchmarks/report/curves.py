"""Learning curves: loss and error over the epochs, every run a line, both stages marked."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from benchmarks.report import style
from benchmarks.report.guards import Evidence, Row
from benchmarks.report.pictures import FOLDER, Picture, drawn, write_csv
from benchmarks.report.results import Results
from benchmarks.report.words import method_title
from benchmarks.run import Run

_PANELS = (
    ("train_loss", "training loss", "log"),
    ("train_error", "training error [%]", "linear"),
    ("test_loss", "test loss", "log"),
    ("test_error", "test error [%]", "linear"),
)
_RANGE_PANELS = (
    ("xi_median", "median ξ* (distance)", "log"),
    ("cosine", "cos(ĝ, running mean)", "linear"),
    ("feature_norm", "mean ‖f‖", "linear"),
    ("capped_share", "share of capped batches", "linear"),
)
# Errors of the first epochs would flatten all that comes after them.
_EARLY = 0.2


def draw(evidence: Evidence, folder: Path) -> list[Picture]:
    """Draw the curves of every cell that has a finished run, and of its post-training.

    Args:
        evidence: Of a profile.
        folder: ``results/<profile>``.
    """
    pictures = []
    for cell in dict.fromkeys(row.cell for row in evidence.rows):
        rows, others = drawn([row for row in evidence.rows if row.cell == cell])
        runs = _runs(evidence.results, rows)
        if runs:
            picture = _curves(evidence.results, rows, cell, runs, folder)
            pictures.append(replace(picture, caption=picture.caption + others))
        post = [run for run in runs if run.settings.algorithm == "pof"]
        if post:
            picture = _ranges(evidence.results, cell, post, folder)
            pictures.append(replace(picture, caption=picture.caption + others))
    return pictures


def _runs(results: Results, rows: Sequence[Row]) -> list[Run]:
    """Every finished run that the rows' runs descend from, each once, in the plan's order."""
    wanted = {
        run.identity
        for row in rows
        for identity in row.runs.values()
        for run in results.lineage(identity)
        if run.identity in results.results
    }
    return [run for run in results.plan.runs if run.identity in wanted]


def _curves(
    results: Results,
    rows: Sequence[Row],
    cell: tuple[str, str, str],
    runs: Sequence[Run],
    folder: Path,
) -> Picture:
    name = "curves-" + "-".join(cell)
    with style.figure(style.WIDTH, 5.6) as fig:
        for axes, (key, label, scale) in zip(fig.subplots(2, 2).flat, _PANELS, strict=True):
            _plot(axes, results, runs, key)
            _finish(axes, label, scale, _values(results, runs, key))
            _mark_stages(axes, runs)
            if key.endswith("error"):
                _leave_out_the_start(axes, results, runs, key)
        _legend(fig, runs)
        style.save(fig, folder / FOLDER / f"{name}.svg")
    keys = [key for key, _, _ in _PANELS] + ["learning_rate"]
    write_csv(_frame(results, runs, keys), folder / FOLDER / f"{name}.csv")
    caption = (
        "Every seed is a line; the dotted line is where the second stage begins. The error axes "
        "leave out the first epochs; training values are means over the epoch's batches in "
        "training mode."
    )
    title = f"Learning curves: {' '.join(cell)}"
    return Picture(f"{name}.svg", title, _alt(results, rows, runs), caption)


def _ranges(
    results: Results, cell: tuple[str, str, str], runs: Sequence[Run], folder: Path
) -> Picture:
    name = "post-training-" + "-".join(cell)
    with style.figure(style.WIDTH, 5.0) as fig:
        for axes, (key, label, scale) in zip(fig.subplots(2, 2).flat, _RANGE_PANELS, strict=True):
            _plot(axes, results, runs, key)
            _finish(axes, label, scale, _values(results, runs, key))
        _legend(fig, runs)
        style.save(fig, folder / FOLDER / f"{name}.svg")
    keys = [key for key, _, _ in _RANGE_PANELS] + ["expansion", "gradient_norm"]
    write_csv(_frame(results, runs, keys), folder / FOLDER / f"{name}.csv")
    lost = [run.label for run in runs if results.results[run.identity].get("runaway")]
    capped = max((results.results[r.identity].get("capped_share", 0.0) for r in runs), default=0.0)
    alt = (
        f"Range ξ*, cosine, feature norm and share of capped batches over the post-training epochs "
        f"of {len(runs)} runs: "
        + (f"{len(lost)} ran away" if lost else "no run ran away")
        + f"; at most {100 * capped:.0f}% of a run's batches reached the cap."
    )
    caption = (
        "What post-training did: ξ* over batches that were not capped, the cosine between ĝ and "
        "the running mean of gradients (towards 1: every batch pulls one way), the features' norm. "
        "ξ* and cosine growing together are a runaway."
    )
    return Picture(f"{name}.svg", f"Post-training: {' '.join(cell)}", alt, caption)


def _series(results: Results, run: Run, key: str) -> tuple[list[int], list[float]]:
    """Epochs and values of a run, begun where its parent ended so that lines meet."""
    records = list(results.metrics[run.identity])
    if run.parent is not None:
        records = results.metrics.get(run.parent, [])[-1:] + records
    found = [(record["epoch"], record[key]) for record in records if record.get(key) is not None]
    return [epoch for epoch, _ in found], [float(value) for _, value in found]


def _plot(axes: Axes, results: Results, runs: Sequence[Run], key: str) -> None:
    """A line for every run, with markers where it has few points."""
    for run in runs:
        epochs, values = _series(results, run, key)
        axes.plot(
            epochs,
            values,
            **style.method_line(run.method),
            alpha=0.75,
            linewidth=1.1,
            marker=style.method_marker(run.method) if len(values) < 12 else "",
            markersize=3.5,
        )


def _values(results: Results, runs: Sequence[Run], key: str) -> list[float]:
    return [value for run in runs for value in _series(results, run, key)[1]]


def _finish(axes: Axes, label: str, scale: str, values: Sequence[float]) -> None:
    """Labels, and an axis from 0 unless the values span more than a decade of a log scale."""
    axes.set_title(label)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if scale == "log" and values and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif values:
        low, high = min(0.0, *values), max(0.0, *values)
        axes.set_ylim(1.08 * low, 1.08 * high if high > low else 1.0)


def _mark_stages(axes: Axes, runs: Sequence[Run]) -> None:
    """A line at each epoch where a second stage begins, named beside it."""
    for epoch in sorted({run.settings.first_epoch for run in runs} - {0}):
        axes.axvline(epoch, color=style.GREY, linestyle=":", linewidth=1.0)
        place = {"xycoords": ("data", "axes fraction"), "fontsize": 8, "color": style.GREY}
        common: dict[str, Any] = {"textcoords": "offset points", "va": "top", **place}
        axes.annotate("stage 1", (epoch, 1.0), (-4, -2), ha="right", **common)
        axes.annotate("2", (epoch, 1.0), (4, -2), ha="left", **common)


def _leave_out_the_start(axes: Axes, results: Results, runs: Sequence[Run], key: str) -> None:
    last = max(run.settings.last_epoch for run in runs)
    late = [
        value
        for run in runs
        for epoch, value in zip(*_series(results, run, key), strict=True)
        if epoch > _EARLY * last
    ]
    if late and max(late) > 0:
        axes.set_ylim(0.0, 1.15 * max(late))


def _legend(fig: Figure, runs: Sequence[Run]) -> None:
    methods = list(dict.fromkeys(run.method for run in runs))
    handles = [
        Line2D(
            [],
            [],
            **style.method_line(method),
            marker=style.method_marker(method),
            markersize=4,
            label=method_title(method),
        )
        for method in methods
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))


def _frame(results: Results, runs: Sequence[Run], keys: Sequence[str]) -> pd.DataFrame:
    rows = []
    for run in runs:
        settings = run.settings
        for record in results.metrics[run.identity]:
            rows.append(
                {
                    "dataset": settings.dataset,
                    "backbone": settings.backbone,
                    "augmentation": settings.augmentation.kind,
                    "method": run.method,
                    "seed": settings.seed,
                    "epoch": record["epoch"],
                }
                | {key: record.get(key) for key in keys}
            )
    return pd.DataFrame(rows).astype(dict.fromkeys(keys, "float64"))


def _alt(results: Results, rows: Sequence[Row], runs: Sequence[Run]) -> str:
    """What the curves end in."""
    ends = []
    for row in rows:
        errors = [results.results[i]["test_error"] for i in row.runs.values()]
        if errors:
            span = f"{min(errors):.2f}" + (f"–{max(errors):.2f}" if len(errors) > 1 else "")
            ends.append(f"{method_title(row.arm.method)} {span}%")
    seeds = len({run.settings.seed for run in runs})
    return (
        f"Training and test loss and error over {max(r.settings.last_epoch for r in runs)} epochs, "
        f"{seeds} seed{'s' if seeds != 1 else ''} a method. "
        f"Errors at the end: {', '.join(ends)}."
    )
