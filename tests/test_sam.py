import copy

import pytest
import pytorch_optimizer
import torch
import torch.nn.functional as F
from torch import nn

from pof import batchnorm
from pof.objective import Objective
from pof.sam import SAMGradient
from pof.settings import SAMSettings

LR, MOMENTUM, DECAY = 0.1, 0.9, 0.01


def sgd(network):
    return torch.optim.SGD(
        network.parameters(), lr=LR, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY
    )


def running_statistics(network):
    return {k: v.clone() for k, v in network.state_dict().items() if "running" in k or "num" in k}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def loss_gradients(network, images, labels):
    return torch.autograd.grad(F.cross_entropy(network(images), labels), list(network.parameters()))


def gradient_by_loop(network, images, labels, *, rho, adaptive=False, eta=0.0, decay=0.0):
    """SAM's gradient (Foret et al., eq. 2 and 3; Kwon et al., eq. 5), a parameter at a time."""
    network = copy.deepcopy(network)
    first = loss_gradients(network, images, labels)
    squares = 0.0
    steps = []
    for w, g in zip(network.parameters(), first, strict=True):
        g = g + decay * w.detach()
        t = w.detach().abs() + eta if adaptive else torch.ones_like(w)
        squares += float(((t * g) ** 2).sum())
        steps.append(t * t * g)
    with torch.no_grad():
        for w, step in zip(network.parameters(), steps, strict=True):
            w += rho * step / squares**0.5
    return loss_gradients(network, images, labels)


def assert_gradients(network, expected):
    for p, e in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("adaptive", [False, True])
def test_trajectory_of_twenty_steps_is_pytorch_optimizers(
    make_network, make_batch, monkeypatch, adaptive
):
    def squared_norm(groups, device=None, *, weight_adaptive=False):
        """The same as theirs, which rounds to float32 on the way."""
        parts = [
            (p.grad * p.abs() if group["adaptive"] else p.grad).square().sum()
            for group in groups
            for p in group["params"]
        ]
        return torch.stack(parts).sum().reshape(1)

    monkeypatch.setattr("pytorch_optimizer.optimizer.sam.get_global_gradient_norm", squared_norm)
    ours = make_network(batchnorm=False)
    theirs = copy.deepcopy(ours)
    settings = SAMSettings(rho=0.3, adaptive=adaptive, eta=0.0)  # they have no η
    gradient, optimizer = SAMGradient(Objective(ours), settings), sgd(ours)
    reference = pytorch_optimizer.SAM(
        theirs.parameters(),
        torch.optim.SGD,
        rho=0.3,
        adaptive=adaptive,
        lr=LR,
        momentum=MOMENTUM,
        nesterov=True,
        weight_decay=DECAY,
    )
    start = copy.deepcopy(ours.state_dict())
    for step in range(20):
        images, labels = make_batch(seed=step)
        gradient(images, labels)
        optimizer.step()
        F.cross_entropy(theirs(images), labels).backward()
        reference.first_step(zero_grad=True)
        F.cross_entropy(theirs(images), labels).backward()
        reference.second_step(zero_grad=True)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert all((p - start[k]).abs().max() > 0.01 for k, p in ours.named_parameters())


@pytest.mark.parametrize(
    ("settings", "formula"),
    [
        (SAMSettings(rho=0.4), {}),
        (SAMSettings(rho=0.4, perturb_weight_decay=True), {"decay": 0.5}),
        (SAMSettings(rho=0.4, adaptive=True, eta=0.02), {"adaptive": True, "eta": 0.02}),
        (
            SAMSettings(rho=0.4, adaptive=True, eta=0.02, perturb_weight_decay=True),
            {"adaptive": True, "eta": 0.02, "decay": 0.5},
        ),
    ],
)
def test_gradient_by_the_papers_formulas(make_network, make_batch, settings, formula):
    network = make_network()
    images, labels = make_batch()
    expected = gradient_by_loop(network, images, labels, rho=0.4, **formula)
    SAMGradient(Objective(network), settings, weight_decay=0.5)(images, labels)
    assert_gradients(network, expected)


