import pytest
import torch
from torch import nn
from torch.func import functional_call

from pof import network as networks
from pof.hessian import (
    UnknownBlock,
    block_gauss_newton,
    block_hessian,
    classifier_hessian,
    extreme_eigenvalues,
    trace,
)

timm = pytest.importorskip("timm")


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def tiny():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)
    )
    model[2].running_mean.normal_()
    model[2].running_var.uniform_(0.5, 2)
    return model.double()


def samples(count=11, features=3, classes=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, features, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (count,), generator=generator)


def batches(x, y, size=4):  # 4 does not divide 11
    return list(zip(x.split(size), y.split(size), strict=True))


def flat_loss(model, names, x, y, label_smoothing=0.0, logits_only=False):
    """The loss, or the logits, as a function of the named parameters laid out flat."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if name in names}

    def function(flat):
        pieces = flat.split([p.numel() for p in parameters.values()])
        own = {
            name: piece.view_as(p)
            for (name, p), piece in zip(parameters.items(), pieces, strict=True)
        }
        logits = functional_call(model, own, (x,))
        if logits_only:
            return logits
        return nn.functional.cross_entropy(logits, y, label_smoothing=label_smoothing)

    return function, torch.cat([p.reshape(-1) for p in parameters.values()])


def dense_hessian(model, x, y, names=None, label_smoothing=0.0):
    names = names or [name for name, _ in model.named_parameters()]
    loss, flat = flat_loss(model, names, x, y, label_smoothing)
    return torch.func.hessian(loss)(flat)


def differenced_hessian(model, x, y):
    """By finite differences: torch.func.hessian loses terms of some norm layers."""
    loss, flat = flat_loss(model, [name for name, _ in model.named_parameters()], x, y)
    gradient = torch.func.grad(loss)
    steps = 1e-6 * torch.eye(len(flat), dtype=torch.float64)
    return torch.stack([gradient(flat + e) - gradient(flat - e) for e in steps]) / 2e-6


def dense_gauss_newton(model, x, y):
    logits, flat = flat_loss(
        model, [name for name, _ in model.named_parameters()], x, y, logits_only=True
    )
    J = torch.func.jacrev(logits)(flat)  # (N, C, D)
    p = logits(flat).softmax(1)
    A = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("nai,nab,nbj->ij", J, A, J) / len(x)


def written_out(operator):
    return operator @ torch.eye(operator.shape[0], dtype=operator.dtype)


@pytest.mark.parametrize("size", [1, 4, 11])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_hessian_against_the_dense_one(size, label_smoothing):
    model, (x, y) = tiny(), samples()
    H = block_hessian(model, batches(x, y, size), label_smoothing=label_smoothing)
    model.eval()
    close(written_out(H), dense_hessian(model, x, y, label_smoothing=label_smoothing))
    assert H.samples == 11


def test_gauss_newton_against_the_dense_one():
    model, (x, y) = tiny(), samples()
    G = written_out(block_gauss_newton(model, batches(x, y)))
    model.eval()
    close(G, dense_gauss_newton(model, x, y))
    close(G, written_out(block_gauss_newton(model, batches(x, (y + 1) % 3))))
    assert float(torch.linalg.eigvalsh(G).min()) > -1e-14


def test_a_negative_eigenvalue_of_larger_magnitude():
    # A saddle: logits ±10·a·b of labels that want them smaller, at a = b = 0 but for noise.
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor([0.05], dtype=torch.float64))
            self.b = nn.Parameter(torch.tensor([-0.02], dtype=torch.float64))
            self.c = nn.Parameter(torch.tensor([0.3, 0.1], dtype=torch.float64))

        def forward(self, x):
            bent = -8 * self.a**2 + 10 * self.a * self.b - 6 * self.b**2 + self.c[0] * x[:, 0]
            return torch.stack([bent, -bent + self.c[1] * x[:, 1]], 1)

    model = Product()
    x, _ = samples()
    y = torch.zeros(11, dtype=torch.int64)
    y[:5] = 1
    for labels in (y, torch.zeros_like(y), torch.ones_like(y)):
        exact = torch.linalg.eigvalsh(dense_hessian(model, x, labels))
        for solver in ("dense", "lanczos"):
            top, bottom = extreme_eigenvalues(
                block_hessian(model, batches(x, labels)), solver=solver
            )
            close(top.values[0], exact[-1])
            close(bottom.values[0], exact[0])
    # At least one of the cases is the one this test is named for.
    ends = [
        torch.linalg.eigvalsh(dense_hessian(model, x, labels))[[0, -1]]
        for labels in (torch.zeros_like(y), torch.ones_like(y))
    ]
    assert any(-low > high > 0 for low, high in ends)


def test_any_named_block():
    model, (x, y) = tiny(), samples()
    model.eval()
    for block, names in (
        ("0", ["0.weight", "0.bias"]),
        ("2", ["2.weight", "2.bias"]),
        ("4.weight", ["4.weight"]),
    ):
        H = block_hessian(model, batches(x, y), block=block)
        assert H.names == names
        close(written_out(H), dense_hessian(model, x, y, names))


def test_unknown_blocks_are_one_line():
    model, (x, y) = tiny(), samples()
    with pytest.raises(UnknownBlock, match="no parameters under 'layer3'"):
        block_hessian(model, batches(x, y), block="layer3")
    with pytest.raises(UnknownBlock, match="no parameters under '1'"):  # a Tanh
        block_hessian(model, batches(x, y), block="1")


def test_the_classifier_block_is_the_closed_form():
    network, (x, y) = networks.split(tiny()), samples()
    closed = classifier_hessian(network, batches(x, y), weight_decay=0.1)
    for build in (block_hessian, block_gauss_newton):
        by_autograd = build(network, batches(x, y), block="classifier", weight_decay=0.1)
        close(written_out(by_autograd), closed.dense())


def test_weight_decay_adds_to_the_diagonal():
    model, (x, y) = tiny(), samples()
    plain = written_out(block_hessian(model, batches(x, y)))
    decayed = block_hessian(model, batches(x, y), weight_decay=0.5)
    close(written_out(decayed), plain + 0.5 * torch.eye(len(plain), dtype=torch.float64))


def test_training_mode_uses_each_batchs_statistics_and_records_none():
    model, (x, y) = tiny(), samples(12)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    H = block_hessian(model, batches(x, y), mode="train")
    assert H.mode == "train"
    found = written_out(H)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model.eval()
    model[2].train()
    model[2].track_running_stats = False
    expected = torch.stack([differenced_hessian(model, *batch) for batch in batches(x, y)])
    close(found, expected.mean(0), 1e-8)


def test_tangents_that_are_not_differentiable_are_found_out():
    x, y = samples()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    normed = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).double()
    for model, method in ((plain, "reverse-over-forward"), (normed, "double-backward")):
        H = block_hessian(model, batches(x, y))
        assert H.method == method
        close(written_out(H), differenced_hessian(model, x, y), 1e-8)
        G = block_gauss_newton(model, batches(x, y))
        close(written_out(G), dense_gauss_newton(model, x, y))


def test_parameters_without_an_effect_have_no_curvature():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(3, 3)
            self.unused = nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    model, (x, y) = Idle().double(), samples()
    for build in (block_hessian, block_gauss_newton):
        H = build(model, batches(x, y))
        found = written_out(H)
        assert bool((found[12:] == 0).all())
        assert bool((found[:12, :12] != 0).any())
        assert bool((written_out(build(model, batches(x, y), block="unused")) == 0).all())


def test_the_network_is_left_as_it_was():
    model, (x, y) = tiny(), samples()
    model[0].weight.requires_grad_(False)
    model[2].eval()
    modes = [module.training for module in model.modules()]
    H = block_hessian(model, batches(x, y))
    with torch.no_grad():
        product = H @ torch.ones(H.shape[0], dtype=torch.float64)
    assert not product.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert all(p.grad is None for p in model.parameters())


def test_batches_that_run_out_are_an_error():
    model, (x, y) = tiny(), samples()
    H = block_hessian(model, iter(batches(x, y)))
    with pytest.raises(ValueError, match="11 samples at first and 0 now"):
        H @ torch.ones(H.shape[0], dtype=torch.float64)
    with pytest.raises(ValueError, match="no samples"):
        block_hessian(model, [])


@pytest.mark.parametrize(
    ("name", "settings", "block"),
    [
        ("wrn_10_1", {"img_size": 8}, "feature_extractor.layer3"),
        ("resnet18", {"img_size": 32}, "feature_extractor.layer4.1.bn2"),
        ("vit_tiny_patch16_224", {"img_size": 32}, "feature_extractor.blocks.11.attn"),
        ("convnext_atto", {"img_size": 32}, "feature_extractor.stages.3.blocks.0"),
        ("efficientnet_b0", {"img_size": 32}, "feature_extractor.conv_head"),
    ],
)
def test_networks_of_timm_against_double_backward(name, settings, block):
    torch.manual_seed(0)
    network = networks.create(name, num_classes=4, in_chans=1, **settings).eval()
    size = settings["img_size"]
    x, y = torch.randn(3, 1, size, size, dtype=torch.float64), torch.tensor([0, 3, 1])
    H = block_hessian(network, batches(x, y, 2), block=block, dtype=torch.float64)
    v = torch.randn(H.shape[0], dtype=torch.float64)
    found = H @ v
    network.double()
    parameters = [dict(network.named_parameters())[name] for name in H.names]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = nn.functional.cross_entropy(network(x), y)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        inner = torch.cat([g.reshape(-1) for g in gradients]) @ v
        expected = torch.autograd.grad(inner, parameters)
    close(found, torch.cat([g.reshape(-1) for g in expected]), 1e-9)


def test_against_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    model, (x, y) = tiny().eval(), samples()
    data, loss, parameters = batches(x, y), nn.CrossEntropyLoss(), list(model.parameters())
    for ours, theirs in (
        (block_hessian, curvlinops.HessianLinearOperator),
        (block_gauss_newton, curvlinops.GGNLinearOperator),
    ):
        operator = theirs(model, loss, parameters, data)
        v = torch.randn(operator.shape[0], dtype=torch.float64)
        close(ours(model, data) @ v, operator @ v)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_against_pyhessian():
    pyhessian = pytest.importorskip("pyhessian")
    model, (x, y) = tiny().float().eval(), samples()
    x = x.float()
    torch.manual_seed(0)
    theirs = pyhessian.hessian(model, nn.CrossEntropyLoss(), data=(x, y), cuda=False)
    values, _ = theirs.eigenvalues(maxIter=2000, tol=1e-7, top_n=1)
    top, bottom = extreme_eigenvalues(block_hessian(model, batches(x, y)), tolerance=1e-4)
    assert float(top.values[0]) > -float(bottom.values[0])  # else theirs is the other one
    assert float(top.values[0]) == pytest.approx(values[0], rel=1e-3)


def test_trace_by_probes():
    model, (x, y) = tiny(), samples()
    H = block_hessian(model, batches(x, y))
    estimate = trace(H, probes=60)
    exact = float(written_out(H).trace())
    assert abs(estimate.value - exact) < 4 * estimate.standard_error


def test_the_start_is_a_sample_of_the_gauss_newton_matrix():
    model, (x, y) = tiny(), samples()
    H = block_hessian(model, batches(x, y))
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([H.start(generator) for _ in range(2000)])
    model.eval()
    expected = len(x) * dense_gauss_newton(model, x, y)
    size = float(expected.diagonal().max())
    assert float(draws.mean(0).abs().max()) < 5 * (size / len(draws)) ** 0.5
    assert float((draws.T @ draws / len(draws) - expected).abs().max()) < 0.15 * size
    again = H.start(torch.Generator().manual_seed(0))
    assert torch.equal(again, draws[0])


def test_eigenvalues_of_a_network_do_not_depend_on_the_seed():
    model, (x, y) = tiny(), samples()
    H = block_hessian(model, batches(x, y))
    model.eval()
    exact = torch.linalg.eigvalsh(dense_hessian(model, x, y))
    for seed in (0, 1):
        top, bottom = extreme_eigenvalues(H, largest=2, smallest=2, seed=seed)
        assert top.seed == seed
        close(top.values, exact.flip(0)[:2])
        close(bottom.values, exact[:2])
