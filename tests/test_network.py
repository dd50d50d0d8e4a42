import copy

import pytest
import torch
from torch import nn

from pof import network
from pof.errors import UnknownBackbone
from pof.network import Network

timm = pytest.importorskip("timm")

# One of each family, and one of each place that timm keeps its last linear layer at.
SMALL = [
    ("resnet18", {}, 32),
    ("wrn_10_1", {}, 28),
    ("wrn_16_2", {"stride": "authors"}, 8),
    ("convnext_atto", {}, 32),
    ("efficientnet_b0", {}, 32),
    ("mobilenetv3_small_050", {}, 32),
    ("vit_tiny_patch16_224", {"img_size": 32}, 32),
    ("regnetx_002", {}, 32),
]
NAMES = [name for name, _, _ in SMALL]

# Size of the images, width of the features and, with 1000 classes, millions of parameters, as
# the networks' papers have them (WRN: counted by hand).
BIG = [
    ("tf_efficientnet_b7", 600, 2560, 66.35),
    ("convnext_tiny", 224, 768, 28.59),
    ("resnet50", 224, 2048, 25.56),
    ("wrn_28_10", 32, 640, 37.11),
]


def timm_model(name, settings, channels=3, classes=7):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=classes, in_chans=channels, **settings)


def images(size, channels=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, channels, size, size, generator=generator, dtype=dtype)


@pytest.mark.parametrize(("name", "settings", "size"), SMALL, ids=NAMES)
def test_classifier_of_features_is_the_model(name, settings, size):
    model = timm_model(name, settings)
    x = images(size)
    reference = copy.deepcopy(model).eval()
    parts = network.split(model, x).eval()
    features = parts.feature_extractor(x)
    expected = reference.forward_head(reference.forward_features(x), pre_logits=True)
    assert features.shape == (4, parts.classifier.in_features)
    assert torch.equal(features, expected)
    assert torch.equal(parts.classifier(features), reference(x))
    assert torch.equal(parts(x), reference(x))

    parts.train()
    reference.train()
    assert torch.equal(parts.classifier(parts.feature_extractor(x)), reference(x))
    moved = dict(reference.named_buffers())
    assert moved.keys() == dict(parts.feature_extractor.named_buffers()).keys()
    for key, buffer in parts.feature_extractor.named_buffers():
        assert torch.equal(buffer, moved[key])  # running statistics too


@pytest.mark.parametrize(("name", "settings", "size"), SMALL, ids=NAMES)
def test_the_gradients_are_the_models(name, settings, size):
    reference = timm_model(name, settings).double().to(memory_format=torch.channels_last)
    parts = network.split(copy.deepcopy(reference))
    x = images(size, dtype=torch.float64).to(memory_format=torch.channels_last)
    labels = torch.tensor([0, 1, 2, 3])
    for module in (reference, parts):
        nn.functional.cross_entropy(module(x), labels).backward()
    gradients = dict(reference.named_parameters())
    head = {id(p) for p in reference.get_classifier().parameters()}
    for key, parameter in parts.feature_extractor.named_parameters():
        assert torch.equal(parameter.grad, gradients[key].grad)
    for ours, theirs in zip(
        parts.classifier.parameters(), reference.get_classifier().parameters(), strict=True
    ):
        assert torch.equal(ours.grad, theirs.grad)
    assert len(list(parts.feature_extractor.parameters())) == len(gradients) - len(head)


@pytest.mark.parametrize("name", NAMES)
def test_phi_and_theta_part_the_models_own_parameters(name):
    model = timm_model(name, {})
    before = list(model.parameters())
    theta = list(model.get_classifier().parameters())
    parts = network.split(model)
    assert parts.feature_extractor is model
    assert [id(p) for p in parts.classifier.parameters()] == [id(p) for p in theta]
    phi = [id(p) for p in parts.feature_extractor.parameters()]
    assert len(phi) == len(set(phi))
    assert set(phi) | {id(p) for p in theta} == {id(p) for p in before}
    assert not set(phi) & {id(p) for p in theta}
    prefixes = {key.split(".")[0] for key in parts.state_dict()}
    assert prefixes == {"feature_extractor", "classifier"}
    assert set(parts.classifier.state_dict()) == {"weight", "bias"}
    parts.eval()
    assert not any(module.training for module in parts.modules())


