import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pof import wide_resnet
from pof.errors import UnknownBackbone
from pof.wide_resnet import WideResNet

timm = pytest.importorskip("timm")


def parameters_by_hand(depth, width, channels, classes):
    """Count a WRN's parameters from the paper's table 1 alone."""
    n = (depth - 4) // 6
    total = 9 * channels * 16  # conv1
    before = 16
    for after in (16 * width, 32 * width, 64 * width):
        for i in range(n):
            w = before if i == 0 else after
            total += 2 * w + 9 * w * after  # bn1, conv1
            total += 2 * after + 9 * after * after  # bn2, conv2
            total += w * after if w != after else 0  # shortcut
        before = after
    return total + 2 * before + before * classes + classes


def macs(model, channels, size):
    x = torch.empty(1, channels, size, size, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2


def test_wrn_28_10_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = timm.create_model("wrn_28_10", num_classes=10, in_chans=3)
    assert sum(p.numel() for p in model.parameters()) == 36_479_194


@pytest.mark.parametrize(
    ("depth", "width", "channels", "classes"),
    [(10, 1, 1, 10), (16, 4, 3, 10), (28, 10, 3, 100), (40, 2, 3, 7)],
)
def test_the_number_of_parameters_is_the_one_counted_by_hand(depth, width, channels, classes):
    with torch.device("meta"):
        for stride in ("standard", "authors"):
            model = timm.create_model(
                f"wrn_{depth}_{width}", num_classes=classes, in_chans=channels, stride=stride
            )
            counted = sum(p.numel() for p in model.parameters())
            assert counted == parameters_by_hand(depth, width, channels, classes)


@pytest.mark.parametrize(("stride", "giga"), [("standard", 5.24), ("authors", 5.95)])
def test_the_stride_placement_costs_what_it_should(stride, giga):
    with torch.device("meta"):
        model = WideResNet(28, 10, stride=stride)
    assert round(macs(model, 3, 32) / 1e9, 2) == giga


def test_the_authors_stride_adds_the_first_convolution_at_full_resolution():
    with torch.device("meta"):
        standard, authors = (WideResNet(10, 1, stride=s) for s in ("standard", "authors"))
    # conv1 of layer2 and layer3 runs on four times as many positions.
    extra = 3 * (16 * 16) * 9 * 16 * 32 + 3 * (8 * 8) * 9 * 32 * 64
    assert macs(authors, 3, 32) - macs(standard, 3, 32) == extra


@pytest.mark.parametrize("stride", ["standard", "authors"])
def test_the_forward_pass_is_the_papers_written_out_functionally(stride):
    torch.manual_seed(0)
    model = WideResNet(16, 2, in_chans=1, stride=stride).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
    x = torch.randn(3, 1, 12, 12, dtype=torch.float64)
    p = model.state_dict()

    def bn_relu(y, name):
        mean, var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
        y = (y - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        return (y * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]).relu()

    y = F.conv2d(x, p["conv1.weight"], padding=1)
    for group in (1, 2, 3):
        for block in (0, 1):
            name = f"layer{group}.{block}"
            down = 2 if group > 1 and block == 0 else 1
            first, second = (down, 1) if stride == "standard" else (1, down)
            active = bn_relu(y, f"{name}.bn1")
            z = F.conv2d(active, p[f"{name}.conv1.weight"], stride=first, padding=1)
            z = bn_relu(z, f"{name}.bn2")
            z = F.conv2d(z, p[f"{name}.conv2.weight"], stride=second, padding=1)
            if block == 0:  # every group widens here, so its first block has a convolution
                y = F.conv2d(active, p[f"{name}.shortcut.weight"], stride=down)
            y = y + z
    features = bn_relu(y, "bn_out").mean((2, 3))
    torch.testing.assert_close(model(x), features @ p["fc.weight"].T + p["fc.bias"])
    torch.testing.assert_close(model.forward_head(model.forward_features(x), True), features)


def test_the_initialisation_is_he_normal_fan_out_and_a_zero_bias():
    torch.manual_seed(0)
    model = WideResNet(10, 4)
    conv = model.layer3[0].conv1.weight
    assert conv.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.01)
    assert abs(conv.mean().item()) < 1e-3
    assert model.fc.weight.abs().max() <= 1 / math.sqrt(256)
    assert not model.fc.bias.any()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()


