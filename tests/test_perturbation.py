import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import brentq, minimize_scalar
from scipy.special import logsumexp, softmax

from pof import perturbation
from pof.perturbation import (
    Direction,
    classifier_gradient,
    loss_along_ray,
    perturbation_range,
    target_distribution,
)


@pytest.fixture(params=["host", "device"])
def driver(request, monkeypatch):
    """The exact search on a CPU, and an accelerator's in its place."""
    if request.param == "device":
        monkeypatch.setattr(perturbation, "_search_on_host", perturbation._search_on_device)
    return request.param


def loss_by_numpy(logits, slopes, target, xi):
    z = logits - xi * slopes
    return float((logsumexp(z, axis=1) - (target * z).sum(1)).mean())


def slope_by_numpy(logits, slopes, target, xi):
    p = softmax(logits - xi * slopes, axis=1)
    return float(((target - p) * slopes).sum(1).mean())


def make_ray(seed, n=32, classes=5, width=7, scale=1.0, smoothing=0.0):
    """Logits, slopes along the unit gradient, target, and the gradient's norm."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(n, width, generator=generator, dtype=torch.float64)
    weight = scale * torch.randn(classes, width, generator=generator, dtype=torch.float64)
    logits = features @ weight.T
    noise = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    labels = (logits + noise).argmax(1)
    target = target_distribution(labels, classes, smoothing)
    gradient = classifier_gradient(features, logits, target)
    return logits, gradient.unit().applied(features), target, float(gradient.norm())


CASES = {
    "small": {},
    "one image": {"n": 1, "smoothing": 0.1},
    "two classes": {"classes": 2},
    "well trained": {"scale": 30.0, "n": 256},
    "large": {"n": 256, "classes": 100, "width": 64},
    "smoothed": {"smoothing": 0.1},
    "smoothed, well trained": {"scale": 10.0, "smoothing": 0.05},
}


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(6))
def test_minimiser_is_scipys(case, seed):
    logits, slopes, target, norm = make_ray(seed, **CASES[case])
    found = perturbation_range(logits, slopes, target, cap=1e4 * norm)
    ray = (logits.numpy(), slopes.numpy(), target.numpy())
    assert slope_by_numpy(*ray, 1e4 * norm) > 0, "the case has a minimiser"
    assert not found.capped
    xi = float(found.xi)

    root = brentq(lambda x: slope_by_numpy(*ray, x), 0.0, 1e4 * norm, xtol=1e-15, rtol=1e-14)
    assert xi == pytest.approx(root, rel=1e-8)

    # minimize_scalar sees losses, flat at the minimum: its ξ is good to the root of their
    # rounding error at best. Its loss is what the exact search must not exceed.
    scipys = minimize_scalar(
        lambda x: loss_by_numpy(*ray, x), bracket=(0.0, root, 2 * root), options={"xtol": 1e-12}
    )
    assert xi == pytest.approx(scipys.x, rel=1e-6)
    assert loss_by_numpy(*ray, xi) <= scipys.fun * (1 + 1e-14)


@pytest.mark.usefixtures("driver")
def test_minimiser_is_minimize_scalars_to_1e_8():
    """Where the loss is sharp enough for minimize_scalar: measured from its minimum."""
    for seed in range(20):
        logits, slopes, target, norm = make_ray(seed)
        found = perturbation_range(logits, slopes, target, cap=1e4 * norm)
        ray = (logits.numpy(), slopes.numpy(), target.numpy())
        squared_slope = minimize_scalar(
            lambda x, ray=ray: slope_by_numpy(*ray, x) ** 2,  # zero at the minimiser, not flat
            bracket=(0.0, float(found.xi) * 1.1),
            options={"xtol": 1e-12, "maxiter": 500},
        )
        assert squared_slope.fun < 1e-18
        assert float(found.xi) == pytest.approx(squared_slope.x, rel=1e-8)


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("cap", [1.0, 10.0, 1e3, 1e6, 1e9])
@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (0.01, 5.0), (4.0, 0.02), (1e-3, 1e-3)])
@pytest.mark.parametrize("share", [1, 3, 60])
def test_analytic_minimiser(cap, a, b, share):
    """``share`` images gain a ξ on the other class, one loses b ξ: a closed form if a = b.

    L = share · log(1 + e^(−aξ)) + log(1 + e^(bξ − c)); with a = b and u = e^(aξ),
    L′ = 0 ⟺ share · (u + e^c) = u (u + 1).
    """
    c = 9.0
    logits = torch.zeros(share + 1, 2, dtype=torch.float64)
    logits[-1, 0] = c
    slopes = torch.zeros_like(logits)
    slopes[:-1, 1] = a
    slopes[-1, 1] = -b
    target = target_distribution(torch.zeros(share + 1, dtype=torch.int64), 2)
    found = perturbation_range(logits, slopes, target, cap=cap)
    if a == b:
        u = ((share - 1) + math.sqrt((share - 1) ** 2 + 4 * share * math.exp(c))) / 2
        root = math.log(u) / a
    else:
        root = brentq(
            lambda x: -share * a / (1 + math.exp(a * x)) + b / (1 + math.exp(c - b * x)),
            0.0,
            700.0 / max(a, b),
            xtol=1e-15,
            rtol=1e-14,
        )
    assert bool(found.capped) == (root > cap)
    assert float(found.xi) == pytest.approx(min(root, cap), rel=1e-8)


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("cap", [0.5, 30.0, 1e4, 1e12])
@pytest.mark.parametrize("search", ["exact", "grid16"])
def test_a_separable_batch_reaches_the_cap(cap, search):
    """Also where the losses are too small for a floating-point number before the cap."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (9,), generator=generator)
    slopes = -2.0 * F.one_hot(labels, 4).double()
    slopes[:, 0] += 0.3  # common shift of some logits: the true class still gains on all
    target = target_distribution(labels, 4)
    found = perturbation_range(logits, slopes, target, cap=cap, unit=0.1, search=search)
    assert found.capped
    assert found.xi == cap


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("search", ["exact", "grid16"])
def test_the_cap_cuts_a_finite_minimiser(search):
    logits, slopes, target, norm = make_ray(0)
    free = perturbation_range(logits, slopes, target, cap=1e4 * norm)
    low, high = 0.9 * float(free.xi), 1.1 * float(free.xi)
    cut = perturbation_range(logits, slopes, target, cap=low, unit=0.05, search=search)
    assert cut.capped
    assert cut.xi == low
    if search == "exact":
        uncut = perturbation_range(logits, slopes, target, cap=high)
        assert not uncut.capped
        assert float(uncut.xi) == pytest.approx(float(free.xi), rel=1e-9)


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("cap", [10.0, 300.0])
def test_the_cap_is_found_where_the_class_that_gains_has_no_probability_yet(cap):
    """One class falls behind; another, which would gain, is exp(−800) likely and counts as 0."""
    logits = torch.tensor([[0.0, 5.0, -800.0]], dtype=torch.float64)
    slopes = torch.tensor([[0.0, 1.0, -1.0]], dtype=torch.float64)
    target = target_distribution(torch.tensor([0]), 3)
    found = perturbation_range(logits, slopes, target, cap=cap)
    assert found.capped
    assert found.xi == cap
    beyond = perturbation_range(logits, slopes, target, cap=1e4)
    assert not beyond.capped
    assert beyond.xi == pytest.approx(402.5, rel=0.07)  # 5 − ξ = ξ − 800


