"""Rows of the curvature: largest eigenvalues beside a forward pass and what people use."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.errors import UserError
from benchmarks.speed.core import ratios
from benchmarks.speed.row import Bench, Row, Variant, peer
from benchmarks.speed.subjects import SMALL, Trained
from pof.hessian import (
    Eigen,
    ImageBatches,
    SymmetricOperator,
    block_hessian,
    classifier_hessian,
    top_eigenvalues,
)

_TIGHT = 1e-6
_PYHESSIAN = 1e-3  # its default tolerance, between two eigenvalues of the iteration
_MOST_ITERATIONS = 1000


def _classifier(trained: Trained, batches: ImageBatches) -> Callable[[], Eigen]:
    def measure() -> Eigen:
        operator = classifier_hessian(trained.network, batches)
        return _converged(top_eigenvalues(operator, tolerance=_TIGHT))

    return measure


def _converged(eigen: Eigen) -> Eigen:
    if not eigen.all_converged:
        raise UserError(f"our eigenvalue did not converge: residual {eigen.residuals.tolist()}")
    return eigen


def _floor(bench: Bench, _: Variant) -> list[float]:
    trained = bench.trained
    batches = trained.batches(bench.scale.whole_set)

    @torch.no_grad()
    def forward() -> None:
        for images, _ in batches:
            trained.network(images)

    timed = bench.alternate({"ours": _classifier(trained, batches), "forward": forward})
    return ratios(timed["ours"], timed["forward"])


class _PyHessian:
    """PyHessian's largest eigenvalue, its start drawn anew at each call."""

    def __init__(self, network: nn.Module, batches: ImageBatches, tolerance: float) -> None:
        self._measure = peer("pyhessian", "PyHessian").hessian
        self.network = network
        self.batches = list(batches)
        self.tolerance = tolerance
        self.calls = 0
        self.vector: list[Tensor] = []

    def __call__(self) -> None:
        torch.manual_seed(self.calls)
        self.calls += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about create_graph
            found = self._measure(
                self.network,
                nn.CrossEntropyLoss(),
                dataloader=self.batches,
                cuda=self.batches[0][0].is_cuda,
            )
            _, vectors = found.eigenvalues(maxIter=_MOST_ITERATIONS, tol=self.tolerance)
        self.vector = vectors[0]
        self.network.zero_grad()

    def residual(self, operator: SymmetricOperator) -> float:
        """‖Hv − λv‖/λ of the vector that it ended with."""
        v = torch.cat([part.reshape(-1) for part in self.vector]).to(operator.dtype)
        product = operator @ v
        value = v @ product
        return float((product - value * v).norm() / value)


def _last_layer_alone(network: nn.Module) -> None:
    """What PyHessian differentiates: the parameters that require a gradient."""
    for name, p in network.named_parameters():
        p.requires_grad_(name.startswith("classifier."))


def _classifier_beside_pyhessian(tolerance: float) -> Callable[[Bench, Variant], list[float]]:
    def measure(bench: Bench, _: Variant) -> list[float]:
        trained = bench.trained
        batches = trained.batches(bench.scale.slow_set)
        theirs = _PyHessian(trained.network, batches, tolerance)
        _last_layer_alone(trained.network)
        try:
            timed = bench.alternate({"theirs": theirs, "ours": _classifier(trained, batches)})
        finally:
            trained.network.requires_grad_(True)
        return ratios(timed["theirs"], timed["ours"])

    return measure


def _classifier_beside_curvlinops(bench: Bench, _: Variant) -> list[float]:
    curvlinops = peer("curvlinops", "curvlinops-for-pytorch")
    from scipy.sparse.linalg import eigsh

    trained = bench.trained
    batches = trained.batches(bench.scale.slow_set)
    data = list(batches)
    network = trained.network

    def theirs() -> None:
        operator = curvlinops.HessianLinearOperator(
            network,
            nn.CrossEntropyLoss(),
            list(network.classifier.parameters()),
            data,
            check_deterministic=False,
        )
        eigsh(operator.to_scipy(), k=1, which="LA", tol=_TIGHT, return_eigenvectors=True)

    timed = bench.alternate({"theirs": theirs, "ours": _classifier(trained, batches)})
    return ratios(timed["theirs"], timed["ours"])


def _network_beside_pyhessian(bench: Bench, _: Variant) -> list[float]:
    """At the residual that PyHessian itself stopped at, each time."""
    trained = bench.trained
    batches = trained.batches(bench.scale.network_set, batch_size=125)
    theirs = _PyHessian(trained.network, batches, _PYHESSIAN)
    judge = block_hessian(trained.network, batches)
    reached = _PYHESSIAN

    def judge_theirs() -> None:
        nonlocal reached
        reached = theirs.residual(judge)

    def ours() -> None:
        operator = block_hessian(trained.network, batches)
        _converged(top_eigenvalues(operator, tolerance=reached, seed=theirs.calls))

    timed = bench.alternate({"theirs": theirs, "ours": ours}, before={"ours": judge_theirs})
    return ratios(timed["theirs"], timed["ours"])


ROWS = (
    Row(
        "classifier-eigenvalue",
        "classifier's λ₁ over 10,000 images to a residual of 1e-6 / one forward pass over them",
        _floor,
        limit=1.0,
        goal=1.15,
        variants=(SMALL,),
    ),
    Row(
        "classifier-pyhessian",
        "PyHessian restricted to the last layer, tolerance 1e-3 / ours to a residual of 1e-6, "
        "2,000 images",
        _classifier_beside_pyhessian(_PYHESSIAN),
        goal=3.0,
        at_least=True,
        variants=(SMALL,),
    ),
    Row(
        "classifier-pyhessian-tight",
        "PyHessian restricted to the last layer, tolerance 1e-6 / ours to a residual of 1e-6, "
        "2,000 images",
        _classifier_beside_pyhessian(_TIGHT),
        goal=10.0,
        at_least=True,
        variants=(SMALL,),
    ),
    Row(
        "classifier-curvlinops",
        "curvlinops' Hessian of the last layer with scipy's eigsh / ours, both to a residual "
        "of 1e-6, 2,000 images",
        _classifier_beside_curvlinops,
        goal=10.0,
        at_least=True,
        variants=(SMALL,),
    ),
    Row(
        "network-pyhessian",
        "whole network's λ₁: PyHessian, tolerance 1e-3 / ours to the residual that PyHessian "
        "reached, 500 images",
        _network_beside_pyhessian,
        goal=2.0,
        at_least=True,
        variants=(SMALL,),
    ),
)
