"""A network as PoF sees it: a feature extractor and the linear classifier on top of it.

`create` builds an image classifier of timm (or a WRN, see `pof.wide_resnet`) by name and `split`
takes any classifier apart. Nothing is copied: the last linear layer is taken out, an identity
stays in its place, and so pooling, norms and dropout before it remain where they were.
"""

import copy
import difflib
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pof import _torchvision, wide_resnet
from pof.errors import UnknownBackbone

_torchvision.make_importable()

import timm  # noqa: E402
import timm.layers  # noqa: E402
from timm.models.resnet import ResNet  # noqa: E402

__all__ = ["Network", "create", "split"]

Stem = Literal["standard", "small"]


class Network(nn.Module):
    """A feature extractor (parameters φ) and a classifier (parameters θ) on top of it.

    The keys of its ``state_dict`` begin with ``feature_extractor.`` and ``classifier.``.

    Attributes:
        feature_extractor: Maps images (N, C, H, W) to features (N, d).
        classifier: The last linear layer; maps features (N, d) to logits (N, classes).
    """

    def __init__(self, feature_extractor: nn.Module, classifier: nn.Linear) -> None:
        super().__init__()
        self.feature_extractor = feature_extractor
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, classes)."""
        logits: Tensor = self.classifier(self.feature_extractor(x))
        return logits


def create(
    name: str,
    *,
    num_classes: int,
    in_chans: int,
    img_size: int,
    stem: Stem = "standard",
    stride: wide_resnet.Stride = "standard",
    classifier_init: wide_resnet.ClassifierInit = "standard",
) -> Network:
    """Build a randomly initialised network by name and split it.

    The weights are drawn from PyTorch's global generator: seed it first. Before that, the network
    is built and run without data, on the meta device, so what cannot work fails here and at once.

    Args:
        name: A name of ``timm.list_models()``, or ``wrn_D_K`` with any depth D = 6n + 4.
        num_classes: Number of classes.
        in_chans: Number of channels of the images.
        img_size: Height and width of the images; handed on to the models that ask for it. (timm's
            ViTs leave out the border that fills no whole patch: choose a multiple.)
        stem: "small" gives timm's ResNet family a stem for small images: one 3×3 convolution of
            stride 1 in place of the first convolution (or of a deep stem's three), and no
            max-pooling.
        stride: "authors" puts the stride of a WRN's down-sampling blocks on the second 3×3
            convolution, as the PoF authors do.
        classifier_init: "authors" draws the classifier's weights from N(0, 0.1²) and sets its
            bias to 0, as the PoF authors do; for any network.

    Raises:
        UnknownBackbone: There is no such network, it does not have the setting, it cannot take
            such images, or its logits do not come out of one linear layer.
    """
    for setting, value, values in (
        ("stem", stem, ("standard", "small")),
        ("stride", stride, ("standard", "authors")),
        ("classifier_init", classifier_init, ("standard", "authors")),
    ):
        if value not in values:
            raise UnknownBackbone(
                f"{setting}={value!r} is no setting of a backbone: choose {' or '.join(values)}"
            )
    is_wrn = wide_resnet.register_by_name(name)
    if not is_wrn:
        _check_name(name)
    if stride != "standard" and not is_wrn:
        raise UnknownBackbone(f"stride={stride!r} is a setting of the WRNs only, not of {name}")

    settings: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans}
    if is_wrn:
        settings["stride"] = stride

    with torch.device("meta"):
        outline, settings = _outline(name, settings, img_size)
        if stem == "small":
            _use_small_stem(outline, name)
        example = torch.empty(2, in_chans, img_size, img_size)
        try:
            path = _find_head(outline, example)
        except UnknownBackbone as error:
            raise UnknownBackbone(f"{name} {error}") from error

    model = timm.create_model(name, pretrained=False, **settings)
    if stem == "small":
        _use_small_stem(model, name)
    network = _cut(model, path)
    if classifier_init == "authors":
        wide_resnet.initialise_classifier(network.classifier)
    return network


def split(model: nn.Module, example: Tensor | None = None) -> Network:
    """Take a classifier apart into feature extractor and last linear layer.

    The parts are the model's own modules: the linear layer is taken out of ``model``, which is
    from then on the feature extractor. ``network.classifier(network.feature_extractor(x))`` is
    what ``model(x)`` was, bit for bit, in training and in evaluation.

    Args:
        model: The classifier.
        example: A mini-batch of images, of which two are used. With it, forward passes of a copy
            find the layer that the logits come out of, in any module. Without it, a timm model
            is taken at the word of its ``get_classifier()``, an ``nn.Sequential`` at its last
            layer.

    Raises:
        UnknownBackbone: The logits do not come out of one linear layer that is run once on
            features (N, d), or an example is needed to tell.
    """
    if example is None:
        return _cut(model, _declared_head(model))
    devices = [example.device] if example.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        path = _find_head(copy.deepcopy(model), example[:2])
    return _cut(model, path)


def _check_name(name: str) -> None:
    """Raise where timm has no model of this name (a pretrained tag after a dot is ignored)."""
    if timm.is_model(name):
        return
    close = difflib.get_close_matches(name, timm.list_models(), n=3)
    hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
    raise UnknownBackbone(f"there is no backbone {name!r}: {hint} (or wrn_D_K with D = 6n + 4)")


def _outline(
    name: str, settings: dict[str, Any], img_size: int
) -> tuple[nn.Module, dict[str, Any]]:
    """Build a model, with ``img_size`` where it takes it; timm has no list, so this is tried.

    Returns:
        The model, and the settings that it took.
    """
    sized = {**settings, "img_size": img_size}
    try:
        try:
            return timm.create_model(name, pretrained=False, **sized), sized
        except TypeError as error:
            if "img_size" not in str(error):
                raise
        return timm.create_model(name, pretrained=False, **settings), settings
    except Exception as error:
        asked = ", ".join(f"{key}={value}" for key, value in sized.items())
        raise UnknownBackbone(f"{name} cannot be built for {asked}: {_line(error)}") from error


def _use_small_stem(model: Any, name: str) -> None:
    if not isinstance(model, ResNet):
        raise UnknownBackbone(
            f"stem='small' is a setting of timm's ResNet family only, not of {name}"
        )
    convolutions = [m for m in model.conv1.modules() if isinstance(m, nn.Conv2d)]
    conv1 = nn.Conv2d(
        convolutions[0].in_channels, convolutions[-1].out_channels, 3, padding=1, bias=False
    )
    nn.init.kaiming_normal_(conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm's
    model.conv1 = conv1
    model.maxpool = nn.Identity()


def _find_head(model: nn.Module, example: Tensor) -> str:
    """Return the path of the layer that the model's logits come out of, whichever its mode."""
    in_evaluation = _final_layer(model.eval(), example)
    in_training = _final_layer(model.train(), example)
    if in_training != in_evaluation:
        raise UnknownBackbone(
            f"ends in {in_training} in training, in {in_evaluation} in evaluation;"
            " use a model with one head"
        )
    return in_training


@torch.no_grad()
def _final_layer(model: nn.Module, example: Tensor) -> str:
    """Run the model once and return the path of the linear layer that its output comes out of.

    Raises:
        UnknownBackbone: There is none, or it is run more often or on something other than (N, d).
    """
    calls: list[tuple[str, nn.Module, Any]] = []

    def recorder(path: str) -> Callable[..., None]:
        return lambda layer, _, output: calls.append((path, layer, output))

    hooks = [
        layer.register_forward_hook(recorder(path))
        for path, layer in model.named_modules()
        if path and not list(layer.children()) and not isinstance(layer, nn.Identity)
    ]
    try:
        logits = model(example)
    except Exception as error:
        size = "×".join(map(str, example.shape[1:]))
        raise UnknownBackbone(f"cannot take images of {size}: {_line(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()

    if not isinstance(logits, Tensor):
        raise UnknownBackbone(
            f"returns a {type(logits).__name__} in {'training' if model.training else 'evaluation'}"
            " instead of a tensor of logits; use a model with one head"
        )
    if not calls:
        raise UnknownBackbone("runs no layers; use a model that ends in an nn.Linear")
    path, layer, output = calls[-1]
    start = max((i for i, call in enumerate(calls) if list(call[1].parameters())), default=0)
    found = "ends in " + ", ".join(
        f"{p} ({type(module).__name__})" for p, module, _ in calls[start:]
    )
    if not _is_linear(layer):
        raise UnknownBackbone(f"{found}, not in one nn.Linear; use a model with a linear head")
    if output is not logits:
        raise UnknownBackbone(
            f"{found}, but the output of that is not the model's; use a model with one linear head"
        )
    if logits.ndim != 2 or sum(module is layer for _, module, _ in calls) > 1:
        raise UnknownBackbone(
            f"{found}, but does not run it once on features of shape (N, d);"
            " use a model that pools its features before the classifier"
        )
    return path


def _is_linear(layer: nn.Module) -> bool:
    """Tell whether a layer computes W f + b, which a subclass of nn.Linear need not."""
    if not isinstance(layer, nn.Linear):
        return False
    forward: object = type(layer).forward
    return forward in (nn.Linear.forward, timm.layers.Linear.forward)


def _declared_head(model: nn.Module) -> str:
    """Return the path of the layer that the model itself names its classifier."""
    if isinstance(model, nn.Sequential) and len(model):
        *_, (key, last) = model.named_children()
        if isinstance(last, nn.Sequential):
            return f"{key}.{_declared_head(last)}"
        head: Any = last
    elif callable(get_classifier := getattr(model, "get_classifier", None)):
        head = get_classifier()
    else:
        raise UnknownBackbone(
            f"{type(model).__name__} does not say which layer is its classifier;"
            " give split() an example batch"
        )
    paths: list[str] = [path for path, layer in model.named_modules() if layer is head]
    if not paths or not _is_linear(head):
        raise UnknownBackbone(
            f"the head of {type(model).__name__} is a {type(head).__name__}, not one nn.Linear;"
            " use a model with a linear head"
        )
    return paths[0]


def _cut(model: nn.Module, path: str) -> Network:
    """Take the linear layer at ``path`` out of the model and leave an identity there."""
    classifier = model.get_submodule(path)
    assert isinstance(classifier, nn.Linear)
    model.set_submodule(path, nn.Identity())
    return Network(model, classifier)


def _line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