@pytest.mark.usefixtures("driver")
def test_uphill_flat_and_vanishing_rays_give_zero():
    logits, slopes, target, norm = make_ray(0)
    for d, cap in [(-slopes, 1e4 * norm), (0 * slopes, 1.0), (0 * slopes, 0.0), (slopes, 0.0)]:
        found = perturbation_range(logits, d, target, cap=torch.tensor(cap, dtype=torch.float64))
        assert found.xi == 0
    assert not perturbation_range(logits, -slopes, target, cap=1e4 * norm).capped
    assert not perturbation_range(logits, 0 * slopes, target, cap=1.0).capped


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("num_classes", [5, 40])
def test_invariances(num_classes):
    logits, slopes, target, norm = make_ray(3, classes=num_classes)
    cap = 1e4 * norm
    xi = float(perturbation_range(logits, slopes, target, cap=cap).xi)
    generator = torch.Generator().manual_seed(1)
    shift = 100 * torch.randn(len(logits), 1, generator=generator, dtype=torch.float64)
    order = torch.randperm(len(logits), generator=generator)
    classes = torch.randperm(logits.shape[1], generator=generator)
    same = {
        "a constant added to an image's logits": (logits + shift, slopes, target),
        "a constant added to an image's slopes": (logits, slopes + shift, target),
        "images in another order": (logits[order], slopes[order], target[order]),
        "classes in another order": (logits[:, classes], slopes[:, classes], target[:, classes]),
        "another memory layout": tuple(t.mT.contiguous().mT for t in (logits, slopes, target)),
        "every image twice": tuple(t.repeat(2, 1) for t in (logits, slopes, target)),
    }
    for what, ray in same.items():
        assert float(perturbation_range(*ray, cap=cap).xi) == pytest.approx(xi, rel=1e-8), what
    for c in (0.01, 7.0):
        scaled = perturbation_range(logits, c * slopes, target, cap=cap)
        assert c * float(scaled.xi) == pytest.approx(xi, rel=1e-8)


