"""What a symmetric matrix is to the solvers: a shape, a precision, and a product."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class SymmetricOperator(Protocol):
    """A symmetric matrix known by its products.

    A square ``Tensor`` is one, and so are the curvature operators of curvlinops.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(D, D)."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the vectors that it takes and gives."""
        ...

    @property
    def device(self) -> torch.device:
        """Where these vectors are."""
        ...

    def __matmul__(self, vector: Tensor, /) -> Tensor:
        """The product with a vector (D,), or with k of them as columns (D, k)."""
        ...


@runtime_checkable
class HasDense(Protocol):
    """An operator that can write itself out faster than by D products."""

    def dense(self) -> Tensor:
        """The matrix itself, (D, D)."""
        ...


@runtime_checkable
class HasStart(Protocol):
    """An operator that knows where to look for its large eigenvalues."""

    def start(self, generator: torch.Generator, /) -> Tensor:
        """A random vector (D,) in which directions of large eigenvalues are likely large."""
        ...