@pytest.mark.parametrize(("name", "size", "width", "millions"), BIG, ids=[b[0] for b in BIG])
def test_big_networks_on_the_meta_device(name, size, width, millions):
    with torch.device("meta"):
        parts = network.create(name, num_classes=1000, in_chans=3, img_size=size)
        features = parts.feature_extractor(torch.empty(2, 3, size, size))
    assert features.shape == (2, width)
    assert parts.classifier(features).shape == (2, 1000)
    assert round(sum(p.numel() for p in parts.parameters()) / 1e6, 2) == millions


DRAWN = [case for case in SMALL if case[0] in ("resnet18", "wrn_16_2", "vit_tiny_patch16_224")]


@pytest.mark.parametrize(("name", "settings", "size"), DRAWN, ids=[case[0] for case in DRAWN])
def test_create_draws_what_timm_draws_from_the_same_seed(name, settings, size):
    expected = timm_model(name, settings, channels=1).eval()
    torch.manual_seed(0)
    stride = settings.get("stride", "standard")
    parts = network.create(name, num_classes=7, in_chans=1, img_size=size, stride=stride).eval()
    assert isinstance(parts, Network)
    x = images(size, channels=1)
    assert torch.equal(parts(x), expected(x))


def test_dropout_before_the_head_stays_before_the_head():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=32, drop_rate=0.5)
    parts = network.split(model, images(32))
    dropped = parts.train().feature_extractor(images(32)) == 0
    assert 0.4 < dropped.float().mean() < 0.6
    assert parts.eval().feature_extractor(images(32)).all()


@pytest.mark.parametrize("name", ["resnet18", "resnet10t", "seresnext26d_32x4d"])
def test_the_small_stem_keeps_the_resolution(name):
    with torch.device("meta"):
        parts = network.create(name, num_classes=7, in_chans=1, img_size=28, stem="small")
        standard = timm.create_model(name, num_classes=7, in_chans=1)
        x = torch.empty(2, 1, 28, 28)
        stem = parts.feature_extractor
        first = stem.maxpool(stem.act1(stem.bn1(stem.conv1(x))))
        assert first.shape == (2, standard.bn1.num_features, 28, 28)
        assert stem.forward_features(x).shape[2:] == (4, 4)  # 28 / 8, where the 7×7 stem has 1
    assert isinstance(stem.conv1, nn.Conv2d)
    assert stem.conv1.kernel_size == (3, 3)
    assert stem.conv1.bias is None


def test_the_small_stem_is_drawn_like_timms_convolutions():
    torch.manual_seed(0)
    parts = network.create("resnet18", num_classes=7, in_chans=3, img_size=32, stem="small")
    deviation = parts.feature_extractor.conv1.weight.std().item()
    assert deviation == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    assert parts(images(32)).shape == (4, 7)


def test_the_authors_initialisation_is_the_registered_models():
    torch.manual_seed(0)
    parts = network.create(
        "wrn_10_1", num_classes=7, in_chans=3, img_size=8, classifier_init="authors"
    )
    expected = timm_model("wrn_10_1", {"classifier_init": "authors"})
    for ours, theirs in zip(parts.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)

    convnext = network.create(
        "convnext_atto", num_classes=100, in_chans=3, img_size=32, classifier_init="authors"
    )
    assert convnext.classifier.weight.std().item() == pytest.approx(0.1, rel=0.03)


def test_the_authors_stride_reaches_the_wrn():
    with torch.device("meta"):
        parts = network.create("wrn_22_3", num_classes=7, in_chans=3, img_size=8, stride="authors")
    block = parts.feature_extractor.layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))


class Custom(nn.Module):
    """A user's own module: the head is neither last in registration nor called a head."""

    def __init__(self):
        super().__init__()
        self.decide = nn.ModuleDict({"out": nn.Linear(8, 5)})
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5))
        self.unused = nn.Linear(8, 5)

    def forward(self, x):
        return self.decide["out"](input=self.body(x).mean((2, 3)))


def test_any_module_splits_where_an_example_shows_its_head():
    torch.manual_seed(0)
    model = Custom().train()
    before = copy.deepcopy(model)
    state = torch.get_rng_state()
    parts = network.split(model, images(8))
    assert torch.equal(torch.get_rng_state(), state)
    assert parts.classifier is not model.decide["out"]
    assert torch.equal(parts.classifier.weight, before.decide["out"].weight)
    assert all(module.training for module in parts.modules() if module is not parts)
    assert torch.equal(model.body[1].running_mean, before.body[1].running_mean)
    assert torch.equal(parts.eval()(images(8)), before.eval()(images(8)))

    with pytest.raises(UnknownBackbone, match=r"Custom .* give split\(\) an example batch"):
        network.split(Custom())


