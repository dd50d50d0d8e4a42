"""Wide residual networks WRN-d-k for small images, registered with timm.

Importing this module makes ``timm.create_model("wrn_28_10", num_classes=10)`` work for the usual
depths and widths; `register` adds any other depth 6n+4.

The network is that of Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016
(arXiv 1605.07146), without dropout. Two settings follow the implementation that the PoF
paper's authors published: where a down-sampling block has its stride, and how the classifier
is initialised.
"""

import re
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from pof import _torchvision
from pof.errors import UnknownBackbone

_torchvision.make_importable()

import timm.models  # noqa: E402
from timm.layers import create_classifier  # noqa: E402

__all__ = ["WideResNet", "initialise_classifier", "register", "register_by_name"]

Stride = Literal["standard", "authors"]
ClassifierInit = Literal["standard", "authors"]

_NAME = re.compile(r"wrn_(\d+)_(\d+)")

#: What timm knows of each registered network: its name → its configuration. None has weights.
default_cfgs: dict[str, dict[str, Any]] = {}


def initialise_classifier(classifier: nn.Linear) -> None:
    """Draw a classifier as the PoF authors do: weights from N(0, 0.1²), bias 0; in place."""
    nn.init.normal_(classifier.weight, std=0.1)
    if classifier.bias is not None:
        nn.init.zeros_(classifier.bias)


class _Block(nn.Module):
    """A pre-activation residual block: BN, ReLU, 3×3, BN, ReLU, 3×3, plus the shortcut.

    The shortcut is the identity where input and output have one shape; otherwise it is a 1×1
    convolution of the activated input.
    """

    def __init__(self, width_in: int, width_out: int, strides: tuple[int, int]) -> None:
        super().__init__()
        stride = strides[0] * strides[1]
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, strides[0], padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, strides[1], padding=1, bias=False)
        self.shortcut: nn.Module | None = (
            None
            if width_in == width_out and stride == 1
            else nn.Conv2d(width_in, width_out, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, width_in, H, W) to (N, width_out, ⌈H/stride⌉, ⌈W/stride⌉)."""
        y = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.conv1(y)
        y = self.conv2(F.relu(self.bn2(y)))
        out: Tensor = shortcut + y
        return out


class WideResNet(nn.Module):
    """WRN-d-k: a 3×3 convolution, three groups of blocks, BN, ReLU, average pooling, linear.

    The groups are 16k, 32k and 64k channels wide, with n = (d − 4)/6 blocks each; the second and
    the third halve the resolution. Images of any size are taken.

    Convolutions are drawn from N(0, 2/(k²·channels out)) and the classifier's bias is 0, as in
    the WRN authors' own implementation; the classifier's weights keep PyTorch's uniform
    distribution on ±1/√d, which is also Lua Torch's, that they used.

    Args:
        depth: d = 6n + 4, the number of convolutions, three of them shortcuts.
        width: k, the widening factor.
        num_classes: Number of classes; 0 leaves the classifier out.
        in_chans: Number of channels of the images.
        global_pool: timm's name of the pooling before the classifier.
        stride: Where a down-sampling block has its stride: on the first 3×3 convolution
            ("standard") or on the second ("authors", 14% more multiplications in WRN-28-10).
        classifier_init: "standard", or "authors" (see `initialise_classifier`).

    Raises:
        UnknownBackbone: The depth is not 6n + 4, the width not positive, or a setting has no
            such value.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        stride: Stride = "standard",
        classifier_init: ClassifierInit = "standard",
    ) -> None:
        super().__init__()
        _check_shape(depth, width)
        for setting, value in (("stride", stride), ("classifier_init", classifier_init)):
            if value not in ("standard", "authors"):
                raise UnknownBackbone(
                    f"{setting}={value!r} is no setting of a WRN: choose 'standard' or 'authors'"
                )
        self.num_classes = num_classes
        self.in_chans = in_chans

        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        down = (2, 1) if stride == "standard" else (1, 2)
        self.layer1 = _group(16, 16 * width, blocks, (1, 1))
        self.layer2 = _group(16 * width, 32 * width, blocks, down)
        self.layer3 = _group(32 * width, 64 * width, blocks, down)
        self.num_features = self.head_hidden_size = 64 * width
        self.bn_out = nn.BatchNorm2d(self.num_features)
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool
        )
        self.feature_info = [
            {"num_chs": 16 * width * 2**i, "reduction": 2**i, "module": f"layer{i + 1}"}
            for i in range(3)
        ]

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(self.fc, nn.Linear):
            nn.init.zeros_(self.fc.bias)
            if classifier_init == "authors":
                initialise_classifier(self.fc)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (N, in_chans, H, W) to the last feature maps, (N, 64k, ⌈H/4⌉, ⌈W/4⌉)."""
        x = self.conv1(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        return F.relu(self.bn_out(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map feature maps to logits (N, num_classes), or to features (N, 64k)."""
        features: Tensor = self.global_pool(x)
        if pre_logits:
            return features
        logits: Tensor = self.fc(features)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_chans, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the classifier: linear, or an identity where there are no classes."""
        classifier: nn.Module = self.fc
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a freshly drawn classifier in place, or none where ``num_classes`` is 0.

        Its weights are drawn as "standard" says; the pooling stays unless another is named.
        """
        weight = self.conv1.weight
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(
            self.num_features,
            num_classes,
            pool_type=self.global_pool.pool_type if global_pool is None else global_pool,
            device=weight.device,
            dtype=weight.dtype,
        )
        if isinstance(self.fc, nn.Linear):
            nn.init.zeros_(self.fc.bias)


