"""Paired comparisons at a glance: every seed a dot, the mean and its 95% interval a bar."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.report import quantities, style
from benchmarks.report.errors import differences
from benchmarks.report.guards import Evidence, Row
from benchmarks.report.pictures import FOLDER, Picture, write_csv
from benchmarks.report.statistics import summarise
from benchmarks.report.words import method_title, number


@dataclass(frozen=True)
class _Entry:
    """One line of a plot; effects on the scale on which they are averaged."""

    row: Row
    base: Row
    effects: dict[int, float]


def draw(evidence: Evidence, folder: Path) -> list[Picture]:
    """Draw the differences of test errors and, where measured, the ratios of eigenvalues."""
    entries = [_Entry(*found) for found in differences(evidence) if found[2]]
    ratios = [entry for entry in _ratios(evidence) if entry.effects]
    pictures = []
    if entries:
        _forest(entries, folder, "differences", "difference of test errors [percentage points]")
        alt = f"Paired differences of test errors in percentage points: {_said(entries)}."
        caption = (
            "Left of zero, post-training has the lower error. A dot is a seed, the bar the mean "
            "with its 95% t-interval; a bar across zero decides nothing."
        )
        pictures.append(Picture("differences.svg", "Paired differences", alt, caption))
    if ratios:
        _forest(ratios, folder, "eigenvalue-ratios", "ratio of largest eigenvalues", ratio=True)
        alt = (
            f"Paired ratios of the classifier's largest Hessian eigenvalue: {_said(ratios, True)}."
        )
        caption = (
            "Left of one, post-training has flattened the classifier's landscape; the published "
            "claim is 0.5 (dashed). A dot is a seed, the bar the geometric mean with its 95% "
            "t-interval."
        )
        pictures.append(Picture("eigenvalue-ratios.svg", "Flattening", alt, caption))
    return pictures


def _ratios(evidence: Evidence) -> list[_Entry]:
    entries = []
    for row, base in evidence.pairs():
        quantities.comparable_hessians(evidence.results, row, base)
        tops = quantities.top_eigenvalues(evidence.results, row)
        others = quantities.top_eigenvalues(evidence.results, base)
        effects = {
            seed: math.log(tops[seed] / others[seed])
            for seed in sorted(tops.keys() & others.keys())
            if tops[seed] > 0 and others[seed] > 0
        }
        entries.append(_Entry(row, base, effects))
    return entries


def _forest(
    entries: Sequence[_Entry], folder: Path, name: str, label: str, *, ratio: bool = False
) -> None:
    scale = math.exp if ratio else float
    with style.figure(style.WIDTH, 1.0 + 0.42 * len(entries)) as fig:
        axes = fig.subplots()
        axes.axvline(scale(0.0), color=style.BLACK, linewidth=0.8)
        if ratio:
            axes.axvline(0.5, color=style.GREY, linewidth=0.8, linestyle="--")
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xticks([0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 3, 5])
        for place, entry in enumerate(entries):
            colour = style.method_colour(entry.row.arm.method)
            values = [scale(value) for value in entry.effects.values()]
            axes.plot(values, [place - 0.18] * len(values), "o", color=colour, ms=3.5, alpha=0.5)
            summary = summarise(list(entry.effects.values()))
            if not math.isnan(summary.ci95):
                ends = [scale(summary.low), scale(summary.high)]
                axes.plot(ends, [place, place], color=colour, linewidth=2.0)
            marker = style.method_marker(entry.row.arm.method)
            axes.plot([scale(summary.mean)], [place], marker, color=colour, markersize=7)
        axes.set_yticks(range(len(entries)), [_label(entry) for entry in entries])
        axes.set_ylim(len(entries) - 0.5, -0.5)
        axes.grid(False, axis="y")
        axes.set_xlabel(label)
        if ratio:
            low, high = axes.get_xlim()
            axes.set_xlim(min(low, 0.4), max(high, 1.25))
        style.save(fig, folder / FOLDER / f"{name}.svg")
    write_csv(_frame(entries, scale), folder / FOLDER / f"{name}.csv")


def _label(entry: _Entry) -> str:
    arm, split = entry.row.arm, " ".join(value for _, value in entry.row.split)
    return (
        f"{method_title(arm.method)} against {method_title(entry.base.arm.method)}\n"
        f"{arm.dataset} {arm.backbone} {arm.augmentation} {split}"
    ).rstrip()


def _said(entries: Sequence[_Entry], ratio: bool = False) -> str:
    parts = []
    for entry in entries:
        arm = entry.row.arm
        summary = summarise(list(entry.effects.values()))
        scale = math.exp if ratio else float
        said = number(scale(summary.mean), signed=not ratio)
        if not math.isnan(summary.ci95):
            ends = (number(scale(v), signed=not ratio) for v in (summary.low, summary.high))
            said += " ({} to {})".format(*ends)
        base = method_title(entry.base.arm.method)
        parts.append(
            f"{method_title(arm.method)} against {base} on {arm.dataset} {arm.augmentation} {said}"
        )
    return "; ".join(parts)


def _frame(entries: Sequence[_Entry], scale: Callable[[float], float]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "dataset": entry.row.arm.dataset,
                "backbone": entry.row.arm.backbone,
                "augmentation": entry.row.arm.augmentation,
                "method": entry.row.arm.method,
                "base": entry.base.arm.method,
                "seed": seed,
                "effect": scale(effect),
            }
            | dict(entry.row.split)
            for entry in entries
            for seed, effect in entry.effects.items()
        ]
    )
