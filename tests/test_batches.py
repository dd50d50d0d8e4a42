import copy

import pytest
import torch

from pof.data.augmentation import Normalise
from pof.data.batches import Batches
from pof.settings import AugmentationSettings


def make_numbered(n=10, batch_size=4, **options):
    """Every image is filled with its own number, which is also its label."""
    defaults = {"augmentation": AugmentationSettings(kind="none"), "order_seed": 0}
    return Batches(
        torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 3, 2).contiguous(),
        torch.arange(n),
        batch_size=batch_size,
        normalise=Normalise((0.0, 0.0), (1 / 255, 1 / 255), device=torch.device("cpu")),
        augmentation_seed=0,
        **(defaults | options),
    )


def draw_labels(batches, count):
    return [batches.draw()[1].tolist() for _ in range(count)]


def assert_same_draws(a, b, count):
    for _ in range(count):
        (images, labels), (others, other_labels) = a.draw(), b.draw()
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)


def test_an_epoch_holds_every_image_once_in_a_fresh_order():
    batches = make_numbered()
    assert batches.per_epoch == 3
    orders = []
    for _ in range(4):
        epoch = draw_labels(batches, 3)
        assert [len(batch) for batch in epoch] == [4, 4, 2]
        orders.append(tuple(label for batch in epoch for label in batch))
        assert sorted(orders[-1]) == list(range(10))
    assert len(set(orders)) == 4


@pytest.mark.parametrize(("n", "per_epoch"), [(8, 2), (9, 3), (3, 1)])
def test_batches_an_epoch(n, per_epoch):
    assert make_numbered(n).per_epoch == per_epoch


def test_labels_belong_to_their_images():
    batches = make_numbered()
    for _ in range(6):
        images, labels = batches.draw()
        assert torch.equal(images[:, 0, 0, 0].round().long(), labels)


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_format(channels_last):
    images, _ = make_numbered(channels_last=channels_last).draw()
    assert images.shape == (4, 2, 3, 3)
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    assert images.is_contiguous(memory_format=wanted)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("channels_last", [True, False])
def test_the_memory_format_reaches_the_network_whatever_the_channels(channels, channels_last):
    """With one channel the two formats differ in strides alone, which convolutions go by."""
    batches = Batches(
        torch.zeros(8, 6, 6, channels, dtype=torch.uint8),
        torch.zeros(8, dtype=torch.int64),
        batch_size=4,
        augmentation=AugmentationSettings(kind="none"),
        normalise=Normalise((0.5,) * channels, (0.25,) * channels, device=torch.device("cpu")),
        order_seed=0,
        augmentation_seed=0,
        channels_last=channels_last,
    )
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    other = torch.contiguous_format if channels_last else torch.channels_last
    images, _ = batches.draw()
    convolution = torch.nn.Conv2d(channels, 4, 3).to(memory_format=wanted)
    features = convolution(images)
    assert features.is_contiguous(memory_format=wanted)
    assert not features.is_contiguous(memory_format=other)


def test_the_order_is_independent_of_the_augmentation(make_batches):
    plain = make_batches(kind="none")
    for other in (make_batches(kind="cutout"), make_batches(augmentation_seed=9)):
        expected = copy.deepcopy(plain)
        for _ in range(7):
            assert torch.equal(other.draw()[1], expected.draw()[1])


def test_the_augmentation_is_independent_of_the_order():
    """Identical images: the order cannot be seen, and so only the augmentation's draws can."""
    pixels = torch.arange(18, dtype=torch.uint8).view(1, 3, 3, 2).expand(10, 3, 3, 2).contiguous()
    streams = []
    for order_seed in (1, 2):
        batches = make_numbered(
            augmentation=AugmentationSettings(kind="cutout", cutout_size=1), order_seed=order_seed
        )
        batches.images = pixels
        streams.append(batches)
    for _ in range(6):
        (images, labels), (others, other_labels) = (stream.draw() for stream in streams)
        assert torch.equal(images, others)
        assert not torch.equal(labels, other_labels)


@pytest.mark.parametrize("drawn", [0, 1, 2, 3, 4, 6])
@pytest.mark.parametrize("used", [0, 2])
def test_state_continues_anywhere(make_batches, drawn, used):
    """At the start, in mid-epoch and at an epoch's end; into a fresh or a used stream."""
    batches = make_batches()
    for _ in range(drawn):
        batches.draw()
    state = copy.deepcopy(batches.state_dict())
    other = make_batches(order_seed=50, augmentation_seed=51)
    for _ in range(used):
        other.draw()
    other.load_state_dict(state)
    assert_same_draws(batches, other, 8)


def test_state_is_not_changed_by_drawing_on(make_batches):
    batches = make_batches()
    batches.draw()
    state = batches.state_dict()
    kept = copy.deepcopy(state)
    for _ in range(5):
        batches.draw()
    for key, value in kept.items():
        assert torch.equal(torch.as_tensor(state[key]), torch.as_tensor(value)), key


def test_within_an_epoch_nothing_waits_for_the_host(make_batches, no_host_access):
    batches = make_batches()
    batches.draw()
    with no_host_access():
        batches.draw()
        batches.draw()


def test_the_stored_pixels_are_never_written(make_batches):
    batches = make_batches()
    before = batches.images.clone()
    for _ in range(4):
        batches.draw()
    assert torch.equal(batches.images, before)
