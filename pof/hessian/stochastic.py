"""Trace and spectral density of an operator from random vectors, with what they are worth."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pof.hessian.lanczos import Krylov, rademacher
from pof.hessian.operator import SymmetricOperator


@dataclass(frozen=True)
class TraceEstimate:
    """Hutchinson's estimate of a trace.

    Attributes:
        value: Mean of vᵀHv over random sign vectors v: unbiased.
        standard_error: Of that mean (ddof = 1).
        probes: vᵀHv, one a vector, in float64 on the host.
        seed: Seed of the vectors.
    """

    value: float
    standard_error: float
    probes: Tensor
    seed: int


@torch.no_grad()
def trace(operator: SymmetricOperator, *, probes: int = 30, seed: int = 0) -> TraceEstimate:
    """Estimate a trace by one product for each of several random sign vectors.

    Hutchinson, Communications in Statistics 18, 1989.

    Args:
        operator: H, symmetric, (D, D).
        probes: Number of vectors, at least 2.
        seed: Seeds them.

    Raises:
        ValueError: There are too few vectors for a standard error.
    """
    if probes < 2:
        raise ValueError(f"{probes} probe has no standard error: take at least 2")
    generator = torch.Generator().manual_seed(seed)
    quadratic = torch.empty(probes, dtype=torch.float64)
    for i in range(probes):
        vector = rademacher(operator.shape[0], generator).to(operator.device, operator.dtype)
        quadratic[i] = vector.double() @ (operator @ vector).double()
    error = float(quadratic.std() / probes**0.5)
    return TraceEstimate(float(quadratic.mean()), error, quadratic, seed)


@dataclass(frozen=True)
class SpectralDensity:
    """The distribution of an operator's eigenvalues, as weighted points.

    Attributes:
        nodes: Points, one a Ritz value of each run, in float64 on the host.
        weights: Their shares of the D eigenvalues; they sum to 1.
        seed: Seed of the runs' start vectors.
    """

    nodes: Tensor
    weights: Tensor
    seed: int

    def density(self, at: Tensor, width: float) -> Tensor:
        """Density at the points ``at`` (any shape), each node widened to a Gaussian.

        Args:
            at: Where, in units of the eigenvalues.
            width: Standard deviation of the Gaussians, in the same units.
        """
        distance = (at.double()[..., None] - self.nodes) / width
        bell = torch.exp(-0.5 * distance.square()) / (width * (2 * torch.pi) ** 0.5)
        density: Tensor = bell @ self.weights
        return density


@torch.no_grad()
def spectral_density(
    operator: SymmetricOperator, *, steps: int = 50, runs: int = 4, seed: int = 0
) -> SpectralDensity:
    """Stochastic Lanczos quadrature: Gauss quadrature of the spectrum seen by random vectors.

    Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 38, 2017. Each run is exact for moments of the
    eigenvalues up to 2·steps − 1 as its own start vector weighs them.

    Args:
        operator: H, symmetric, (D, D).
        steps: Lanczos steps, that is products, a run; also the vectors held at a time.
        runs: Number of start vectors.
        seed: Seeds them.
    """
    generator = torch.Generator().manual_seed(seed)
    nodes, weights = [], []
    for _ in range(runs):
        start = rademacher(operator.shape[0], generator).to(operator.device, operator.dtype)
        krylov = Krylov(operator, start, min(steps, len(start)), generator)
        while not krylov.full and not krylov.exhausted:
            krylov.extend()
        values, rotation, _ = krylov.ritz()
        nodes.append(values)
        weights.append(rotation[0].square() / runs)
    return SpectralDensity(torch.cat(nodes), torch.cat(weights), seed)