@pytest.mark.parametrize("m", [4, 5])  # 12 images: equal parts, and a smaller last one
def test_m_sharpness_averages_the_gradients_of_the_parts(make_network, make_batch, m):
    network = make_network()
    images, labels = make_batch(12)
    expected = [torch.zeros_like(p) for p in network.parameters()]
    loss = error = 0.0
    for part, part_labels in zip(images.split(m), labels.split(m), strict=True):
        share = len(part) / 12
        logits = copy.deepcopy(network)(part)
        loss += share * float(F.cross_entropy(logits, part_labels).detach())
        error += share * float((logits.argmax(1) != part_labels).double().mean())
        for total, g in zip(
            expected, gradient_by_loop(network, part, part_labels, rho=0.4), strict=True
        ):
            total += share * g
    outcome = SAMGradient(Objective(network), SAMSettings(rho=0.4, m_sharpness=m))(images, labels)
    assert_gradients(network, expected)
    assert float(outcome.loss) == pytest.approx(loss, rel=1e-12)
    assert float(outcome.error) == pytest.approx(error, rel=1e-12)


@pytest.mark.parametrize("m", [12, 100])
def test_one_part_is_the_whole_batch(make_network, make_batch, m):
    network = make_network()
    images, labels = make_batch(12)
    expected = gradient_by_loop(network, images, labels, rho=0.4)
    SAMGradient(Objective(network), SAMSettings(rho=0.4, m_sharpness=m))(images, labels)
    assert_gradients(network, expected)


def test_radius_zero_is_the_plain_gradient(make_network, make_batch):
    network = make_network()
    images, labels = make_batch()
    expected = loss_gradients(copy.deepcopy(network), images, labels)
    SAMGradient(Objective(network), SAMSettings(rho=0.0))(images, labels)
    for p, e in zip(network.parameters(), expected, strict=True):
        assert torch.equal(p.grad, e)


def test_a_vanishing_gradient_perturbs_nothing(make_network, make_batch):
    network = make_network()
    images, labels = make_batch()
    objective = Objective(network)
    with torch.no_grad():
        network.classifier.weight.zero_()
        network.classifier.bias.copy_(torch.tensor([1e3, 0.0, 0.0, 0.0]))
    SAMGradient(objective, SAMSettings(rho=0.4))(images, torch.zeros_like(labels))
    assert all(p.grad.abs().max() == 0 for p in network.parameters())


@pytest.mark.parametrize("m", [None, 5])
def test_weights_come_back_bit_for_bit_in_their_storage(make_network, make_batch, m):
    network = make_network().float()  # w + e − e would not give w back
    images, labels = make_batch()
    before = {k: (p.data_ptr(), p.detach().clone()) for k, p in network.named_parameters()}
    gradient = SAMGradient(Objective(network), SAMSettings(rho=0.4, m_sharpness=m))
    gradient(images.float(), labels)
    for key, p in network.named_parameters():
        assert p.data_ptr() == before[key][0]
        assert torch.equal(p, before[key][1])


def test_statistics_after_a_step_are_those_of_one_plain_forward(make_network, make_batch):
    network = make_network()
    images, labels = make_batch()
    plain = copy.deepcopy(network)
    plain(images)
    SAMGradient(Objective(network), SAMSettings(rho=0.4))(images, labels)
    assert_equal(running_statistics(network), running_statistics(plain))


