"""PoF: Post-Training of Feature Extractor (Sato et al., ICML 2022), with SAM to post-train from.

The package holds the method and what it needs: networks, data on the device, SAM, PoF,
training, curvature. It knows nothing of experiments, result files or clusters.

What a user with a network of their own needs is here by name, and loaded when first used:
``import pof`` alone does not load PyTorch. ``examples/own_network.py`` shows it at work.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pof.hessian.classifier import classifier_hessian
    from pof.hessian.eigen import top_eigenvalues
    from pof.network import Network, create, split
    from pof.perturbation import perturbation_range
    from pof.post_training import PoFGradient
    from pof.sam import SAMGradient
    from pof.settings import PoFSettings, SAMSettings

__all__ = [
    "Network",
    "PoFGradient",
    "PoFSettings",
    "SAMGradient",
    "SAMSettings",
    "classifier_hessian",
    "create",
    "perturbation_range",
    "split",
    "top_eigenvalues",
]

_HOME = {
    "Network": "network",
    "PoFGradient": "post_training",
    "PoFSettings": "settings",
    "SAMGradient": "sam",
    "SAMSettings": "settings",
    "classifier_hessian": "hessian",
    "create": "network",
    "perturbation_range": "perturbation",
    "split": "network",
    "top_eigenvalues": "hessian",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
