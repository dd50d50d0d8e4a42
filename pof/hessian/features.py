"""Features of a whole set, kept from one pass through the feature extractor."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pof.network import Network

CHUNK = 8192


@dataclass(frozen=True)
class FeatureCache:
    """Features of N samples in chunks: N·(d·itemsize + 8) bytes, and no larger allocation.

    Attributes:
        features: Chunks (n, d), on the network's device.
        labels: Chunks (n,).
    """

    features: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]

    def __len__(self) -> int:
        """N, the number of samples."""
        return sum(map(len, self.labels))


@torch.no_grad()
def cache_features(
    network: Network,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    chunk: int = CHUNK,
) -> FeatureCache:
    """Run the feature extractor once over a set, in evaluation mode, and keep what it gives.

    Args:
        network: Its modes of training and evaluation are left as they were found.
        batches: Images (n, C, H, W) as the network takes them, and labels (n,).
        dtype: What the features are stored in; ``None``: as the network computes them.
        chunk: Features a chunk. A product with the Hessian needs a few float64 copies of one
            chunk at a time.

    Raises:
        ValueError: There are no batches, or features are not (n, d).
    """
    extractor = network.feature_extractor
    modes = [(module, module.training) for module in extractor.modules()]
    extractor.eval()
    features: list[Tensor] = []
    labels: list[Tensor] = []
    filled = chunk
    try:
        for images, batch_labels in batches:
            batch = extractor(images)
            if batch.ndim != 2:
                raise ValueError(f"features have shape {tuple(batch.shape)}, not (n, d)")
            labels.append(batch_labels)
            while len(batch):
                if filled == chunk:
                    features.append(batch.new_empty(chunk, batch.shape[1], dtype=dtype))
                    filled = 0
                part = batch[: chunk - filled]
                features[-1][filled : filled + len(part)] = part
                filled += len(part)
                batch = batch[len(part) :]
    finally:
        for module, training in modes:
            module.training = training
    if not features:
        raise ValueError("there are no samples to take features of")
    features[-1] = features[-1][:filled].clone()
    return FeatureCache(tuple(features), torch.cat(labels).split(chunk))