def test_the_authors_classifier_is_normal_with_deviation_a_tenth():
    torch.manual_seed(0)
    model = WideResNet(10, 10, num_classes=100, classifier_init="authors")
    weight = model.fc.weight
    assert weight.std().item() == pytest.approx(0.1, rel=0.01)
    assert weight.abs().max() > 0.3  # no uniform distribution of this deviation reaches there
    assert not model.fc.bias.any()


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (1, 8), (3, 33)])
def test_small_images_of_any_size_and_channels(channels, size):
    model = WideResNet(10, 1, in_chans=channels)
    x = torch.randn(2, channels, size, size)
    maps = model.forward_features(x)
    side = math.ceil(math.ceil(size / 2) / 2)
    assert maps.shape == (2, 64, side, side)
    assert model(x).shape == (2, 10)


def test_channels_last_changes_the_layout_only():
    torch.manual_seed(0)
    model = WideResNet(10, 2).double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    expected = model(x)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model = model.to(memory_format=torch.channels_last)
    logits = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, expected)
    logits.square().sum().backward()
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_the_whole_network_is_one_graph():
    model = WideResNet(10, 1).eval()
    x = torch.randn(2, 3, 8, 8)
    whole = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(x), model(x))


def test_it_behaves_like_a_model_of_timm():
    model = timm.create_model("wrn_16_4", num_classes=7, in_chans=1)
    assert model.num_features == model.head_hidden_size == 256
    assert model.default_cfg["architecture"] == "wrn_16_4"
    assert model.default_cfg["input_size"] == (3, 32, 32)
    assert model.get_classifier() is model.fc
    assert dict(model.named_modules())[model.default_cfg["classifier"]] is model.fc
    assert isinstance(model.get_submodule(model.default_cfg["first_conv"]), nn.Conv2d)

    model.double().reset_classifier(3)
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, 256)

    pyramid = timm.create_model("wrn_10_1", features_only=True, out_indices=(0, 1, 2))
    shapes = [tuple(m.shape[1:]) for m in pyramid(torch.randn(1, 3, 32, 32))]
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert pyramid.feature_info.reduction() == [1, 2, 4]


def test_common_networks_are_registered_and_others_on_demand(recwarn):
    assert {"wrn_28_10", "wrn_16_4", "wrn_10_1", "wrn_40_2"} <= set(timm.list_models("wrn_*"))
    assert not timm.is_model("wrn_58_3")
    assert wide_resnet.register(58, 3) == wide_resnet.register(58, 3) == "wrn_58_3"
    with torch.device("meta"):
        model = timm.create_model("wrn_58_3", num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == parameters_by_hand(58, 3, 3, 10)
    assert not recwarn.list


@pytest.mark.parametrize(("depth", "width"), [(11, 1), (4, 1), (0, 1), (28, 0)])
def test_there_is_no_wrn_of_another_depth_or_width(depth, width):
    for build in (WideResNet, wide_resnet.register):
        with pytest.raises(UnknownBackbone, match=r"there is no WRN of (depth|width) \d+: .+"):
            build(depth, width)


def test_a_wrong_setting_and_pretrained_weights_are_refused():
    with pytest.raises(UnknownBackbone, match="stride='second'"):
        WideResNet(10, 1, stride="second")
    with pytest.raises(UnknownBackbone, match="classifier_init=0"):
        WideResNet(10, 1, classifier_init=0)
    with pytest.raises(UnknownBackbone, match="no pretrained weights"):
        timm.create_model("wrn_10_1", pretrained=True)
