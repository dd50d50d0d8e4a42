"""Measures the landscape around the networks of finished runs; trains nothing.

Each measurement is a small file ``runs/<run>/measurements/<kind>-….json``, written once it is
whole and signed with a digest: what is there and fits the run's checkpoint is not measured again.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import assembly, checkpoint
from benchmarks.errors import UserError
from benchmarks.files import canonical_json, finite, read_json, sha256, write_json
from benchmarks.plan import Plan
from benchmarks.run import Run
from benchmarks.store import MEASUREMENTS, RunFolder, State, Store
from pof import data
from pof.errors import PofError
from pof.hessian import (
    ClassifierHessian,
    Eigen,
    ImageBatches,
    SpectralDensity,
    SymmetricOperator,
    block_gauss_newton,
    block_hessian,
    cache_features,
    extreme_eigenvalues,
    spectral_density,
    top_eigenvalues,
    trace,
)
from pof.hessian.eigen import DENSE_LIMIT
from pof.landscape import (
    BatchRanges,
    ClassifierLandscape,
    batch_ranges,
    direction_of,
    effective_loss,
    vector_of,
)
from pof.network import Network
from pof.settings import PoFSettings
from pof.training import seed_for

SCHEMA = 1

Split = Literal["train", "test"]

_RANGE_BATCHES = 200
_LINE_POINTS = 61
_PLANE_POINTS = 25
_REACH = 4.0  # lines and planes reach this many times the mean γξ* of the batches


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        block: ``classifier``, ``network`` or a module's path within the network.
        matrix: ``hessian`` or ``gauss-newton`` (the classifier's is both).
        splits: On whose images.
        top: How many of the largest eigenvalues.
        samples: At most so many images of a split, drawn at random; ``None``: all.
        tolerance: Relative residual that counts as converged. ``None``: 1e-6 for the
            classifier, whose arithmetic is float64, and 1e-4 for blocks by autograd in float32.
        max_iterations: Most products with the matrix.
        trace_probes: Random vectors that the trace of a block by autograd is estimated from, a
            product each (the classifier's is exact).
        density_probes: Random vectors that the spectral density is averaged over (a classifier
            that is small enough is solved in full).
        density_steps: Lanczos steps, that is products, for each of those.
        seed: Of start vectors, subsets and batches.
    """

    block: str = "classifier"
    matrix: Literal["hessian", "gauss-newton"] = "hessian"
    splits: tuple[Split, ...] = ("train", "test")
    top: int = 10
    samples: int | None = None
    tolerance: float | None = None
    max_iterations: int = 500
    trace_probes: int = 30
    density_probes: int = 4
    density_steps: int = 50
    seed: int = 0

    @property
    def asked(self) -> float:
        """The tolerance in force."""
        return self.tolerance or (1e-6 if self.block == "classifier" else 1e-4)


@dataclass(frozen=True)
class _Setting:
    """A trained network beside one split of its run's images."""

    network: Network
    images: ImageBatches
    split: Split
    batch_size: int
    pof: PoFSettings
    request: Request


class Measurer:
    """Measures runs of one plan.

    Args:
        store: Where the run folders are, checkpoints included.
        plan: The runs.
        data_dir: Where data sets are.
        device: What computes.
        request: What to measure.
    """

    def __init__(
        self, store: Store, plan: Plan, data_dir: Path, device: torch.device, request: Request
    ) -> None:
        self.store = store
        self.plan = plan
        self.data_dir = data_dir
        self.device = device
        self.request = request
        self._datasets: dict[str, data.Dataset] = {}

    def to_do(self) -> list[Run]:
        """Finished runs that lack a measurement."""
        done = [r for r in self.plan.runs if self.store.folder(r).state() is State.DONE]
        return [run for run in done if self.missing(run)]

    def missing(self, run: Run) -> list[str]:
        """Names of the measurements that a finished run still lacks."""
        return missing(self.store.folder(run), self.request)

    def measure(self, run: Run) -> list[str]:
        """Make the measurements that a finished run lacks.

        Returns:
            A line for each eigenvalue that did not converge.

        Raises:
            UserError: The run's checkpoint is missing or damaged, its data are gone, or there
                is no such block.
        """
        missing = self.missing(run)
        if not missing:
            return []
        folder = self.store.folder(run)
        with folder.lock():
            return list(self._measure(run, folder, missing))

    def _measure(self, run: Run, folder: RunFolder, missing: list[str]) -> Iterator[str]:
        result = folder.result()
        loaded = checkpoint.load_newest(folder.checkpoints)
        if loaded.state is None or loaded.checksum != result["checkpoint_sha256"]:
            raise UserError(
                f"{folder.path}: the final checkpoint is missing or damaged; remove this folder "
                "and run again to train it anew"
            )
        settings = run.settings
        if settings.dataset not in self._datasets:
            self._datasets[settings.dataset] = assembly.load_dataset(
                settings.dataset, self.data_dir
            )
        subject = assembly.prepare_subject(settings, self._datasets[settings.dataset], self.device)
        network = assembly.build_network(settings, subject.info, self.device)
        network.load_state_dict(loaded.state["trainer"]["network"])
        network.eval()
        cell = self.plan.profile.cell(
            settings.dataset, settings.backbone, settings.augmentation.kind
        )
        splits = {
            "train": (subject.train_images, subject.train_labels),
            "test": (subject.test_images, subject.test_labels),
        }
        for split in self.request.splits:
            images = ImageBatches(
                *subset(*splits[split], self.request), subject.normalise, batch_size=500
            )
            setting = _Setting(network, images, split, settings.batch_size, cell.pof, self.request)
            header = {
                "schema": SCHEMA,
                "identity": run.identity,
                "checkpoint_sha256": loaded.checksum,
                "split": split,
                "samples": len(images.labels),
                "sample_sha256": images.hash(),
                "mode": "eval",
            }
            names = _names(self.request, split)
            if any(name in missing for name in names):
                for name, content in zip(names, _contents(setting), strict=True):
                    record = header | content
                    record["digest"] = sha256(canonical_json(record))
                    write_json(folder.path / MEASUREMENTS / name, record)
                    for value, fine in zip(
                        content.get("eigenvalues", []), content.get("converged", []), strict=True
                    ):
                        if not fine:
                            yield f"{run.label}, {split}: eigenvalue {value:.6g} NOT CONVERGED"


