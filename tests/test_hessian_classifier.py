import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from pof import network as networks
from pof.hessian import (
    ClassifierHessian,
    FeatureCache,
    cache_features,
    classifier_hessian,
    top_eigenvalues,
)

SAMPLES, FEATURES, CLASSES = 23, 4, 3


def tiny(bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, FEATURES), nn.Linear(FEATURES, CLASSES, bias=bias)
    )
    return networks.split(model.to(dtype))


def samples(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 5, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(CLASSES, (SAMPLES,), generator=generator)


def batches(x, y, size=7):  # 7 does not divide 23
    return list(zip(x.split(size), y.split(size), strict=True))


def autograd_hessian(network, x, y, label_smoothing=0.0):
    """torch.func.hessian over the flat parameters of the classifier."""
    features = network.feature_extractor(x).detach()
    parameters = {name: p.detach() for name, p in network.classifier.named_parameters()}
    flat = torch.cat([p.reshape(-1) for p in parameters.values()])

    def loss(flat):
        pieces = flat.split([p.numel() for p in parameters.values()])
        own = {
            name: piece.view_as(p)
            for (name, p), piece in zip(parameters.items(), pieces, strict=True)
        }
        logits = functional_call(network.classifier, own, (features,))
        return nn.functional.cross_entropy(logits, y, label_smoothing=label_smoothing)

    return torch.func.hessian(loss)(flat)


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_against_autograd_in_float64(bias, chunk):
    network, (x, y) = tiny(bias), samples()
    H = classifier_hessian(network, batches(x, y), chunk=chunk)
    expected = autograd_hessian(network, x, y)
    assert H.shape == expected.shape
    close(H.dense(), expected)
    close(H @ torch.eye(len(expected), dtype=torch.float64), expected)
    for column in range(len(expected)):
        unit = torch.zeros(len(expected), dtype=torch.float64)
        unit[column] = 1
        close(H @ unit, expected[:, column])
    assert H.trace() == pytest.approx(float(expected.trace()), rel=1e-10)


@pytest.mark.parametrize("solver", ["dense", "lanczos"])
def test_eigenpairs_against_autograd(solver):
    network, (x, y) = tiny(), samples()
    top = top_eigenvalues(
        classifier_hessian(network, batches(x, y)), 4, solver=solver, tolerance=1e-11
    )
    values, vectors = torch.linalg.eigh(autograd_hessian(network, x, y))
    close(top.values, values.flip(0)[:4])
    assert top.all_converged
    for ours, exact in zip(top.vectors.T, vectors.T.flip(0), strict=False):
        close(ours * torch.sign(ours @ exact), exact, 1e-9)


def test_labels_and_their_smoothing_do_not_matter():
    network, (x, y) = tiny(), samples()
    H = classifier_hessian(network, batches(x, y)).dense()
    close(H, classifier_hessian(network, batches(x, (y + 1) % CLASSES)).dense())
    close(H, autograd_hessian(network, x, y, label_smoothing=0.3))


def test_one_zero_eigenvalue_for_each_feature_and_the_bias():
    network, (x, y) = tiny(), samples()
    values = torch.linalg.eigvalsh(classifier_hessian(network, batches(x, y)).dense())
    assert (values.abs() < 1e-14).sum() == FEATURES + 1
    assert values[FEATURES + 1] > 1e-5
    # They are the shifts of all classes alike.
    shift = torch.randn(1, FEATURES, dtype=torch.float64).expand(CLASSES, FEATURES)
    same = torch.cat([shift.reshape(-1), torch.ones(CLASSES, dtype=torch.float64)])
    close(classifier_hessian(network, batches(x, y)) @ same, torch.zeros_like(same), 1e-14)


def test_weight_decay_shifts_every_eigenvalue():
    network, (x, y) = tiny(), samples()
    plain = classifier_hessian(network, batches(x, y))
    decayed = classifier_hessian(network, batches(x, y), weight_decay=0.25)
    assert (plain.weight_decay, decayed.weight_decay) == (0.0, 0.25)
    size = plain.shape[0]
    close(decayed.dense(), plain.dense() + 0.25 * torch.eye(size, dtype=torch.float64))
    v = torch.randn(size, 2, dtype=torch.float64)
    close(decayed @ v, plain @ v + 0.25 * v)
    assert decayed.trace() == pytest.approx(plain.trace() + 0.25 * size)


def test_the_split_into_batches_and_chunks_does_not_matter():
    network, (x, y) = tiny(), samples()
    whole = classifier_hessian(network, [(x, y)])
    v = torch.randn(whole.shape[0], 3, dtype=torch.float64)
    for size in (1, 7, 22):
        for chunk in (1, 6, 23):
            part = classifier_hessian(network, batches(x, y, size), chunk=chunk)
            assert part.samples == SAMPLES
            close(part @ v, whole @ v, 1e-12)


def confident_case(scale, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    f = torch.randn(40, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    weight = scale * torch.randn(CLASSES, FEATURES, generator=generator, dtype=torch.float64)
    return f, weight.to(dtype), weight.new_zeros(CLASSES).to(dtype)


def hessian_of(f, weight, bias, **settings):
    cache = FeatureCache((f,), (torch.zeros(len(f), dtype=torch.int64),))
    return ClassifierHessian(cache, weight, bias, **settings)


def exact_dense(f, weight, bias):
    """The closed form in exact-enough arithmetic: Python's decimal at 400 digits."""
    from decimal import Decimal, getcontext

    getcontext().prec = 400
    F = [[Decimal(v) for v in row] + [Decimal(1)] for row in f.double().tolist()]
    T = [
        [Decimal(v) for v in [*row, b]]
        for row, b in zip(weight.double().tolist(), bias.double().tolist(), strict=True)
    ]
    d, C = FEATURES + 1, CLASSES
    H = [[Decimal(0)] * (C * d) for _ in range(C * d)]
    for row in F:
        z = [sum(a * b for a, b in zip(row, t, strict=True)) for t in T]
        e = [v.exp() for v in z]
        p = [v / sum(e) for v in e]
        for a in range(C):
            for b in range(C):
                A = p[a] * ((a == b) - p[b]) / len(F)
                for i in range(d):
                    for j in range(d):
                        H[a * d + i][b * d + j] += A * row[i] * row[j]
    blocks = torch.tensor([[float(v) for v in row] for row in H], dtype=torch.float64)
    order = [c * d + i for c in range(C) for i in range(FEATURES)]
    order += [c * d + FEATURES for c in range(C)]
    return blocks[order][:, order]


@pytest.mark.parametrize("scale", [1.0, 40.0, 400.0])
def test_confident_logits_lose_no_digits(scale):
    f, weight, bias = confident_case(scale)
    keep = ((f @ weight.T).topk(2).values.diff().abs() > 0.8 * scale).squeeze(1)
    f = f[keep]
    exact = exact_dense(f, weight, bias)
    H = hessian_of(f, weight, bias)
    norm = float(torch.linalg.matrix_norm(exact, 2))
    if scale == 400.0:  # naively, 1 − ‖p‖² is 0 here
        assert 0 < norm < 1e-100
    for dense in (H.dense(), H @ torch.eye(H.shape[0], dtype=torch.float64)):
        assert float((dense - exact).abs().max()) < 1e-11 * norm
    assert H.trace() == pytest.approx(float(exact.trace()), rel=1e-11)


def test_features_in_float32_cost_float32_accuracy_only():
    f, weight, bias = confident_case(8.0, torch.float32)
    exact = exact_dense(f, weight, bias)
    norm = float(torch.linalg.matrix_norm(exact, 2))
    H = hessian_of(f, weight, bias)
    assert H.dtype == torch.float64
    assert float((H.dense() - exact).abs().max()) < 1e-6 * norm
    product = H @ torch.eye(H.shape[0], dtype=torch.float64)
    assert float((product - product.T).abs().max()) < 1e-15  # symmetric all the same
    low = hessian_of(f, weight, bias, dtype=torch.float32)
    assert low.dense().dtype == torch.float32
    assert float((low.dense() - exact).abs().max()) < 1e-5 * norm


def test_against_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    network, (x, y) = tiny(), samples()
    data = batches(x, y)
    theirs = curvlinops.HessianLinearOperator(
        network, nn.CrossEntropyLoss(), list(network.classifier.parameters()), data
    )
    ours = classifier_hessian(network, data)
    v = torch.randn(ours.shape[0], dtype=torch.float64)
    close(ours @ v, theirs @ v)
    # The residual of curvlinops' operator at our eigenpair.
    top = top_eigenvalues(ours)
    close(theirs @ top.vectors[:, 0], top.values[0] * top.vectors[:, 0])
    # And the solver on their operator.
    close(top_eigenvalues(theirs, 2, tolerance=1e-9).values, top_eigenvalues(ours, 2).values)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_against_pyhessian():
    pyhessian = pytest.importorskip("pyhessian")
    network, (x, y) = tiny(dtype=torch.float32), samples(torch.float32)
    ours = classifier_hessian(network, batches(x, y))
    for p in network.feature_extractor.parameters():
        p.requires_grad_(False)
    torch.manual_seed(0)
    theirs = pyhessian.hessian(network, nn.CrossEntropyLoss(), data=(x, y), cuda=False)
    values, _ = theirs.eigenvalues(maxIter=2000, tol=1e-7, top_n=1)
    assert float(top_eigenvalues(ours).values[0]) == pytest.approx(values[0], rel=1e-4)


def test_the_network_is_left_as_it_was():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(16, 3)
    )
    network = networks.split(model)
    network.feature_extractor[1].eval()
    modes = [module.training for module in network.modules()]
    state = {key: value.clone() for key, value in network.state_dict().items()}
    x, y = torch.randn(6, 1, 4, 4), torch.zeros(6, dtype=torch.int64)
    first = cache_features(network, [(x, y)])
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    network.eval()
    assert torch.equal(first.features[0], network.feature_extractor(x))  # in evaluation mode
    assert torch.equal(torch.cat(cache_features(network, [(x, y)]).features), first.features[0])
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.features[0].sum().backward()


def test_the_cache_is_what_it_says():
    network, (x, y) = tiny(dtype=torch.float32), samples(torch.float32)
    cache = cache_features(network, batches(x, y), chunk=10)
    assert [len(chunk) for chunk in cache.features] == [10, 10, 3]
    assert [len(chunk) for chunk in cache.labels] == [10, 10, 3]
    assert len(cache) == SAMPLES
    assert torch.equal(torch.cat(cache.labels), y)
    sizes = [chunk.untyped_storage().nbytes() for chunk in cache.features]
    assert sum(sizes) == SAMPLES * FEATURES * 4
    assert cache_features(network, batches(x, y), dtype=torch.float64).features[0].dtype == (
        torch.float64
    )


def test_no_samples_are_an_error():
    with pytest.raises(ValueError, match="no samples"):
        classifier_hessian(tiny(), [])


def test_identical_classes_repeat_the_spectrum_of_the_features():
    # Θ = 0: H = (I − 11ᵀ/C)/C ⊗ F̃ᵀF̃/N, each eigenvalue C − 1 times.
    f, weight, bias = confident_case(0.0)
    extended = torch.cat([f, torch.ones(len(f), 1, dtype=torch.float64)], 1)
    gram = torch.linalg.eigvalsh(extended.T @ extended / len(f) / CLASSES).flip(0)
    top = top_eigenvalues(hessian_of(f, weight, bias), 4)
    close(top.values, gram.repeat_interleave(CLASSES - 1)[:4])


def test_memory_of_the_svhn_size_is_as_stated():
    # 600,000 × (640 features + 100 probabilities) in float32, and an index and a label each.
    stated = 600_000 * ((640 + 100) * 4 + 4 + 8)
    assert math.isclose(stated, 1.8e9, rel_tol=0.02)
    f = torch.randn(50, 640)
    H = hessian_of(f, torch.randn(100, 640), torch.zeros(100))
    kept = [f, *H._rest[0], *H.cache.labels]
    assert sum(t.untyped_storage().nbytes() for t in kept) * 600_000 // 50 == stated
