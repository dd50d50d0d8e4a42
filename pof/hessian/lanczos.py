"""The Lanczos process with full re-orthogonalisation, and restarts that keep what was found."""

import torch
from torch import Tensor

from pof.hessian.operator import SymmetricOperator


class Krylov:
    """An orthonormal basis of a Krylov space and the operator projected onto it.

    For basis Q and projection T = QᵀHQ, HQ = QT + β·q·eᵀ with the next vector q and e the last
    unit vector: a Ritz pair (θ, Qs) has the residual β·|s_last|. This holds across `restart`
    (thick restart: Wu and Simon, SIAM J. Matrix Anal. Appl. 22, 2000). Each new vector is
    orthogonalised twice against the whole basis.

    Args:
        operator: H.
        start: The first vector (D,), of any length.
        capacity: Most vectors held.
        keep_products: Holds HQ too, at as much memory again: `lift` then gives products.
        generator: On the host; draws a new direction where the space is exhausted.

    Attributes:
        size: Vectors in the basis.
        products: Products with the operator so far.
        coupling: β.
        exhausted: Whether the last step found the space invariant (β = 0 to rounding).
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        start: Tensor,
        capacity: int,
        generator: torch.Generator,
        *,
        keep_products: bool = False,
    ) -> None:
        self.operator = operator
        self.generator = generator
        self.size = 0
        self.products = 0
        self.coupling = 0.0
        self.exhausted = False
        self._vectors = start.new_empty(capacity, len(start))
        self._products = torch.empty_like(self._vectors) if keep_products else None
        self._projection = torch.zeros(capacity, capacity, dtype=torch.float64)
        self._next = start / torch.linalg.vector_norm(start)

    @property
    def full(self) -> bool:
        """Whether there is no room for another vector."""
        return self.size == len(self._vectors)

    @property
    def complete(self) -> bool:
        """Whether the basis spans the whole space."""
        return self.size == self._vectors.shape[1]

    def extend(self) -> None:
        """Take the next vector into the basis: one product with the operator."""
        self._vectors[self.size] = self._next
        self.size += 1
        self.products += 1
        product = self.operator @ self._next
        if self._products is not None:
            self._products[self.size - 1] = product
        column, remainder = self._orthogonalise(product)
        self._projection[: self.size, self.size - 1] = column
        self._projection[self.size - 1, : self.size] = column
        self.coupling = float(torch.linalg.vector_norm(remainder))
        scale = float(self._projection[: self.size, : self.size].abs().amax())
        self.exhausted = self.coupling <= 32 * torch.finfo(remainder.dtype).eps * scale
        if not self.exhausted:
            self._next = remainder / self.coupling
            return
        self.coupling = 0.0
        if not self.complete:
            fresh = gaussian(len(remainder), self.generator).to(remainder)
            _, remainder = self._orthogonalise(fresh / torch.linalg.vector_norm(fresh))
            self._next = remainder / torch.linalg.vector_norm(remainder)

    def _orthogonalise(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients along the basis, on the host in float64, and what is left of a vector."""
        basis = self._vectors[: self.size]
        first = basis @ vector
        remainder = vector - first @ basis
        second = basis @ remainder
        remainder -= second @ basis
        return (first.double() + second.double()).cpu(), remainder

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values, ascending; their vectors within the basis, as columns; their residuals."""
        values, rotation = torch.linalg.eigh(self._projection[: self.size, : self.size])
        return values, rotation, self.coupling * rotation[-1].abs()

    def lift(self, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors given within the basis, as columns (size, k), in the whole space: (k, D).

        Returns:
            Them and, where products are kept, their products with H: the same sums of products
            taken, not what the projection makes of them. No rows otherwise.
        """
        columns = rotation.T.to(self._vectors)
        vectors = columns @ self._vectors[: self.size]
        if self._products is None:
            return vectors, vectors[:0]
        return vectors, columns @ self._products[: self.size]

    def restart(self, values: Tensor, rotation: Tensor) -> None:
        """Replace the basis by some of its Ritz vectors; the process goes on from there."""
        vectors, products = self.lift(rotation)
        self.size = len(values)
        self._vectors[: self.size] = vectors
        if self._products is not None:
            self._products[: self.size] = products
        self._projection.zero_()
        self._projection.diagonal()[: self.size] = values


def gaussian(size: int, generator: torch.Generator) -> Tensor:
    """A standard normal vector (size,), drawn on the host: the same on every device."""
    return torch.randn(size, generator=generator, dtype=torch.float64)


def rademacher(size: int, generator: torch.Generator) -> Tensor:
    """A vector (size,) of ±1, drawn on the host: the same on every device."""
    return torch.randint(2, (size,), generator=generator).to(torch.float64) * 2 - 1
