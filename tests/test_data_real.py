"""The real Fashion-MNIST, fetched once into the folder that POF_TEST_DATA names."""

import os
from pathlib import Path

import pytest

from pof.data import load
from pof.errors import DataUnavailable

FOLDER = Path(os.environ.get("POF_TEST_DATA") or Path(__file__).parents[1] / "data")


def test_fashion_mnist_is_the_real_one():
    try:
        dataset = load("fashion_mnist", FOLDER)
    except DataUnavailable as error:
        if os.environ.get("CI", "").lower() == "true":
            raise
        pytest.skip(str(error))
    pixels = dataset.train.images.double() / 255
    assert dataset.official
    assert tuple(dataset.train.images.shape) == (60_000, 28, 28, 1)
    assert tuple(dataset.test.images.shape) == (10_000, 28, 28, 1)
    assert dataset.train.labels.bincount().tolist() == [6_000] * 10
    assert dataset.test.labels.bincount().tolist() == [1_000] * 10
    assert round(pixels.mean().item(), 4) == 0.2860
    assert round(pixels.std().item(), 4) == 0.3530
    assert dataset.fingerprint == (
        "sha256:ce35785ad7503b776142aef8f3081dd34496f55a02893da34a41abc41f4e574b"
    )
