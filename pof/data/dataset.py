"""What a loaded data set is: two splits of uint8 images, and a fingerprint of their content."""

import hashlib
import json
from dataclasses import dataclass

import torch

from pof.data.catalogue import DatasetInfo


@dataclass(frozen=True)
class Split:
    """Images and their labels, as read: nothing normalised, nothing shuffled.

    Attributes:
        images: uint8, [N, H, W, C].
        labels: int64, [N].
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
        info: What the data set is.
        train: The training split.
        test: The test split.
        fingerprint: See `fingerprint`; the same content has the same one wherever it was found.
        official: Whether the content was held against the official checksums and is the same.
        source: Where it was found, in one phrase.
    """

    info: DatasetInfo
    train: Split
    test: Split
    fingerprint: str
    official: bool
    source: str


def fingerprint(name: str, train: Split, test: Split) -> str:
    """SHA-256 over the name, then shapes, dtypes and bytes of both splits, as "sha256:HEX"."""
    digest = hashlib.sha256(json.dumps(name).encode())
    for split in (train, test):
        for tensor in (split.images, split.labels):
            header = [list(tensor.shape), str(tensor.dtype)]
            digest.update(json.dumps(header).encode())
            digest.update(tensor.contiguous().numpy().reshape(-1).data)
    return f"sha256:{digest.hexdigest()}"
