"""Scores and measures the authors' released checkpoints: the shortest parity check there is.

One pass of each network over each set gives everything: loss and error, the classifier's largest
eigenvalue and trace, and the ranges ξ* of mini-batches, as `measure` takes them of finished runs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks import authors, measure
from benchmarks.errors import UserError
from benchmarks.files import finite, write_json
from benchmarks.report import ranges
from benchmarks.report.page import markdown
from benchmarks.report.pictures import write_csv
from benchmarks.report.tables import Table
from pof import data
from pof.data.augmentation import Normalise
from pof.hessian import ClassifierHessian, ImageBatches, cache_features
from pof.landscape import ClassifierLandscape
from pof.network import Network
from pof.settings import PoFSettings

BATCH_SIZE = 256  # of the ranges' mini-batches: the protocol's


def score(
    pair: authors.Pair,
    dataset: data.Dataset,
    device: torch.device,
    request: measure.Request,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Everything about one network, a record for each set.

    Args:
        pair: Its files.
        dataset: What it was trained on.
        device: What computes.
        request: On how many images of which splits.
        tell: Takes a line of progress.

    Raises:
        UserError: The files are no such network, or it does not fit the data set.
    """
    info = dataset.info
    backbone, network = authors.load(pair, info.image_size)
    takes = next(network.parameters()).shape[1]
    if (takes, network.classifier.out_features) != (info.channels, info.num_classes):
        raise UserError(
            f"{pair.extractor}: a network for {takes} channels and "
            f"{network.classifier.out_features} classes; {info.name} has {info.channels} and "
            f"{info.num_classes}"
        )
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    normalise = Normalise(info.mean, info.std, device=device)
    records = []
    for split in request.splits:
        part = dataset.train if split == "train" else dataset.test
        images, labels = measure.subset(part.images, part.labels, request)
        tell(f"{pair.name}: {backbone} on {len(labels):,} {split} images of {info.name}")
        batches = ImageBatches(images.to(device), labels.to(device), normalise)
        records.append(
            {"checkpoint": pair.name, "backbone": backbone, "dataset": info.name, "split": split}
            | {"samples": len(labels), "sample_sha256": batches.hash()}
            | _measured(network, batches, request)
        )
    return records


def _measured(network: Network, batches: ImageBatches, request: measure.Request) -> dict[str, Any]:
    cache = cache_features(network, batches)
    landscape = ClassifierLandscape(cache, network.classifier)
    hessian = ClassifierHessian(cache, network.classifier.weight, network.classifier.bias)
    eigen = measure.classifier_eigenvalues(hessian, request)
    found = measure.classifier_ranges(landscape, PoFSettings(), BATCH_SIZE, request)
    converged = bool(eigen.converged[0])
    uncapped = found.xi[~found.capped]
    wrong = landscape.logits.argmax(1) != landscape.labels
    return {
        "error": 100.0 * int(wrong.sum()) / len(wrong),
        "loss": landscape.loss(),
        "top_eigenvalue": float(eigen.values[0]) if converged else None,
        "residual": finite(float(eigen.residuals[0])),
        "converged": converged,
        "trace": hessian.trace(),
        "xi_median": float(uncapped.median()) if len(uncapped) else None,
        "xi_peak": ranges.peak(uncapped.tolist()),
        "batches": len(found.xi),
        "capped": int(found.capped.sum()),
    }


def write(records: list[dict[str, Any]], folder: Path) -> str:
    """Write ``scores.csv`` and ``scores.json``; returns the table for people."""
    write_csv(pd.DataFrame(records), folder / "scores.csv")
    write_json(folder / "scores.json", {"scores": records})
    header = (
        *("checkpoint", "network", "images", "error [%]", "loss"),
        *("λ₁", "residual", "trace", "ξ* median", "ξ* peak"),
    )
    rows = [
        (
            *(r["checkpoint"], r["backbone"], f"{r['dataset']} {r['split']}, {r['samples']:,}"),
            *(f"{r['error']:.2f}", _cell(r["loss"])),
            _cell(r["top_eigenvalue"]) if r["converged"] else "not converged",
            *(_cell(r["residual"], 1), _cell(r["trace"])),
            *(_cell(r["xi_median"]), _cell(r["xi_peak"])),
        )
        for r in records
    ]
    return markdown(Table("scores", "", header, tuple(rows)))


def _cell(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}g}"