def missing(folder: RunFolder, request: Request) -> list[str]:
    """Names of the measurements of a request that a finished run still lacks."""
    wanted = [name for split in request.splits for name in _names(request, split)]
    return [name for name in wanted if not _is_whole(folder, name, request)]


def _names(request: Request, split: Split) -> list[str]:
    """Files that a request gives for one split, in the order in which they are made."""
    block = request.block if request.matrix == "hessian" else f"{request.block}-gauss-newton"
    names = [f"hessian-{block}-{split}.json", f"density-{block}-{split}.json"]
    if request.block == "classifier":
        names += [f"range-{split}.json", f"landscape-{split}.json"]
    return names


def _is_whole(folder: RunFolder, name: str, request: Request) -> bool:
    """Whether a measurement is there, undamaged, of this checkpoint and of this request."""
    path = folder.path / MEASUREMENTS / name
    if not path.exists():
        return False
    try:
        record = read_json(path)
        content = {key: value for key, value in record.items() if key != "digest"}
        return bool(
            record.get("digest") == sha256(canonical_json(content))
            and record["checkpoint_sha256"] == folder.result()["checkpoint_sha256"]
            and record["request"] == _request_of(request)
        )
    except (UserError, KeyError):
        return False


def _request_of(request: Request) -> dict[str, Any]:
    """What of a request can change a number; numbers of random vectors where they are unusual."""
    counts = ("trace_probes", "density_probes", "density_steps")
    return {
        "top": request.top,
        "samples": request.samples,
        "tolerance": request.asked,
        "max_iterations": request.max_iterations,
        "seed": request.seed,
    } | {
        name: getattr(request, name)
        for name in counts
        if getattr(request, name) != getattr(Request, name)
    }


def subset(images: Tensor, labels: Tensor, request: Request) -> tuple[Tensor, Tensor]:
    """All of a split, or a random subset that the request's seed names."""
    if request.samples is None or request.samples >= len(labels):
        return images, labels
    generator = torch.Generator().manual_seed(seed_for(request.seed, "measured subset"))
    chosen = torch.randperm(len(labels), generator=generator)[: request.samples]
    chosen = chosen.to(labels.device)
    return images[chosen], labels[chosen]


def _contents(setting: _Setting) -> Iterator[dict[str, Any]]:
    """The contents of ``_names``, in order."""
    made = _classifier(setting) if setting.request.block == "classifier" else _block(setting)
    while True:
        began = time.monotonic()
        content = next(made, None)
        if content is None:
            return
        content["request"] = _request_of(setting.request)
        content["seconds"] = round(time.monotonic() - began, 3)
        yield content


def _classifier(setting: _Setting) -> Iterator[dict[str, Any]]:
    request = setting.request
    classifier = setting.network.classifier
    cache = cache_features(setting.network, setting.images)
    hessian = ClassifierHessian(cache, classifier.weight, classifier.bias)
    eigen = classifier_eigenvalues(hessian, request)
    yield _eigen_record(request, eigen) | {"trace": hessian.trace(), "trace_se": 0.0}
    if hessian.shape[0] <= DENSE_LIMIT:
        values = torch.linalg.eigvalsh(hessian.dense()).cpu()
        weights = torch.full_like(values, 1.0 / len(values))
    else:
        estimate = _density(hessian, request)
        values, weights = estimate.nodes, estimate.weights
    yield _density_record(request, values, weights)
    landscape = ClassifierLandscape(cache, classifier)
    batch_size = setting.pof.range_batch_size or setting.batch_size
    ranges = classifier_ranges(landscape, setting.pof, batch_size, request)
    effective = effective_loss(landscape, hessian, ranges, setting.pof.gamma)
    yield {
        "kind": "range",
        "batch_size": min(batch_size, len(setting.images.labels)),
        "xi": ranges.xi.tolist(),
        "capped": ranges.capped.tolist(),
        "gradient_norm": ranges.gradient_norm.tolist(),
        "gamma": setting.pof.gamma,
        "loss": effective.loss,
        "effective_measured": finite(effective.measured),
        "effective_predicted": finite(effective.predicted),
        "mean_curvature": finite(effective.curvature),
    }
    yield _landscape_record(landscape, eigen.vectors, ranges.xi[~ranges.capped], setting.pof)


