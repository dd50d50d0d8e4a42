"""The objective that every method descends: mean cross-entropy of a split network."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pof.network import Network

Precision = Literal["fp32", "bf16"]


class Outcome(NamedTuple):
    """What a pass over one batch gave, on the device: nothing here waits for the host.

    Attributes:
        loss: Mean loss over the batch, a scalar.
        error: Share of the images not classified as their label, a float64 scalar.
    """

    loss: Tensor
    error: Tensor


class Linear(NamedTuple):
    """A linear layer's parameters: ``weight`` (C, d), ``bias`` (C,)."""

    weight: Tensor
    bias: Tensor


class Objective:
    """Mean cross-entropy over a batch, with the forward in the chosen precision.

    Args:
        network: The split network.
        label_smoothing: Share of the target spread evenly over the classes.
        precision: ``fp32``, or ``bf16``: autocast with weights kept as they are. Networks in
            float64 are computed in float64 under ``fp32``.
    """

    def __init__(
        self, network: Network, *, label_smoothing: float = 0.0, precision: Precision = "fp32"
    ) -> None:
        self.network = network
        self.label_smoothing = label_smoothing
        self.precision = precision

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def features(self, images: Tensor) -> Tensor:
        """Features f of ``images`` (N, C, H, W), shape (N, d), through the feature extractor."""
        return self.through(self.network.feature_extractor, images)

    def through(self, extractor: nn.Module, images: Tensor) -> Tensor:
        """What a feature extractor makes of ``images``, in the chosen precision."""
        with self._autocast(images.device):
            features: Tensor = extractor(images)
        return features

    def at(self, features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Outcome:
        """Loss and error of the linear classifier (``weight``, ``bias``) on ``features``."""
        with self._autocast(features.device):
            logits = F.linear(features, weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return Outcome(loss, (logits.argmax(1) != labels).double().mean())

    def __call__(self, images: Tensor, labels: Tensor) -> Outcome:
        """Loss and error of the network as it stands."""
        classifier = self.network.classifier
        return self.at(self.features(images), labels, classifier.weight, classifier.bias)

    def whole_features(self, images: Tensor) -> Tensor:
        """Features of a batch that the processes of a shared training may have parts of."""
        return self.features(images)

    def gradient(
        self,
        images: Tensor,
        labels: Tensor,
        weight: float = 1.0,
        *,
        classifier: Linear | None = None,
    ) -> Outcome:
        """Add ``weight`` × the gradient on this batch to ``.grad``; the outcome is detached.

        With a ``classifier``, at that one in place of the network's own.
        """
        if classifier is None:
            outcome = self(images, labels)
        else:
            outcome = self.at(self.features(images), labels, *classifier)
        (outcome.loss * weight).backward()
        return Outcome(outcome.loss.detach(), outcome.error)