def _group(width_in: int, width_out: int, blocks: int, strides: tuple[int, int]) -> nn.Sequential:
    return nn.Sequential(
        _Block(width_in, width_out, strides),
        *(_Block(width_out, width_out, (1, 1)) for _ in range(blocks - 1)),
    )


def _check_shape(depth: int, width: int) -> None:
    """Raise where there is no WRN of this depth and width."""
    if depth < 10 or depth % 6 != 4:
        below = max(10, (depth - 4) // 6 * 6 + 4)
        raise UnknownBackbone(
            f"there is no WRN of depth {depth}: a depth is 6n + 4 (10, 16, 22, 28, …);"
            f" try wrn_{below}_{width} or wrn_{below + 6}_{width}"
        )
    if width < 1:
        raise UnknownBackbone(f"there is no WRN of width {width}: the widening factor is ≥ 1")


def register(depth: int, width: int) -> str:
    """Register WRN-``depth``-``width`` with timm unless it is there already.

    Returns:
        The name that ``timm.create_model`` takes it by, ``wrn_{depth}_{width}``.

    Raises:
        UnknownBackbone: The depth is not 6n + 4, or the width not positive.
    """
    _check_shape(depth, width)
    name = f"wrn_{depth}_{width}"
    if timm.models.is_model(name):
        return name

    # timm reads an entry point's name and module, and this module's `default_cfgs`.
    default_cfgs[name] = {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "first_conv": "conv1",
        "classifier": "fc",
    }
    timm.models.register_model(_entry_point(name, depth, width))
    return name


def _entry_point(name: str, depth: int, width: int) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **settings: Any) -> nn.Module:
        if pretrained:
            raise UnknownBackbone(f"{name} has no pretrained weights")
        settings = {"depth": depth, "width": width, **settings}
        model: nn.Module = timm.models.build_model_with_cfg(WideResNet, name, False, **settings)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"WRN-{depth}-{width}; takes the settings of `WideResNet`."
    return build


def register_by_name(name: str) -> bool:
    """Register the network called ``wrn_D_K``; False where the name is of another form.

    Raises:
        UnknownBackbone: The name is of this form, but there is no such WRN.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return False
    register(int(match[1]), int(match[2]))
    return True


for _depth in (10, 16, 22, 28, 34, 40):
    for _width in (1, 2, 4, 8, 10, 12):
        register(_depth, _width)
