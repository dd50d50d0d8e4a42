"""Small float64 networks and streams that the tests of the methods share."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pof.data.augmentation import Normalise
from pof.data.batches import Batches
from pof.network import Network
from pof.settings import AugmentationSettings

CHANNELS, SIZE, FEATURES, CLASSES = 2, 6, 5, 4


@pytest.fixture
def make_network():
    """Build a float64 network whose features are not affine in any weight."""

    def make(*, batchnorm=True, dropout=0.0, seed=0):
        generator = torch.get_rng_state()
        torch.manual_seed(seed)
        extractor = nn.Sequential(
            nn.Conv2d(CHANNELS, 3, 3, bias=not batchnorm),
            nn.BatchNorm2d(3) if batchnorm else nn.Identity(),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(3 * (SIZE - 2) ** 2, FEATURES),
            nn.Softplus(),
            nn.Dropout(dropout),
        )
        network = Network(extractor, nn.Linear(FEATURES, CLASSES)).double()
        torch.set_rng_state(generator)
        return network

    return make


@pytest.fixture
def make_batch():
    """Draw images (n, C, H, W) in float64 and labels."""

    def make(n=12, seed=0):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(n, CHANNELS, SIZE, SIZE, generator=generator, dtype=torch.float64)
        return images, torch.randint(CLASSES, (n,), generator=generator)

    return make


@pytest.fixture
def make_batches():
    """Build a float64 stream over one fixed set of random pixels."""

    def make(*, n=22, batch_size=8, kind="cutout", order_seed=1, augmentation_seed=2, **options):
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(
            256, (n, SIZE, SIZE, CHANNELS), generator=generator, dtype=torch.uint8
        )
        return Batches(
            pixels,
            torch.randint(CLASSES, (n,), generator=generator),
            batch_size=batch_size,
            augmentation=AugmentationSettings(kind=kind, padding=1, cutout_size=3),
            normalise=Normalise(
                (0.4, 0.6), (0.2, 0.3), device=torch.device("cpu"), dtype=torch.float64
            ),
            order_seed=order_seed,
            augmentation_seed=augmentation_seed,
            **options,
        )

    return make


class NoHostAccess(TorchDispatchMode):
    """Fails on what would make the host wait for the device, or copy to it, on an accelerator."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "item",
        "nonzero",
        "is_nonzero",
        "equal",
        "masked_select",
        "lift_fresh",  # torch.tensor(...) of host numbers
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} waits for the host"
        if name == "index":
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, "indexing with a mask waits for the host"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_host_access():
    return NoHostAccess