def test_extreme_logits_stay_finite_and_right(driver):
    """One image is lost by 10⁴ and gains, one is won by 10⁴ and loses: the knee is at ξ = 10⁴."""
    logits = torch.tensor([[0.0, 1e4], [1e4, 0.0]], dtype=torch.float64)
    slopes = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    target = target_distribution(torch.tensor([0, 0]), 2)
    found = perturbation_range(logits, slopes, target, cap=1e6)
    assert not found.capped
    assert float(found.xi) == pytest.approx(1e4, rel=1e-8)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        z = 1e4 * torch.randn(16, 6, generator=generator, dtype=torch.float64)
        d = torch.randn(16, 6, generator=generator, dtype=torch.float64)
        t = target_distribution(torch.randint(6, (16,), generator=generator), 6)
        for search in ("exact", "grid16"):
            found = perturbation_range(z, d, t, cap=1e5, search=search)
            assert 0 <= float(found.xi) <= 1e5
        best = minimize_scalar(
            lambda x, z=z, d=d, t=t: loss_by_numpy(z.numpy(), d.numpy(), t.numpy(), x),
            bounds=(0.0, 1e5),
            method="bounded",
            options={"xatol": 1e-6},
        )
        exact = perturbation_range(z, d, t, cap=1e5)
        at_exact = loss_by_numpy(z.numpy(), d.numpy(), t.numpy(), float(exact.xi))
        # Kinks: an accelerator's search may be left with its bracket.
        assert at_exact <= best.fun * (1.01 if driver == "device" else 1.0 + 1e-12)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("num_classes", [2, 10, 40])
def test_both_searches_agree(monkeypatch, num_classes, scale):
    rays = [make_ray(seed, n=64, classes=num_classes, scale=scale) for seed in range(20)]

    def search():
        return [perturbation_range(*ray[:3], cap=share * ray[3]) for ray in rays for share in caps]

    caps = (1e4, 0.3)
    on_host = search()
    assert [f.xi.item() for f in on_host] == [f.xi.item() for f in search()], "the same bits"
    monkeypatch.setattr(perturbation, "_search_on_host", perturbation._search_on_device)
    for host, device in zip(on_host, search(), strict=True):
        assert float(host.xi) == pytest.approx(float(device.xi), rel=1e-8)
        assert (host.xi.dtype, host.xi.shape) == (device.xi.dtype, device.xi.shape)
        assert (host.capped.dtype, host.capped.shape) == (torch.bool, device.capped.shape)
        assert host.capped == device.capped
    assert len({bool(f.capped) for f in on_host}) == 2