def classifier_eigenvalues(hessian: ClassifierHessian, request: Request) -> Eigen:
    """The largest eigenvalues of a classifier's Hessian, two at least: they span a plane."""
    return top_eigenvalues(
        hessian,
        min(max(request.top, 2), hessian.shape[0]),
        tolerance=request.asked,
        max_iterations=request.max_iterations,
        seed=request.seed,
    )


def classifier_ranges(
    landscape: ClassifierLandscape, pof: PoFSettings, batch_size: int, request: Request
) -> BatchRanges:
    """ξ* of so many mini-batches of a set."""
    return batch_ranges(
        landscape,
        pof,
        batch_size=batch_size,
        batches=_RANGE_BATCHES,
        seed=seed_for(request.seed, "range batches"),
    )


def _landscape_record(
    landscape: ClassifierLandscape, vectors: Tensor, xi: Tensor, pof: PoFSettings
) -> dict[str, Any]:
    """Lines along −ĝ and the top eigenvector, and the plane of the top two eigenvectors."""
    reach = _REACH * (pof.gamma or 1.0) * (float(xi.mean()) if len(xi) else 0.5)
    distances = torch.linspace(-reach, reach, _LINE_POINTS, dtype=torch.float64)
    classifier = landscape.classifier
    downhill = landscape.gradient().unit().scaled(-1.0)
    # An eigenvector has no sign of its own: here it makes an acute angle with −ĝ.
    sign = torch.where(vector_of(downhill) @ vectors < 0, -1.0, 1.0)
    top = direction_of(sign[0] * vectors[:, 0], classifier)
    second = direction_of(sign[1] * vectors[:, 1], classifier)
    grid = torch.linspace(-reach, reach, _PLANE_POINTS, dtype=torch.float64)
    return {
        "kind": "landscape",
        "distance": distances.tolist(),
        "along_gradient": landscape.along(downhill, distances).tolist(),
        "along_eigenvector": landscape.along(top, distances).tolist(),
        "plane_distance": grid.tolist(),
        "plane": landscape.plane(top, second, grid).tolist(),
    }


def _block(setting: _Setting) -> Iterator[dict[str, Any]]:
    request = setting.request
    build: Callable[..., Any] = block_hessian if request.matrix == "hessian" else block_gauss_newton
    block = "" if request.block == "network" else request.block
    try:
        operator = build(setting.network, setting.images, block=block)
    except PofError as error:
        raise UserError(str(error)) from error
    top, low = extreme_eigenvalues(
        operator,
        largest=min(request.top, operator.shape[0] - 1),
        smallest=1,
        tolerance=request.asked,
        max_iterations=request.max_iterations,
        seed=request.seed,
    )
    estimate = trace(operator, probes=request.trace_probes, seed=request.seed)
    yield _eigen_record(request, top) | {
        "smallest": low.values.tolist(),
        "smallest_residuals": [finite(r) for r in low.residuals.tolist()],
        "smallest_converged": low.converged.tolist(),
        "trace": estimate.value,
        "trace_se": estimate.standard_error,
    }
    density = _density(operator, request)
    yield _density_record(request, density.nodes, density.weights)


def _eigen_record(request: Request, eigen: Eigen) -> dict[str, Any]:
    return {
        "kind": "hessian",
        "block": request.block,
        "matrix": request.matrix,
        "weight_decay": 0.0,
        "eigenvalues": eigen.values.tolist(),
        "residuals": [finite(r) for r in eigen.residuals.tolist()],
        "converged": eigen.converged.tolist(),
        "tolerance": eigen.tolerance,
        "iterations": eigen.iterations,
        "start_seed": eigen.seed,
        "solver": eigen.solver,
    }


def _density(operator: SymmetricOperator, request: Request) -> SpectralDensity:
    return spectral_density(
        operator, runs=request.density_probes, steps=request.density_steps, seed=request.seed
    )


def _density_record(request: Request, nodes: Tensor, weights: Tensor) -> dict[str, Any]:
    return {
        "kind": "density",
        "block": request.block,
        "matrix": request.matrix,
        "nodes": nodes.tolist(),
        "weights": weights.tolist(),
        "seed": request.seed,
    }
