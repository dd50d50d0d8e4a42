"""The landscape around a classifier, against plain evaluation of the perturbed network."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pof.hessian import ClassifierHessian, cache_features
from pof.landscape import (
    BatchRanges,
    ClassifierLandscape,
    batch_ranges,
    direction_of,
    effective_loss,
    vector_of,
)
from pof.network import Network
from pof.settings import PoFSettings

SAMPLES, CLASSES = 90, 4


@pytest.fixture
def setting():
    torch.manual_seed(0)
    extractor = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh())
    network = Network(extractor, nn.Linear(6, CLASSES)).double()
    images = torch.randn(SAMPLES, 3, 2, 2, dtype=torch.float64)
    labels = torch.randint(CLASSES, (SAMPLES,))
    cache = cache_features(
        network, [(images[:50], labels[:50]), (images[50:], labels[50:])], chunk=32
    )
    return network, images, labels, cache


def loss_of(network, images, labels, vector):
    """The loss with ``vector`` added to the classifier's parameters, by running the network."""
    moved = {
        "weight": network.classifier.weight + vector[:-CLASSES].view(CLASSES, -1),
        "bias": network.classifier.bias + vector[-CLASSES:],
    }
    features = network.feature_extractor(images)
    return F.cross_entropy(torch.func.functional_call(network.classifier, moved, features), labels)


def random_direction(network):
    vector = torch.randn(
        sum(p.numel() for p in network.classifier.parameters()), dtype=torch.float64
    )
    return vector / vector.norm()


def test_lines_and_planes_are_the_losses_of_the_moved_network(setting):
    network, images, labels, cache = setting
    landscape = ClassifierLandscape(cache, network.classifier)
    first, second = random_direction(network), random_direction(network)
    distances = torch.tensor([-2.0, 0.0, 0.7], dtype=torch.float64)
    along = landscape.along(direction_of(first, network.classifier), distances)
    plane = landscape.plane(
        direction_of(first, network.classifier), direction_of(second, network.classifier), distances
    )
    for i, s in enumerate(distances):
        torch.testing.assert_close(along[i], loss_of(network, images, labels, s * first))
        for j, t in enumerate(distances):
            expected = loss_of(network, images, labels, s * first + t * second)
            torch.testing.assert_close(plane[j, i], expected)


def test_the_gradient_is_autograds(setting):
    network, images, labels, cache = setting
    loss = F.cross_entropy(network(images), labels)
    expected = torch.autograd.grad(loss, list(network.classifier.parameters()))
    found = ClassifierLandscape(cache, network.classifier).gradient()
    torch.testing.assert_close(found.weight, expected[0])
    torch.testing.assert_close(found.bias, expected[1])


def test_vectors_and_directions_are_inverse_and_in_parameter_order(setting):
    network, *_ = setting
    vector = random_direction(network)
    direction = direction_of(vector, network.classifier)
    assert torch.equal(vector_of(direction), vector)
    assert torch.equal(direction.weight[1, 2], vector[1 * 6 + 2])


def test_each_range_is_a_minimum_of_its_batch_along_its_own_gradient(setting):
    network, _, _, cache = setting
    landscape = ClassifierLandscape(cache, network.classifier)
    found = batch_ranges(landscape, PoFSettings(cap=1e6), batch_size=SAMPLES, batches=2, seed=3)
    # One batch is the whole set: both rays are the set's own, whatever the order.
    gradient = landscape.gradient()
    assert not found.capped.any()
    for column, xi in zip(found.directions.mT, found.xi, strict=True):
        torch.testing.assert_close(column, vector_of(gradient.unit()))
        near = torch.stack([xi * 0.99, xi, xi * 1.01])
        losses = landscape.along(direction_of(column, network.classifier), -near)
        assert losses[1] < losses[0]
        assert losses[1] < losses[2]


def test_batches_of_one_pass_are_disjoint(setting):
    network, _, _, cache = setting
    landscape = ClassifierLandscape(cache, network.classifier)
    found = batch_ranges(landscape, PoFSettings(), batch_size=30, batches=3, seed=0)
    # The gradients of a partition average to the set's gradient.
    mean = (found.directions * found.gradient_norm).mean(1)
    torch.testing.assert_close(mean, vector_of(landscape.gradient()))


def test_the_effective_loss_is_exact_to_third_order(setting):
    """Measured and predicted agree to O(step³): halving the step divides the gap by eight."""
    network, _, _, cache = setting
    landscape = ClassifierLandscape(cache, network.classifier)
    hessian = ClassifierHessian(cache, network.classifier.weight, network.classifier.bias)
    directions = torch.stack([random_direction(network) for _ in range(3)], dim=1)
    gaps = []
    for step in (0.02, 0.01):
        rays = BatchRanges(
            torch.full((3,), step, dtype=torch.float64),
            torch.zeros(3, dtype=torch.bool),
            torch.ones(3),
            directions,
        )
        effective = effective_loss(landscape, hessian, rays, gamma=1.0)
        gaps.append(abs(effective.measured - effective.predicted))
    assert gaps[0] / gaps[1] == pytest.approx(8.0, rel=0.15)


def test_capped_batches_take_no_part_in_the_effective_loss(setting):
    network, _, _, cache = setting
    landscape = ClassifierLandscape(cache, network.classifier)
    hessian = ClassifierHessian(cache, network.classifier.weight, network.classifier.bias)
    directions = torch.stack([random_direction(network) for _ in range(2)], dim=1)
    both = BatchRanges(
        torch.tensor([0.3, 1e9], dtype=torch.float64),
        torch.tensor([False, True]),
        torch.ones(2),
        directions,
    )
    one = BatchRanges(both.xi[:1], both.capped[:1], both.gradient_norm[:1], directions[:, :1])
    assert effective_loss(landscape, hessian, both, 2.0) == effective_loss(
        landscape, hessian, one, 2.0
    )