def test_which_pass_enters_the_statistics(make_network, make_batch):
    images, labels = make_batch()
    found = {}
    for which in ("first", "second", "both"):
        network = make_network()
        SAMGradient(Objective(network), SAMSettings(rho=2.0, batchnorm=which))(images, labels)
        found[which] = running_statistics(network)

    # By hand: the perturbed convolution's channel means and variances.
    network = make_network()
    conv = network.feature_extractor[0]
    gradients = loss_gradients(copy.deepcopy(network), images, labels)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    expected = {}
    with torch.no_grad():
        first = F.conv2d(images, conv.weight)
        second = F.conv2d(images, conv.weight + 2.0 * gradients[0] / norm)
    for name, passes in {"first": [first], "second": [second], "both": [first, second]}.items():
        mean, var = torch.zeros(3).double(), torch.ones(3).double()
        for out in passes:
            mean = 0.9 * mean + 0.1 * out.mean((0, 2, 3))
            var = 0.9 * var + 0.1 * out.var((0, 2, 3))
        expected[name] = (mean, var, len(passes))
    for name, (mean, var, count) in expected.items():
        statistics = list(found[name].values())
        torch.testing.assert_close(statistics[0], mean, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(statistics[1], var, rtol=1e-10, atol=1e-13)
        assert int(statistics[2]) == count
    assert not torch.allclose(expected["first"][0], expected["second"][0])


def test_m_sharpness_records_each_part_once(make_network, make_batch):
    network = make_network()
    images, labels = make_batch(12)
    plain = copy.deepcopy(network)
    for part in images.split(5):
        plain(part)
    SAMGradient(Objective(network), SAMSettings(rho=0.4, m_sharpness=5))(images, labels)
    assert_equal(running_statistics(network), running_statistics(plain))


def test_outcome_is_at_the_unperturbed_weights(make_network, make_batch):
    network = make_network()
    images, labels = make_batch()
    logits = copy.deepcopy(network)(images)
    outcome = SAMGradient(Objective(network), SAMSettings(rho=2.0))(images, labels)
    assert float(outcome.loss) == float(F.cross_entropy(logits, labels).detach())
    assert float(outcome.error) == float((logits.argmax(1) != labels).double().mean())
    assert not outcome.loss.requires_grad


def test_a_failing_second_pass_restores_weights_and_batchnorm(make_network, make_batch):
    network = make_network()
    images, labels = make_batch()
    before = {k: p.detach().clone() for k, p in network.named_parameters()}
    forwards = []

    def fail_second(*_):
        forwards.append({k: p.detach().clone() for k, p in network.named_parameters()})
        if len(forwards) == 2:
            raise RuntimeError("second pass")

    network.feature_extractor[-1].register_forward_hook(fail_second)
    with pytest.raises(RuntimeError, match="second pass"):
        SAMGradient(Objective(network), SAMSettings(rho=0.4))(images, labels)
    assert not torch.equal(forwards[1]["classifier.weight"], before["classifier.weight"])
    assert_equal({k: p.detach() for k, p in network.named_parameters()}, before)
    assert network.feature_extractor[1].track_running_stats


def test_unreached_and_frozen_parameters(make_network, make_batch):
    network = make_network()
    network.feature_extractor.register_parameter(
        "unused", nn.Parameter(torch.ones(2, dtype=torch.float64))
    )
    network.classifier.bias.requires_grad_(False)
    images, labels = make_batch()
    settings = SAMSettings(rho=0.4, m_sharpness=5)
    SAMGradient(Objective(network), settings)(images, labels)
    assert network.feature_extractor.unused.grad is None
    assert network.classifier.bias.grad is None
    assert network.classifier.weight.grad.abs().max() > 0


def test_freezing_statistics_nests_and_leaves_evaluation_alone(make_network, make_batch):
    network = make_network()
    images, _ = make_batch()
    layers = batchnorm.layers(network)
    before = running_statistics(network)
    with batchnorm.frozen_statistics(layers):
        with batchnorm.frozen_statistics(layers):
            inner = network(images)
        network(images)
    assert_equal(running_statistics(network), before)
    assert torch.equal(inner, network(images))  # batch statistics, recorded this time
    assert not torch.equal(
        running_statistics(network)[next(iter(before))], before[next(iter(before))]
    )


@pytest.mark.parametrize(
    "settings",
    [
        SAMSettings(),
        SAMSettings(adaptive=True, perturb_weight_decay=True),
        SAMSettings(m_sharpness=5),
    ],
)
def test_nothing_waits_for_the_host(make_network, make_batch, no_host_access, settings):
    network = make_network()
    images, labels = make_batch()
    gradient, optimizer = SAMGradient(Objective(network), settings, weight_decay=0.1), sgd(network)
    with no_host_access():
        gradient(images, labels)
        optimizer.step()
