"""Made-up results folders with everything that a real one has, written through the real store."""

import math
from pathlib import Path

import numpy as np

from benchmarks import plan as planning
from benchmarks.files import canonical_json, sha256, write_json
from benchmarks.run import SCHEMA, Run
from benchmarks.store import Store
from tests.harness import make_plan

DEVICE = "NVIDIA A100"
PAPER = {
    "title": "A made-up sweep",
    "description": "Nothing here was trained.",
    "seeds": [0, 1, 2, 3, 4],
    "datasets": ["cifar10", "cifar100", "svhn", "fashion_mnist"],
    "backbones": ["wrn_28_10"],
    "augmentations": ["basic"],
    "methods": ["sgd", "sam", "sgd+pof", "sam+pof"],
    "data": None,
    "training": {"epochs": 200, "post_epochs": 50, "batch_size": 256, "precision": "bf16"},
    "schedule": {"milestones": [60, 120, 160, 200]},
}


def environment(**changes):
    """Where a made-up run was made."""
    packages = {"torch": "2.13.0", "timm": "1.0.31", "numpy": "2.4.6"} | changes.pop("packages", {})
    base = {
        "code": {"revision": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
        "packages": packages,
        "python": "3.11.7",
        "platform": "Linux x86_64",
        "cpu": "a processor",
        "cores": 64,
        "device": DEVICE,
        "threads": 4,
        "precision": "bf16",
        "slurm": {"SLURM_JOB_ID": "4711"},
    }
    return base | changes


class Sweep:
    """A made-up ``results/<name>``."""

    def __init__(self, folder: Path, changes: dict | None = None, *, name="made", **more) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.plan = make_plan(folder, PAPER | (changes or {}), **more)
        self.folder = folder / "results" / name
        self.store = Store(self.folder / "runs")
        self.plan.write(self.folder / planning.FILE)

    def arm(self, method: str, **cell: str):
        """One arm."""
        return next(
            arm
            for arm in self.plan.arms
            if arm.method == method and all(getattr(arm, k) == v for k, v in cell.items())
        )

    def final(self, method: str, seed: int, **cell: str) -> Run:
        """The run whose last epoch counts."""
        return self.plan.by_identity()[self.arm(method, **cell).runs[seed]]

    def finish(
        self,
        run: Run,
        error: float,
        *,
        epochs: dict | None = None,
        records: dict | None = None,
        where=None,
        **more,
    ):
        """Make up one run.

        ``epochs`` gives test errors after some epochs, ``records`` whatever else is particular
        to an epoch; ``more`` belongs to the result.
        """
        folder = self.store.folder(run)
        folder.create(run)
        folder.add_environment(where or environment(), epoch=run.settings.first_epoch, step=0)
        first, last = run.settings.first_epoch, run.settings.last_epoch
        lines = []
        for epoch in range(first + 1, last + 1):
            record = {
                "epoch": epoch,
                "learning_rate": 0.1,
                "images_per_second": 1000.0,
                "train_loss": 2.3 * math.exp(-epoch / 40) + 0.002,
                "train_error": 90.0 * math.exp(-epoch / 30),
                "test_loss": 2.3 * math.exp(-epoch / 40) + 0.1,
                "test_error": error + 80.0 * math.exp(-epoch / 25) * (epoch < last),
            }
            record["test_error"] = (epochs or {}).get(epoch, record["test_error"])
            if run.settings.pof is not None:
                record |= {"xi_median": 0.5, "cosine": 0.3, "feature_norm": 6.0}
                record |= {"capped_share": 0.0, "expansion": 1.0, "gradient_norm": 0.1}
            record |= (records or {}).get(epoch, {})
            lines.append(canonical_json(record) + "\n")
        (folder.path / "metrics.jsonl").write_text("".join(lines))
        result = {
            "schema": SCHEMA,
            "identity": run.identity,
            "method": run.method,
            "epochs": [first, last],
            "test_error": error,
            "test_loss": 0.1,
            "train_error": 0.0,
            "train_loss": 0.002,
            "seconds": 36.0 * (last - first),
            "starts": 1,
            "weights_sha256": sha256(f"weights {run.identity}"),
            "classifier_sha256": sha256(f"classifier {run.identity}"),
            "checkpoint_sha256": checkpoint(run.identity),
            "metrics_sha256": sha256((folder.path / "metrics.jsonl").read_bytes()),
            "parent": run.parent
            and {"identity": run.parent, "checkpoint_sha256": checkpoint(run.parent)},
            "warnings": [],
        }
        if run.settings.pof is not None:
            result |= {"runaway": False, "capped_share": 0.0}
        folder.write_result(result | more)

    def finish_all(self, error, **more):
        """Finish every run; ``error(run)`` is its test error."""
        for run in self.plan.runs:
            self.finish(run, error(run), **more)

    def measure(self, run: Run, kind: str, split: str = "train", name: str = "", **content):
        """Make up one measurement of a finished run."""
        record = {
            "schema": 1,
            "kind": kind,
            "identity": run.identity,
            "checkpoint_sha256": checkpoint(run.identity),
            "split": split,
            "samples": 50_000,
            "sample_sha256": sha256(f"{run.settings.dataset} {split}"),
            "mode": "eval",
            "seconds": 12.0,
        } | content
        record |= {"digest": sha256(canonical_json(record))}
        path = self.store.folder(run).path / "measurements" / (name or f"{kind}-{split}.json")
        write_json(path, record)
        return path

    def measure_hessian(self, run: Run, top: float, *, converged=True, **content):
        """The largest eigenvalues of the classifier's Hessian."""
        return self.measure(
            run,
            "hessian",
            name="hessian-classifier-train.json",
            **{
                "block": "classifier",
                "matrix": "hessian",
                "weight_decay": 0.0,
                "eigenvalues": [top, top / 2],
                "residuals": [1e-9, 1e-9],
                "converged": converged if isinstance(converged, list) else [converged, True],
                "iterations": 30,
                "seed": 0,
                "solver": "lanczos",
                "trace": 3 * top,
                "trace_se": 0.0,
            }
            | content,
        )

    def measure_ranges(self, run: Run, split: str, peak: float, *, seed=0):
        """Ranges ξ* that pile up at ``peak``: log-normal, with that mode."""
        generator = np.random.default_rng([seed, split == "test"])
        xi = peak * np.exp(0.3 * generator.standard_normal(400) + 0.3**2)
        return self.measure(
            run,
            "range",
            split,
            batch_size=256,
            xi=xi.tolist(),
            capped=[False] * len(xi),
            gamma=2.0,
            loss=0.1,
            effective_measured=0.2,
            effective_predicted=0.2,
        )


def checkpoint(identity: str) -> str:
    """The made-up checksum of a run's checkpoint."""
    return sha256(f"checkpoint {identity}")


# Means that follow the published claims; SAM+PoF on Fashion-MNIST is no better than SAM.
ERRORS = {
    "cifar10": {"sgd": 3.5, "sam": 2.7, "sgd+pof": 3.2, "sam+pof": 2.5},
    "cifar100": {"sgd": 18.8, "sam": 16.5, "sgd+pof": 18.3, "sam+pof": 16.0},
    "svhn": {"sgd": 1.58, "sam": 1.42, "sgd+pof": 1.55, "sam+pof": 1.36},
    "fashion_mnist": {"sgd": 4.57, "sam": 3.98, "sgd+pof": 4.5, "sam+pof": 4.02},
}
_TOPS = {"sgd": 2.0, "sam": 1.0, "sgd+pof": 1.2, "sam+pof": 0.5}


def full_sweep(folder: Path, changes: dict | None = None, **more) -> Sweep:
    """Every run done and measured, all as published, with a spread between seeds."""
    sweep = Sweep(folder, changes, **more)
    generator = np.random.default_rng(5)
    finals = {identity for arm in sweep.plan.arms for identity in arm.runs.values()}
    for run in sweep.plan.runs:
        s = run.settings
        spread = 1.0 + 0.004 * float(generator.standard_normal())
        mean = ERRORS[s.dataset][run.method] + (0.1 if run.parent is None else 0.0)
        epochs = {210: mean * spread} if s.pof is not None else {}
        sweep.finish(run, round(mean * spread, 2), epochs=epochs)
        if run.identity in finals:
            top = _TOPS[run.method] * math.exp(0.06 * float(generator.standard_normal()))
            sweep.measure_hessian(run, top)
        elif run.method == "sam":
            sweep.measure_ranges(run, "train", 0.5, seed=s.seed)
            sweep.measure_ranges(run, "test", 1.0, seed=s.seed + 100)
    return sweep