@pytest.mark.parametrize("scale", [1e2, 1e3, 1e4])
def test_kinks_are_found_exactly_where_the_host_may_look(scale):
    """Logits so large that L′ is a staircase: no step is of use, only its signs."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        z = scale * torch.randn(16, 6, generator=generator, dtype=torch.float64)
        d = torch.randn(16, 6, generator=generator, dtype=torch.float64)
        t = target_distribution(torch.randint(6, (16,), generator=generator), 6)
        ray = (z.numpy(), d.numpy(), t.numpy())
        found = perturbation_range(z, d, t, cap=100 * scale)
        if slope_by_numpy(*ray, 0.0) >= 0:
            assert found.xi == 0
            continue
        root = brentq(
            lambda x, ray=ray: slope_by_numpy(*ray, x), 0.0, 100 * scale, xtol=1e-15, rtol=1e-14
        )
        assert float(found.xi) == pytest.approx(root, rel=1e-8)


@pytest.mark.usefixtures("driver")
def test_numbers_that_diverged_give_zero():
    logits, slopes, target, norm = make_ray(0)
    for value in (math.nan, math.inf):
        spoilt = logits.clone()
        spoilt[0, 0] = value
        found = perturbation_range(spoilt, slopes, target, cap=norm)
        assert found.xi == 0
        assert not found.capped


def grid_by_loop(logits, slopes, target, cap, unit):
    """The published search, one trial at a time: double until the loss rises, then 16 points."""

    def loss(xi):
        return loss_by_numpy(logits.numpy(), slopes.numpy(), target.numpy(), xi)

    xi, previous = 0.0, loss(0.0)
    capped = False
    while True:
        if xi >= cap:
            capped = True
            break
        xi = min(2 * xi if xi else unit, cap)
        current = loss(xi)
        if current > previous:
            break
        previous = current
    points = [xi * i / 16 for i in range(1, 17)]
    return min(points, key=loss), capped


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("scale", [0.3, 10.0])
@pytest.mark.parametrize("cap", [1.0, 1.5, 6.0, 1e4])
def test_grid_is_the_published_loop(seed, scale, cap):
    logits, slopes, target, norm = make_ray(seed, scale=scale, n=40)
    expected, capped = grid_by_loop(logits, slopes, target, cap * norm, norm)
    found = perturbation_range(
        logits, slopes, target, cap=cap * norm, unit=torch.tensor(norm), search="grid16"
    )
    assert bool(found.capped) == capped
    assert float(found.xi) == pytest.approx(expected, rel=1e-6)


def test_gradient_of_the_classifier_is_autograds():
    generator = torch.Generator().manual_seed(0)
    for smoothing in (0.0, 0.2):
        features = torch.randn(11, 6, generator=generator, dtype=torch.float64)
        labels = torch.randint(4, (11,), generator=generator)
        weight = torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)
        logits = F.linear(features, weight, bias)
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        loss.backward()
        target = target_distribution(labels, 4, smoothing)
        found = classifier_gradient(features, logits.detach(), target)
        torch.testing.assert_close(found.weight, weight.grad, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(found.bias, bias.grad, rtol=1e-12, atol=1e-15)
        both = torch.cat([weight.grad.flatten(), bias.grad])
        assert float(found.norm()) == pytest.approx(float(both.norm()), rel=1e-12)
        assert float(found.unit().norm()) == pytest.approx(1.0, rel=1e-12)

        xi = torch.tensor([[0.0, 0.5], [2.0, 7.0]], dtype=torch.float64)
        losses = loss_along_ray(logits.detach(), found.unit().applied(features), target, xi)
        for x, value in zip(xi.flatten(), losses.flatten(), strict=True):
            stepped = F.linear(
                features, weight - x * weight.grad / both.norm(), bias - x * bias.grad / both.norm()
            )
            at = F.cross_entropy(stepped, labels, label_smoothing=smoothing)
            assert float(value) == pytest.approx(float(at.detach()), rel=1e-12)


def test_direction_arithmetic():
    a = Direction(torch.tensor([[3.0, 0.0]]).double(), torch.tensor([4.0]).double())
    b = Direction(torch.tensor([[1.0, 2.0]]).double(), torch.tensor([-1.0]).double())
    assert a.norm() == 5
    assert a.dot(b) == -1
    assert a.plus(b.scaled(2.0)).weight.tolist() == [[5.0, 4.0]]
    zero = a.scaled(0.0)
    assert zero.unit().norm() == 0  # stays zero instead of NaN


@pytest.mark.usefixtures("driver")
def test_float32_logits_are_searched_in_float64():
    logits, slopes, target, norm = make_ray(2)
    single = logits.float(), slopes.float()
    found = perturbation_range(*single, target, cap=1e4 * norm)
    assert found.xi.dtype == torch.float64
    ray = (single[0].double().numpy(), single[1].double().numpy(), target.numpy())
    root = brentq(lambda x: slope_by_numpy(*ray, x), 0.0, 1e4 * norm, xtol=1e-15, rtol=1e-14)
    assert float(found.xi) == pytest.approx(root, rel=1e-8)


def test_smoothed_targets():
    target = target_distribution(torch.tensor([[2, 0]]), 4, 0.2)
    expected = [[[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]]]
    np.testing.assert_allclose(target.numpy(), expected, rtol=1e-15)


@pytest.mark.parametrize("search", ["exact", "grid16"])
@pytest.mark.parametrize("cap", ["tensor", "number"])
def test_nothing_waits_for_the_host(monkeypatch, no_host_access, search, cap):
    monkeypatch.setattr(perturbation, "_search_on_host", perturbation._search_on_device)
    logits, slopes, target, norm = make_ray(0)
    limit = torch.tensor(1e4 * norm, dtype=torch.float64) if cap == "tensor" else 1e4 * norm
    unit = torch.tensor(norm, dtype=torch.float64)
    with no_host_access():
        perturbation_range(logits, slopes, target, cap=limit, unit=unit, search=search)
