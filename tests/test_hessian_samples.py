import hashlib

import pytest
import torch

from pof.data.augmentation import Normalise
from pof.hessian import ImageBatches, sample_hash


def images():
    pixels = torch.arange(5 * 2 * 3, dtype=torch.uint8).view(5, 2, 3, 1)
    return pixels, torch.tensor([0, 1, 2, 1, 0])


def test_the_hash_is_of_shape_type_and_bytes():
    pixels, labels = images()
    expected = hashlib.sha256(
        b'[[5, 2, 3, 1], "torch.uint8"]'
        + bytes(range(30))
        + b'[[5], "torch.int64"]'
        + b"".join(int(v).to_bytes(8, "little") for v in labels)
    ).hexdigest()
    assert sample_hash(pixels, labels) == f"sha256:{expected}"
    assert sample_hash(pixels.flip(0).flip(0), labels) == f"sha256:{expected}"


def test_any_change_of_the_samples_changes_the_hash():
    pixels, labels = images()
    order = torch.tensor([1, 0, 2, 3, 4])
    hashes = {
        sample_hash(pixels, labels),
        sample_hash(pixels, labels.flip(0) + 1),
        sample_hash(pixels + 1, labels),
        sample_hash(pixels[order], labels[order]),
        sample_hash(pixels[:4], labels[:4]),
        sample_hash(pixels.view(5, 3, 2, 1), labels),
    }
    assert len(hashes) == 6


def test_lengths_must_agree():
    pixels, labels = images()
    with pytest.raises(ValueError, match="5 images have 4 labels"):
        sample_hash(pixels, labels[:4])


def test_batches_walk_over_everything_each_time():
    pixels, labels = images()
    normalise = Normalise((0.0,), (1 / 255,), device=pixels.device)
    batches = ImageBatches(pixels, labels, normalise, batch_size=2)
    assert len(batches) == 3
    for _ in range(2):
        seen = list(batches)
        assert [len(y) for _, y in seen] == [2, 2, 1]
        torch.testing.assert_close(
            torch.cat([x for x, _ in seen]), pixels.permute(0, 3, 1, 2).float()
        )
        assert torch.equal(torch.cat([y for _, y in seen]), labels)
    assert batches.hash() == sample_hash(pixels, labels)
