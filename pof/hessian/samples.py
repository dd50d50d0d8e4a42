"""The images that a measurement is of: walked in the same batches each time, and hashed."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor


def sample_hash(images: Tensor, labels: Tensor) -> str:
    """SHA-256 over shape, dtype and bytes of images and labels, as "sha256:HEX".

    The same samples in another order have another hash.

    Args:
        images: Images as stored, first dimension N.
        labels: (N,).

    Raises:
        ValueError: There are not as many labels as images.
    """
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images have {len(labels)} labels")
    digest = hashlib.sha256()
    for tensor in (images, labels):
        digest.update(json.dumps([list(tensor.shape), str(tensor.dtype)]).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().reshape(-1).data)
    return f"sha256:{digest.hexdigest()}"


@dataclass(frozen=True)
class ImageBatches:
    """Stored images as batches of network input, the same ones at every pass.

    Attributes:
        images: (N, H, W, C) uint8.
        labels: (N,).
        normalise: Pixels (n, H, W, C) to network input (n, H, W, C), say `pof.data`'s
            ``Normalise``.
        batch_size: Images a batch; the last may be smaller.
    """

    images: Tensor
    labels: Tensor
    normalise: Callable[[Tensor], Tensor]
    batch_size: int = 500

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Walk over batches (n, C, H, W), in channels-last memory, and labels (n,)."""
        chunks = zip(
            self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True
        )
        for pixels, labels in chunks:
            yield self.normalise(pixels).permute(0, 3, 1, 2), labels

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.labels) // self.batch_size)

    def hash(self) -> str:
        """The `sample_hash` of these images and labels."""
        return sample_hash(self.images, self.labels)
