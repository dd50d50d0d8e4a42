"""BatchNorm's running statistics: which forward passes may enter them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def layers(module: nn.Module) -> list[_BatchNorm]:
    """Every BatchNorm layer of ``module`` that keeps running statistics."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@contextmanager
def frozen_statistics(batch_norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Within the context, training-mode forwards use batch statistics and record nothing.

    Nests, and restores what it found also when the body raises.
    """
    before = [layer.track_running_stats for layer in batch_norms]
    for layer in batch_norms:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, tracked in zip(batch_norms, before, strict=True):
            layer.track_running_stats = tracked
