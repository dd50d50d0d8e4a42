"""The row of the range search."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.core import ratios
from benchmarks.speed.row import Bench, Row, Variant
from benchmarks.speed.subjects import SMALL
from pof.perturbation import classifier_gradient, perturbation_range, target_distribution

_CAP, _POINTS = 10_000, 16  # of the published code's distributed run, and our default


def _published(features: Tensor, labels: Tensor, classifier: torch.nn.Linear) -> float:
    """The published search: double until the loss rises, then the best of 16 points.

    Every trial is a forward of the classifier and a copy of the loss to the host.
    """
    weight, bias = classifier.weight.detach(), classifier.bias.detach()
    weight.requires_grad_(), bias.requires_grad_()
    loss = F.cross_entropy(F.linear(features, weight, bias), labels)
    toward_w, toward_b = torch.autograd.grad(loss, (weight, bias))

    @torch.no_grad()
    def loss_at(step: float) -> float:
        logits = F.linear(features, weight - step * toward_w, bias - step * toward_b)
        return float(F.cross_entropy(logits, labels).item())

    step, before = 1.0, float(loss.item())
    while step < _CAP and (now := loss_at(step)) <= before:
        step, before = 2.0 * step, now
    points = [step * i / _POINTS for i in range(1, _POINTS + 1)]
    return min(points, key=loss_at)


@torch.no_grad()
def _ours(features: Tensor, labels: Tensor, classifier: torch.nn.Linear) -> Tensor:
    """From features to ξ*, as a PoF step does it."""
    features = features.double()
    logits = F.linear(features, classifier.weight.double(), classifier.bias.double())
    target = target_distribution(labels, classifier.out_features)
    gradient = classifier_gradient(features, logits, target)
    norm = gradient.norm()
    slopes = gradient.unit(norm).applied(features)
    return perturbation_range(logits, slopes, target, cap=_CAP * norm).xi


def _measure(bench: Bench, _: Variant) -> list[float]:
    trained = bench.trained
    size = bench.scale.batch_size
    images, labels = next(iter(trained.batches(size, size)))  # it was trained on them, as in PoF
    classifier = trained.network.classifier
    with torch.no_grad():
        features = trained.network.feature_extractor(images)
    timed = bench.alternate(
        {
            "ours": lambda: _ours(features, labels, classifier),
            "published": lambda: _published(features, labels, classifier),
        }
    )
    return ratios(timed["ours"], timed["published"])


ROWS = (
    Row(
        "range-search",
        "from features to ξ*: ours to 1e-6 or better / the published doubling and 16-point grid "
        "with a classifier forward and .item() each",
        _measure,
        goal=0.4,
        cuda_goal=0.15,
        variants=(SMALL,),
    ),
)