def test_a_sequential_splits_at_its_last_layer():
    model = nn.Sequential(
        nn.Flatten(), nn.Sequential(nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 5, bias=False))
    )
    last, before = model[1][2], copy.deepcopy(model)
    parts = network.split(model)
    assert parts.classifier is last
    assert torch.equal(parts(images(8)), before(images(8)))


class TwoHeads(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(192, 5), nn.Linear(192, 5), how

    def forward(self, x):
        x = x.flatten(1)
        match self.how:
            case "sum":
                return self.a(x) + self.b(x)
            case "tuple":
                return self.a(x), self.b(x)
            case "scaled":
                return 2 * self.a(x)
            case "mode":
                return self.a(x) if self.training else self.b(x)
            case "training only":
                return (self.a(x), self.b(x)) if self.training else self.a(x)
            case "tokens":
                return self.a(x[:, None])
            case "twice":
                self.a(x)
                return self.a(x + 1)


class Cosine(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(nn.functional.normalize(x), self.weight)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (TwoHeads("sum"), r"ends in b \(Linear\), but the output of that is not"),
        (TwoHeads("scaled"), r"ends in a \(Linear\), but the output of that is not"),
        (TwoHeads("tuple"), "returns a tuple in evaluation"),
        (TwoHeads("training only"), "returns a tuple in training"),
        (TwoHeads("mode"), "ends in a in training, in b in evaluation"),
        (TwoHeads("tokens"), "not run it once on features of shape"),
        (TwoHeads("twice"), "not run it once on features of shape"),
        (
            nn.Sequential(nn.Flatten(), Cosine(192, 5)),
            r"ends in 1 \(Cosine\), not in one nn.Linear",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten()),
            r"ends in 0 \(Conv2d\), 1 \(Flatten\), not in",
        ),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Softmax(1)),
            r"1 \(Linear\), 2 \(Softmax\), not in",
        ),
    ],
)
def test_a_head_that_is_not_one_linear_layer_is_refused(model, found):
    keys = list(model.state_dict())
    with pytest.raises(UnknownBackbone, match=found) as caught:
        network.split(model, images(8))
    assert "\n" not in str(caught.value)
    assert "use a model" in str(caught.value)
    assert list(model.state_dict()) == keys  # left whole


@pytest.mark.parametrize(
    ("name", "settings", "found"),
    [
        ("squeezenet", None, "there is no backbone"),
        ("deit_tiny_distilled_patch16_224", {}, "tuple"),
        ("resnet18", {"num_classes": 0}, "Identity"),
    ],
)
def test_a_timm_model_without_a_linear_head_is_refused(name, settings, found):
    if settings is not None:
        with torch.device("meta"):
            model = timm.create_model(name, **settings)
        with pytest.raises(UnknownBackbone, match=found):
            network.split(model)
    classes = (settings or {}).get("num_classes", 10)
    with pytest.raises(UnknownBackbone, match=name) as caught:
        network.create(name, num_classes=classes, in_chans=3, img_size=224)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("resnet81", {}, ["resnet18", "wrn_D_K"]),
        ("hf-hub:timm/resnet18", {}, ["there is no backbone"]),
        ("wrn_2810", {}, ["wrn_28_10"]),
        ("wrn_11_1", {}, ["depth 11", "6n + 4", "wrn_10_1", "wrn_16_1"]),
        ("wrn_28_0", {}, ["width 0"]),
        ("vit_tiny_patch16_224", {"img_size": 8}, ["vit_tiny_patch16_224", "8"]),
        ("vgg11", {"img_size": 8}, ["vgg11 cannot take images of 3×8×8"]),
        ("convnext_atto", {"stem": "small"}, ["convnext_atto", "ResNet family"]),
        ("resnet18", {"stride": "authors"}, ["resnet18", "WRN"]),
        ("resnet18", {"stem": "tiny"}, ["stem='tiny'", "standard or small"]),
        ("wrn_10_1", {"stem": "small"}, ["wrn_10_1", "ResNet family"]),
        ("wrn_10_1", {"classifier_init": "mine"}, ["classifier_init='mine'"]),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(name, settings, said):
    settings = {"num_classes": 10, "in_chans": 3, "img_size": 32} | settings
    with pytest.raises(UnknownBackbone) as caught:
        network.create(name, **settings)
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message
