import itertools

import pytest
import torch

from pof import _torchvision
from pof.data.augmentation import Augment, Normalise
from pof.settings import AugmentationSettings

_torchvision.make_importable()
transforms = pytest.importorskip("torchvision.transforms.functional")


def make(kind="basic", seed=0, **settings):
    return Augment(AugmentationSettings(kind=kind, **settings), torch.Generator().manual_seed(seed))


def random_pixels(n, height, width, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = (n, height, width, channels)
    return torch.randint(1, 256, size, generator=generator, dtype=torch.uint8)


def every_crop(image, padding, flip):
    """All results that torchvision's pad, crop and hflip can give, by offset and flip."""
    height, width, _ = image.shape
    padded = transforms.pad(image.permute(2, 0, 1), [padding] * 4)
    crops = {}
    offsets = range(2 * padding + 1)
    for top, left, flipped in itertools.product(
        offsets, offsets, (False, True) if flip else (False,)
    ):
        crop = transforms.crop(padded, top, left, height, width)
        crops[top, left, flipped] = (transforms.hflip(crop) if flipped else crop).permute(1, 2, 0)
    return crops


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize(("height", "width", "channels"), [(5, 5, 3), (4, 7, 1)])
def test_crops_are_torchvisions_all_occur_and_images_are_independent(height, width, channels, flip):
    padding = 2
    image = random_pixels(1, height, width, channels)[0]
    crops = every_crop(image, padding, flip)
    n = 5000
    batch = image.expand(n, -1, -1, -1).contiguous()
    out = make(padding=padding, flip=flip).crop_and_flip(batch)
    assert out.dtype == torch.uint8
    assert out.shape == batch.shape
    matches = torch.stack([(out == crop).flatten(1).all(1) for crop in crops.values()])
    assert (matches.sum(0) == 1).all()  # each is one of torchvision's, bit for bit
    counts = matches.sum(1).double()
    # Uniform over the possible results: χ² with 24 or 49 degrees of freedom, the seed fixed.
    expected = n / len(crops)
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < (86 if flip else 52)  # 0.1% points
    # Neighbours in the batch are drawn apart: no result tells the next one.
    drawn = matches.double().argmax(0)
    repeated = float((drawn[1:] == drawn[:-1]).double().mean())
    assert repeated < 3.0 / len(crops)


def test_flip_turns_half_of_the_images():
    image = random_pixels(1, 3, 4, 1)[0]
    out = make(padding=0).crop_and_flip(image.expand(4000, -1, -1, -1).contiguous())
    flipped = (out == image.flip(1)).flatten(1).all(1)
    kept = (out == image).flatten(1).all(1)
    assert (flipped ^ kept).all()
    assert abs(float(flipped.double().mean()) - 0.5) < 0.03


def test_each_image_is_its_own():
    """A batch of different images: every row of the result comes from the row of the input."""
    pixels = torch.arange(1, 101, dtype=torch.uint8)[:, None, None, None].expand(-1, 6, 6, 2)
    out = make(padding=2).crop_and_flip(pixels.contiguous())
    for i, image in enumerate(out):
        assert set(image.unique().tolist()) <= {0, i + 1}
        assert (image == i + 1).any()


def test_padding_is_black_before_normalisation():
    out = make(padding=3, flip=False).crop_and_flip(torch.full((200, 4, 4, 1), 255).byte())
    assert set(out.unique().tolist()) == {0, 255}


def test_none_changes_nothing():
    pixels = random_pixels(3, 4, 4, 1)
    augment = make(kind="none")
    state = augment.generator.get_state()
    assert torch.equal(augment.crop_and_flip(pixels), pixels)
    images = torch.ones(3, 4, 4, 1)
    assert torch.equal(augment.cut_out(images), torch.ones(3, 4, 4, 1))
    assert torch.equal(augment.generator.get_state(), state)


@pytest.mark.parametrize("kind", ["none", "basic"])
def test_only_cutout_cuts(kind):
    assert (make(kind=kind).cut_out(torch.ones(50, 4, 4, 1)) == 1).all()


@pytest.mark.parametrize("size", [1, 2, 4, 5, 20])
def test_cutout_masks_are_squares_about_every_pixel_clipped_at_the_borders(size):
    height, width, n = 5, 6, 6000
    masks = {}
    for y, x in itertools.product(range(height), range(width)):
        mask = torch.zeros(height, width, dtype=torch.bool)
        top, left = y - size // 2, x - size // 2
        mask[max(top, 0) : top + size, max(left, 0) : left + size] = True
        masks[tuple(mask.flatten().tolist())] = masks.get(tuple(mask.flatten().tolist()), 0) + 1
    out = make(kind="cutout", cutout_size=size).cut_out(torch.ones(n, height, width, 2))
    assert torch.equal(out[..., 0], out[..., 1])  # all channels alike
    assert set(out.unique().tolist()) <= {0.0, 1.0}
    found = {}
    for row in (out[..., 0] == 0).flatten(1).tolist():
        found[tuple(row)] = found.get(tuple(row), 0) + 1
    assert found.keys() == masks.keys()
    chi_squared = 0.0
    for mask, multiplicity in masks.items():
        expected = n * multiplicity / (height * width)
        chi_squared += (found[mask] - expected) ** 2 / expected
    assert chi_squared < 58.3  # the 0.1% point for 29 degrees of freedom, the seed fixed


def test_cutout_writes_the_mean_colour_over_the_normalised_image():
    normalise = Normalise((0.5,), (0.25,), device=torch.device("cpu"))
    images = normalise(random_pixels(50, 8, 8, 1))
    before = images.clone()
    out = make(kind="cutout", cutout_size=4).cut_out(images)
    hidden = out == 0
    assert hidden.flatten(1).any(1).all()
    assert torch.equal(out[~hidden], before[~hidden])


def test_the_seed_decides_every_draw():
    pixels = random_pixels(64, 6, 6, 1)
    results = [make(seed=seed).crop_and_flip(pixels) for seed in (3, 3, 4)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_normalisation_is_torchvisions():
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    pixels = random_pixels(4, 5, 6, 3)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        normalise = Normalise(mean, std, device=torch.device("cpu"), dtype=dtype)
        scaled = pixels.permute(0, 3, 1, 2).double() / 255
        expected = transforms.normalize(scaled, list(mean), list(std))
        found = normalise(pixels).permute(0, 3, 1, 2)
        assert found.dtype == dtype
        assert float((found.double() - expected).abs().max()) < tolerance


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (5, 4)])
def test_the_gather_is_plain_slicing_with_the_same_draws(size, channels):
    pixels = random_pixels(40, size, size, channels)
    found = make(seed=5).crop_and_flip(pixels)
    generator = torch.Generator().manual_seed(5)
    rows, flips, columns = (torch.randint(high, (40,), generator=generator) for high in (9, 2, 9))
    for image, out, row, flip, column in zip(pixels, found, rows, flips, columns, strict=True):
        padded = torch.zeros(size + 8, size + 8, channels, dtype=torch.uint8)
        padded[4:-4, 4:-4] = image
        crop = padded[row : row + size, column : column + size]
        assert torch.equal(out, crop.flip(1) if flip else crop)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [28, 32, 7])
def test_normalising_whole_lines_gives_the_bits_of_pixel_after_pixel(size, channels):
    settings = (0.4914, 0.4822, 0.4465)[:channels], (0.2023, 0.1994, 0.2010)[:channels]
    normalise = Normalise(*settings, device=torch.device("cpu"))
    values = torch.arange(256, dtype=torch.uint8).repeat_interleave(size * size * channels)
    pixels = values.view(256, size, size, channels)
    plain = torch.addcmul(normalise._shift, pixels.float(), normalise._scale)
    assert torch.equal(normalise(pixels), plain)
