"""The checkpoints that the PoF authors released, as networks of this project.

``fet_N.pth`` holds a feature extractor and ``clf_N.pth`` its classifier, after N epochs: each a
dictionary whose ``param`` has the weights by name (``optim`` is not looked at). The names, which
may begin with ``module.``, are ``layerG.num_I.{bn1,conv1,bn2,conv2,shortcut.0}`` for block I of
group G and ``bn_out`` after them; the one convolution outside the blocks is the first layer, and
the one weight and bias of ``clf_N.pth`` are the classifier, whatever these are called
(``classifiers.0``). Depth and width show in the shapes. The blocks are the authors': see ``stride``
in `pof.wide_resnet`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.errors import UserError
from pof.errors import PofError
from pof.network import Network, create

_FILE = re.compile(r"(fet|clf)_(.+)\.pth")
_IN_BLOCK = re.compile(r"layer(\d+)\.num_(\d+)\.((?:bn|conv)[12]|shortcut\.0)\.(\w+)")
_COUNTER = "num_batches_tracked"  # plays no part where a network is only looked at

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Pair:
    """The two files of one network.

    Attributes:
        name: N of the files' names: the epoch.
        extractor: ``fet_N.pth``.
        classifier: ``clf_N.pth``.
    """

    name: str
    extractor: Path
    classifier: Path


def pairs(folder: Path) -> list[Pair]:
    """Every network of a folder, by epoch; one of its two files may be missing.

    Raises:
        UserError: There are none.
    """
    found = [match for path in folder.glob("*.pth") if (match := _FILE.fullmatch(path.name))]
    if not found:
        raise UserError(f"{folder}: no files fet_N.pth and clf_N.pth in this folder")
    names = sorted({match[2] for match in found}, key=lambda name: (len(name), name))
    return [Pair(n, folder / f"fet_{n}.pth", folder / f"clf_{n}.pth") for n in names]


def load(pair: Pair, image_size: int) -> tuple[str, Network]:
    """Read a network.

    Args:
        pair: Its files.
        image_size: Height and width of the images it is for.

    Returns:
        The backbone's name, ``wrn_D_K``, and the network, in evaluation mode.

    Raises:
        UserError: A file is missing or damaged, or holds another network than this layout's.
    """
    extractor = _layers(pair.extractor, _read(pair.extractor))
    classifier = _linear(pair.classifier, _read(pair.classifier))
    blocks = sum(name.endswith("conv2.weight") for name in extractor)
    last = extractor.get("bn_out.weight")
    if not blocks or blocks % 3 or last is None or len(last) % 64:
        raise UserError(
            f"{pair.extractor}: not a WRN: {blocks} blocks, of which three groups have as many "
            f"each, and {'no bn_out' if last is None else f'{len(last)} features'}, a multiple "
            "of 64"
        )
    name = f"wrn_{4 + 2 * blocks}_{len(last) // 64}"
    try:
        network = create(
            name,
            num_classes=len(classifier["bias"]),
            in_chans=extractor["conv1.weight"].shape[1],
            img_size=image_size,
            stride="authors",
        )
    except PofError as error:
        raise UserError(f"{pair.extractor}: {error}") from error
    _fill(network.feature_extractor, extractor, f"{pair.extractor}: {name}")
    _fill(network.classifier, classifier, f"{pair.classifier}: the classifier of {name}")
    return name, network.eval()


def _read(path: Path) -> Weights:
    """The weights of a file by name; nothing in it is executed."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; both files of a network are needed")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or a made-up file provokes
        raise UserError(f"{path}: not a file of weights, or damaged (download it again)") from error
    weights = content.get("param") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise UserError(f"{path}: holds no 'param' with weights by name")
    for name, weight in weights.items():
        if not bool(weight.isfinite().all()):
            raise UserError(f"{path}: {name}: holds values that are not finite")
    return {str(name).removeprefix("module."): weight for name, weight in weights.items()}


def _layers(path: Path, weights: Weights) -> Weights:
    """A feature extractor's weights under the names of ``pof.wide_resnet``."""
    inside = {name: match for name in weights if (match := _IN_BLOCK.fullmatch(name))}
    numbers = sorted({(int(match[1]), int(match[2])) for match in inside.values()})
    groups = sorted({group for group, _ in numbers})
    place = {
        (group, block): f"layer{groups.index(group) + 1}.{index}"
        for group in groups
        for index, (_, block) in enumerate(n for n in numbers if n[0] == group)
    }
    found = {}
    for name, weight in weights.items():
        if name in inside:
            group, block, layer, kind = inside[name].groups()
            ours = f"{place[int(group), int(block)]}.{layer.removesuffix('.0')}.{kind}"
        elif name.startswith("bn_out."):
            ours = name
        elif weight.ndim == 4 and "conv1.weight" not in found:
            ours = "conv1.weight"
        else:
            raise UserError(f"{path}: {name}: unknown key")
        found[ours] = weight
    if "conv1.weight" not in found:
        raise UserError(f"{path}: no convolution outside the blocks, which would be the first")
    return found


def _linear(path: Path, weights: Weights) -> Weights:
    """A classifier's weight and bias."""
    owners = {name.rpartition(".")[0] for name in weights}
    kinds = {name.rpartition(".")[2]: weight for name, weight in weights.items()}
    if len(owners) != 1 or kinds.keys() != {"weight", "bias"} or kinds["weight"].ndim != 2:
        raise UserError(
            f"{path}: expected one linear layer's weight and bias, found {', '.join(weights)}"
        )
    return kinds


def _fill(module: torch.nn.Module, weights: Weights, what: str) -> None:
    """Put weights in place, all of them and every one."""
    wanted = {n: w for n, w in module.state_dict().items() if not n.endswith(_COUNTER)}
    given = {n: w for n, w in weights.items() if not n.endswith(_COUNTER)}
    for problem in _problems(wanted, given):
        raise UserError(f"{what}: {problem}")
    module.load_state_dict(given, strict=False)


def _problems(wanted: Weights, given: Weights) -> Iterator[str]:
    for name in given.keys() - wanted.keys():
        yield f"{name}: unknown key"
    for name in wanted.keys() - given.keys():
        yield f"{name}: missing"
    for name, weight in given.items():
        if weight.shape != wanted[name].shape:
            shapes = [str(tuple(w.shape)) for w in (weight, wanted[name])]
            yield f"{name}: has shape {shapes[0]}, must have {shapes[1]}"
