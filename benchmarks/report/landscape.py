"""Plots and tables of the landscape around the classifier: curvature, ranges, lines and planes.

All of it is drawn from ``runs/<run>/measurements``; what was not measured is not drawn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from benchmarks.report import ranges, style
from benchmarks.report.guards import Evidence, Row
from benchmarks.report.measurements import Hessian, Measurement, Ranges
from benchmarks.report.pictures import FOLDER, Picture, drawn, write_csv
from benchmarks.report.results import Results
from benchmarks.report.words import method_title

_WIDTH_DECADES = 0.12  # of the kernel that smooths a spectrum, on the axis of log10 λ
_SMALLEST_SHOWN = 1e-7  # relative to λ₁: below it an eigenvalue is a zero

Cell = tuple[str, str, str]


def draw(evidence: Evidence, folder: Path) -> list[Picture]:
    """Draw whatever of the landscape was measured, a set of plots for each cell.

    Args:
        evidence: Of a profile.
        folder: ``results/<profile>``.
    """
    pictures: list[Picture] = []
    for cell in dict.fromkeys(row.cell for row in evidence.rows):
        rows, others = drawn([row for row in evidence.rows if row.cell == cell and row.runs])
        for plot in (_tops, _spectrum, _density, _ranges, _lines, _surfaces):
            picture = plot(evidence.results, rows, cell, folder)
            if picture is not None:
                pictures.append(replace(picture, caption=picture.caption + others))
    return pictures


def range_frame(evidence: Evidence) -> pd.DataFrame:
    """``range.csv``: ξ* of train and test batches and the effective loss, a row a network.

    Networks are those at the end of the first stage (``stage 1``) and at the end of each arm.
    """
    records = []
    for run in evidence.results.plan.runs:
        for m in evidence.results.measurements.get(run.identity, []):
            if not isinstance(m, Ranges):
                continue
            found = ranges.uncapped(m.xi, m.capped)
            content = m.content
            records.append(
                {
                    "dataset": run.settings.dataset,
                    "backbone": run.settings.backbone,
                    "augmentation": run.settings.augmentation.kind,
                    "method": run.method,
                    "epoch": run.settings.last_epoch,
                    "seed": run.settings.seed,
                    "split": m.split,
                    "samples": m.samples,
                    "batch_size": content["batch_size"],
                    "batches": len(m.xi),
                    "capped": sum(m.capped),
                    "xi_median": float(np.median(found)) if len(found) else np.nan,
                    "xi_peak": _or_nan(m.peak),
                    "gamma": content["gamma"],
                    "loss": content["loss"],
                    "effective_measured": _or_nan(content["effective_measured"]),
                    "effective_predicted": _or_nan(content["effective_predicted"]),
                }
            )
    return pd.DataFrame(records)


def _or_nan(value: float | None) -> float:
    return np.nan if value is None else value


def _find(results: Results, identity: str, kind: str, split: str) -> Measurement | None:
    """The classifier's measurement of one kind on a run's network."""
    for m in results.measurements.get(identity, []):
        if (
            m.kind == kind
            and m.split == split
            and m.content.get("block", "classifier") == ("classifier")
        ):
            return m
    return None


def _hessian(results: Results, identity: str, split: str = "train") -> Hessian | None:
    found = _find(results, identity, "hessian", split)
    return found if isinstance(found, Hessian) and found.matrix == "hessian" else None


def _name(kind: str, cell: Cell) -> str:
    return f"{kind}-" + "-".join(cell)


def _seed_records(results: Results, rows: Sequence[Row]) -> Iterator[tuple[Row, int, str]]:
    for row in rows:
        for seed, identity in sorted(row.runs.items()):
            yield row, seed, identity


def _tops(results: Results, rows: Sequence[Row], cell: Cell, folder: Path) -> Picture | None:
    """λ₁ of each seed: where stage 1 ended, and where each arm ended."""
    records = []
    for row, seed, identity in _seed_records(results, rows):
        lineage = results.lineage(identity)
        for stage, run in enumerate(lineage):
            found = _hessian(results, run.identity)
            if found is not None and found.top_eigenvalue is not None:
                records.append(
                    {
                        "method": row.arm.method,
                        "seed": seed,
                        "stage": stage + 1,
                        "epoch": run.settings.last_epoch,
                        "top_eigenvalue": found.top_eigenvalue,
                    }
                )
    if not records:
        return None
    frame = pd.DataFrame(records)
    name = _name("top-eigenvalue", cell)
    methods = list(dict.fromkeys(frame["method"]))
    with style.figure(style.WIDTH, 3.4) as fig:
        panels = fig.subplots(1, len(methods), sharey=True, squeeze=False)[0]
        for axes, method in zip(panels, methods, strict=True):
            part = frame[frame["method"] == method]
            for _, line in part.groupby("seed"):
                axes.plot(
                    line["stage"],
                    line["top_eigenvalue"],
                    **style.method_line(method),
                    marker=style.method_marker(method),
                    markersize=5,
                )
            axes.set_xticks(sorted(part["stage"].unique()))
            axes.set_xticklabels(sorted(part["epoch"].unique()))
            axes.set_xlim(0.7, part["stage"].max() + 0.3)
            title = method_title(method)
            axes.set_title(title.replace("+", "+\n") if len(methods) > 4 else title)
        fig.supxlabel("epoch", fontsize="medium")
        panels[0].set_ylim(0.0, 1.08 * frame["top_eigenvalue"].max())
        panels[0].set_ylabel("λ₁ of the classifier's Hessian")
        style.save(fig, folder / FOLDER / f"{name}.svg")
    write_csv(frame, folder / FOLDER / f"{name}.csv")
    ends = frame[frame["stage"] == frame["stage"].max()]
    means = [
        f"{method_title(m)} {ends[ends['method'] == m]['top_eigenvalue'].mean():.3g}"
        for m in methods
    ]
    return Picture(
        f"{name}.svg",
        f"Largest eigenvalue: {' '.join(cell)}",
        f"Largest eigenvalue of the classifier's Hessian on training images, a line a seed from "
        f"the end of stage 1 to the end of the arm. Means at the end: {', '.join(means)}.",
        "A line a seed: where the shared first stage ended, and where the arm ended. The paper "
        "says that PoF halves λ₁.",
    )


def _spectrum(results: Results, rows: Sequence[Row], cell: Cell, folder: Path) -> Picture | None:
    """The largest eigenvalues in order."""
    records = []
    for row, seed, identity in _seed_records(results, rows):
        found = _hessian(results, identity)
        if found is not None:
            records += [
                {"method": row.arm.method, "seed": seed, "rank": i + 1, "eigenvalue": value}
                for i, (value, fine) in enumerate(
                    zip(found.eigenvalues, found.converged, strict=True)
                )
                if fine and value > 0
            ]
    if not records:
        return None
    frame = pd.DataFrame(records)
    name = _name("spectrum", cell)
    with style.figure(style.WIDTH, 3.4) as fig:
        axes = fig.subplots()
        for method, part in frame.groupby("method", sort=False):
            for i, (_, line) in enumerate(part.groupby("seed")):
                axes.plot(
                    line["rank"],
                    line["eigenvalue"],
                    **style.method_line(str(method)),
                    marker=style.method_marker(str(method)),
                    markersize=4,
                    alpha=0.8,
                    label=method_title(str(method)) if i == 0 else None,
                )
        axes.set_yscale("log")
        axes.set_xlabel("rank of the eigenvalue")
        axes.set_ylabel("eigenvalue λ")
        axes.set_xticks(range(1, int(frame["rank"].max()) + 1))
        axes.legend()
        style.save(fig, folder / FOLDER / f"{name}.svg")
    write_csv(frame, folder / FOLDER / f"{name}.csv")
    return Picture(
        f"{name}.svg",
        f"Top of the spectrum: {' '.join(cell)}",
        f"The {int(frame['rank'].max())} largest eigenvalues of the classifier's Hessian at the "
        f"end of each arm, all seeds, from {frame['eigenvalue'].max():.3g} down to "
        f"{frame['eigenvalue'].min():.3g}.",
        "The largest eigenvalues at the end of each arm, a line a seed; unconverged ones are "
        "left out.",
    )


def _density(results: Results, rows: Sequence[Row], cell: Cell, folder: Path) -> Picture | None:
    """The spectral density on a log axis, averaged over seeds."""
    found: dict[str, list[tuple[Any, Any]]] = {}
    for row, _, identity in _seed_records(results, rows):
        m = _find(results, identity, "density", "train")
        if m is not None:
            pair = (np.asarray(m.content["nodes"]), np.asarray(m.content["weights"]))
            found.setdefault(row.arm.method, []).append(pair)
    if not found:
        return None
    largest = max(nodes.max() for pairs in found.values() for nodes, _ in pairs)
    low, high = np.log10(largest * _SMALLEST_SHOWN), np.log10(largest) + 3 * _WIDTH_DECADES
    grid = np.linspace(low, high, 300)
    records, zeros = [], []
    name = _name("density", cell)
    with style.figure(style.WIDTH, 3.2) as fig:
        axes = fig.subplots()
        for method, pairs in found.items():
            curves = [_log_density(nodes, weights, grid) for nodes, weights in pairs]
            mean = np.mean(curves, axis=0)
            axes.plot(10**grid, mean, **style.method_line(method), label=method_title(method))
            records += [
                {"method": method, "eigenvalue": 10**at, "density_per_decade": value}
                for at, value in zip(grid, mean, strict=True)
            ]
            zeros.append(np.mean([w[n <= largest * _SMALLEST_SHOWN].sum() for n, w in pairs]))
        axes.set_xscale("log")
        axes.set_xlabel("eigenvalue λ")
        axes.set_ylabel("share of eigenvalues\nper decade")
        axes.set_ylim(bottom=0.0)
        axes.legend()
        style.save(fig, folder / FOLDER / f"{name}.svg")
    write_csv(pd.DataFrame(records), folder / FOLDER / f"{name}.csv")
    return Picture(
        f"{name}.svg",
        f"Spectral density: {' '.join(cell)}",
        f"Density of the classifier's eigenvalues over decades, a line a method, mean over seeds; "
        f"{100 * min(zeros):.0f} to {100 * max(zeros):.0f}% of the eigenvalues lie left of the "
        "axis.",
        "How the eigenvalues of the classifier's Hessian spread over the decades, mean over "
        "seeds. Left of the axis are those that are zero to rounding: one direction for each "
        "feature and the bias leaves the softmax as it is.",
    )


def _log_density(nodes: Any, weights: Any, grid: Any) -> Any:
    kept = nodes > 0
    distance = (grid[:, None] - np.log10(nodes[kept])[None, :]) / _WIDTH_DECADES
    bell = np.exp(-0.5 * distance**2) / (_WIDTH_DECADES * np.sqrt(2 * np.pi))
    return bell @ weights[kept]


def _ranges(results: Results, rows: Sequence[Row], cell: Cell, folder: Path) -> Picture | None:
    """Histograms of ξ* over train and test, on the networks that PoF starts from."""
    bases: dict[str, list[str]] = {}
    for _, _, identity in _seed_records(results, rows):
        start = results.lineage(identity)[0]
        known = bases.setdefault(start.method, [])
        if start.identity not in known and _find(results, start.identity, "range", "train"):
            known.append(start.identity)
    bases = {base: identities for base, identities in bases.items() if identities}
    if not bases:
        return None
    name = _name("range", cell)
    records, said = [], []
    with style.figure(style.WIDTH, 3.2) as fig:
        panels = fig.subplots(1, len(bases), squeeze=False)[0]
        for axes, (base, identities) in zip(panels, bases.items(), strict=True):
            peaks = {}
            for split, colour in (("train", style.BLUE), ("test", style.VERMILLION)):
                found = [_find(results, i, "range", split) for i in identities]
                measured = [m for m in found if isinstance(m, Ranges)]
                xi = np.concatenate([ranges.uncapped(m.xi, m.capped) for m in measured])
                records += [
                    {"base": base, "split": split, "xi": float(value)} for value in sorted(xi)
                ]
                peaks[split] = ranges.peak(xi)
                if len(xi) < ranges.FEWEST or peaks[split] is None:
                    continue
                style_of = {"color": colour, "linestyle": "-" if split == "train" else "--"}
                axes.hist(xi, bins=30, density=True, alpha=0.35, color=colour)
                axes.axvline(peaks[split], **style_of, label=f"{split}: peak {peaks[split]:.2f}")
            axes.set_title(f"after {method_title(base)}, stage 1")
            axes.set_xlabel("ξ* (distance in θ)")
            axes.set_ylabel("density of batches")
            axes.legend()
            if peaks["train"] and peaks["test"]:
                said.append(
                    f"after {method_title(base)} the peaks are at {peaks['train']:.2f} (train) and "
                    f"{peaks['test']:.2f} (test), a ratio of {peaks['test'] / peaks['train']:.2f}"
                )
        style.save(fig, folder / FOLDER / f"{name}.svg")
    write_csv(pd.DataFrame(records), folder / FOLDER / f"{name}.csv")
    finding = "; ".join(said) or "too few ranges were below the cap to have a peak"
    return Picture(
        f"{name}.svg",
        f"Ranges ξ* on training and test images: {' '.join(cell)}",
        f"Histograms of the perturbation range ξ* over mini-batches: {finding}.",
        f"ξ* of mini-batches on the networks that PoF starts from, all seeds together: {finding}. "
        "The poster's histogram has its test peak at about twice the training peak.",
    )


def _comparison(rows: Sequence[Row]) -> list[Row]:
    """The rows that a plot of SAM against SAM+PoF shows; else whatever there is, two at most."""
    preferred = [row for row in rows if row.arm.method in ("sam", "sam+pof")]
    return preferred or list(rows)[:2]


def _lines(results: Results, rows: Sequence[Row], cell: Cell, folder: Path) -> Picture | None:
    """The loss along −ĝ and along the top eigenvector, train and test, SAM against SAM+PoF."""
    records = []
    for row, seed, identity in _seed_records(results, _comparison(rows)):
        for split in ("train", "test"):
            m = _find(results, identity, "landscape", split)
            if m is not None:
                lines = zip(
                    m.content["distance"],
                    m.content["along_gradient"],
                    _turned(np.asarray(m.content["along_eigenvector"])),
                    strict=True,
                )
                records += [
                    {
                        "method": row.arm.method,
                        "seed": seed,
                        "split": split,
                        "distance": t,
                        "along_gradient": down,
                        "along_eigenvector": top,
                    }
                    for t, down, top in lines
                ]
    if not records:
        return None
    frame = pd.DataFrame(records)
    name = _name("lines", cell)
    titles = {
        "along_gradient": "against the gradient, −ĝ",
        "along_eigenvector": "along the top eigenvector",
    }
    with style.figure(style.WIDTH, 5.4) as fig:
        grid = fig.subplots(2, 2, sharex="col")
        for axes_row, split in zip(grid, ("train", "test"), strict=True):
            for axes, (key, title) in zip(axes_row, titles.items(), strict=True):
                _draw_lines(axes, frame[frame["split"] == split], key)
                axes.set_title(f"{split}: {title}")
                axes.set_ylabel("loss")
        for axes in grid[1]:
            axes.set_xlabel("distance from θ₀")
        grid[0][0].legend()
        style.save(fig, folder / FOLDER / f"{name}.svg")
    write_csv(frame, folder / FOLDER / f"{name}.csv")
    return Picture(
        f"{name}.svg",
        f"The loss along lines: {' '.join(cell)}",
        "Cross-entropy over whole sets along two directions from the classifier θ₀, on training "
        "and on test images, every seed: "
        + " against ".join(method_title(m) for m in frame["method"].unique())
        + ".",
        "Each set's own gradient and its own Hessian's top eigenvector; lines reach four times the "
        "mean γξ* of that network's batches. An eigenvector has no sign: the loss rises faster to "
        "the right. A flatter landscape rises later.",
    )


def _turned(losses: Any) -> Any:
    """Losses along eigenvectors, one a dimension, each turned so that they end higher.

    An eigenvector has no sign of its own, and two networks' would be compared back to front.
    """
    for axis in range(losses.ndim):
        if losses.take(0, axis).mean() > losses.take(-1, axis).mean():
            losses = np.flip(losses, axis)
    return losses


def _draw_lines(axes: Axes, frame: pd.DataFrame, key: str) -> None:
    for method, part in frame.groupby("method", sort=False):
        for i, (_, line) in enumerate(part.groupby("seed")):
            axes.plot(
                line["distance"],
                line[key],
                **style.method_line(str(method)),
                linewidth=1.1,
                alpha=0.8,
                label=method_title(str(method)) if i == 0 else None,
            )


def _surfaces(results: Results, rows: Sequence[Row], cell: Cell, folder: Path) -> Picture | None:
    """The training loss over the plane of the top two eigenvectors, of the first seed."""
    shown = []
    for row in _comparison(rows):
        seed, identity = min(row.runs.items())
        m = _find(results, identity, "landscape", "train")
        if m is not None:
            plane = _turned(np.asarray(m.content["plane"]))
            shown.append((row.arm.method, seed, np.asarray(m.content["plane_distance"]), plane))
    if not shown:
        return None
    name = _name("surface", cell)
    reach = min(grid.max() for _, _, grid, _ in shown)
    inside = [
        plane[np.ix_(near, near)] for _, _, grid, plane in shown for near in [np.abs(grid) <= reach]
    ]
    levels = np.geomspace(max(min(p.min() for p in inside), 1e-6), max(p.max() for p in inside), 13)
    with style.figure(style.WIDTH, 3.8) as fig:
        panels = fig.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (method, seed, grid, plane) in zip(panels, shown, strict=True):
            filled = axes.contourf(
                grid,
                grid,
                np.log10(np.clip(plane, levels[0], levels[-1])),
                levels=np.log10(levels),
                cmap="cividis",
            )
            axes.plot(0, 0, marker="+", color="white", markersize=10)
            axes.set_aspect("equal")
            axes.set_xlim(-reach, reach)
            axes.set_ylim(-reach, reach)
            axes.set_title(f"{method_title(method)}, seed {seed}")
            axes.set_xlabel("along the 1st eigenvector")
        panels[0].set_ylabel("along the 2nd eigenvector")
        fig.colorbar(filled, ax=list(panels), label="log₁₀ training loss", format="%.1f")
        style.save(fig, folder / FOLDER / f"{name}.svg")
    records = [
        {"method": method, "seed": seed, "first": s, "second": t, "loss": loss}
        for method, seed, grid, plane in shown
        for t, line in zip(grid, plane, strict=True)
        for s, loss in zip(grid, line, strict=True)
    ]
    write_csv(pd.DataFrame(records), folder / FOLDER / f"{name}.csv")
    return Picture(
        f"{name}.svg",
        f"The loss surface: {' '.join(cell)}",
        "Training loss over the plane that the top two eigenvectors of the classifier's Hessian "
        "span, θ₀ in the middle: "
        + " beside ".join(method_title(method) for method, *_ in shown)
        + ".",
        "Each network's own top two eigenvectors, one scale for both panels; distances in the "
        "classifier's parameters, one seed.",
    )
