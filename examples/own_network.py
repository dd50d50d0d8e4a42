"""PoF with a network of one's own: split it, train it, look at its curvature, post-train it.

A small CNN on scikit-learn's bundled 8×8 digits; a few seconds on one CPU core. Every claim made
along the way is asserted. Run it from the checkout: ``python -m examples.own_network``.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import pof
from pof.data.augmentation import Normalise
from pof.data.batches import Batches
from pof.hessian import ImageBatches
from pof.objective import Objective
from pof.perturbation import classifier_gradient, loss_along_ray, target_distribution
from pof.settings import AugmentationSettings
from pof.training import evaluate


def own_network() -> nn.Module:
    """Any classifier will do that ends in a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def main() -> None:
    """Run the example."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images * 15.9, dtype=torch.uint8)[..., None]  # (N, 8, 8, 1)
    labels = torch.tensor(digits.target)
    normalise = Normalise((0.3,), (0.37,), device=images.device)

    def batches(seed: int) -> Batches:
        return Batches(
            images,
            labels,
            batch_size=128,
            augmentation=AugmentationSettings(kind="none"),
            normalise=normalise,
            order_seed=seed,
            augmentation_seed=seed,
        )

    # A feature extractor φ and a classifier θ; nothing is copied.
    network = pof.split(own_network())
    assert isinstance(network.classifier, nn.Linear)
    objective = Objective(network)

    # Pre-train with SAM. A gradient rule fills .grad; the optimizer is any.
    sam = pof.SAMGradient(objective, pof.SAMSettings(rho=0.05))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    stream = batches(seed=1)
    steps = 8 * stream.per_epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        sam(*stream.draw())
        optimizer.step()
        schedule.step()
    _, error = evaluate(network, images, labels, normalise)
    print(f"training error after SAM: {error:.1f}%")
    assert error < 5.0

    # The range ξ* of one batch: where the loss is least against its normalised gradient.
    x, y = stream.draw()
    network.eval()
    with torch.no_grad():
        features = network.feature_extractor(x).double()
        weight, bias = network.classifier.weight.double(), network.classifier.bias.double()
        logits = features @ weight.T + bias
        target = target_distribution(y, 10)
        gradient = classifier_gradient(features, logits, target)
        slopes = gradient.unit().applied(features)
        found = pof.perturbation_range(logits, slopes, target, cap=1e4 * gradient.norm())
        around = loss_along_ray(logits, slopes, target, found.xi * torch.tensor([0.99, 1.0, 1.01]))
    print(f"perturbation range of a batch: {float(found.xi):.4f}")
    assert not found.capped
    assert around.argmin() == 1

    # The classifier's Hessian over the whole set, from one forward pass.
    hessian = pof.classifier_hessian(network, ImageBatches(images, labels, normalise))
    top = pof.top_eigenvalues(hessian, 3)
    print(f"largest eigenvalues: {top.values.tolist()}, residuals {top.residuals.tolist()}")
    assert hessian.shape == (330, 330)
    assert top.all_converged
    assert float(top.residuals.max()) <= 1e-6
    v = top.vectors[:, 0]
    torch.testing.assert_close(hessian @ v, top.values[0] * v)

    # Post-train the feature extractor. The classifier stays as it is, to the bit.
    before = network.classifier.weight.detach().clone()
    gradient_rule = pof.PoFGradient(
        objective, pof.PoFSettings(), batches(seed=2), torch.Generator().manual_seed(0)
    )
    optimizer = torch.optim.SGD(network.feature_extractor.parameters(), lr=1e-3, momentum=0.9)
    network.train()
    for _ in range(10):
        gradient_rule(*stream.draw())
        optimizer.step()
    assert torch.equal(network.classifier.weight, before)
    assert len(gradient_rule.records) == 10
    _, error = evaluate(network, images, labels, normalise)
    print(f"training error after PoF: {error:.1f}%")
    assert error < 5.0


if __name__ == "__main__":
    main()
