"""Make ``import torchvision`` (and so ``import timm``) work beside a CPU-only PyTorch.

The package index serves torchvision built for CUDA only. Beside a CPU build of PyTorch its
compiled library does not load, and the import then stops with "operator torchvision::nms does
not exist". Declaring the operators' schemas before the first import is enough: nothing here
calls them. Where the compiled library loads, nothing is touched.
"""

import importlib.util
from pathlib import Path

import torch

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: torch.library.Library | None = None  # kept alive: its operators go with it


def make_importable() -> None:
    """Declare torchvision's operators if its compiled library cannot be loaded. Idempotent."""
    global _library
    if _library is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    for binary in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(binary))
            return
        except OSError:
            continue
    _library = torch.library.Library("torchvision", "DEF")
    for name in _OPERATORS:
        _library.define(f"{name}{_SCHEMA}")
