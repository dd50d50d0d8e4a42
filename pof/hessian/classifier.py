"""The Hessian of the loss with respect to the classifier, in closed form.

For the mean cross-entropy of logits Z = F̃Θᵀ with F̃ = [f, 1] (N×d̃) and P = softmax(Z),

    H·V = Sᵀ F̃ / N,   S = P∘U − P·rowsum(P∘U),   U = F̃Vᵀ,

so a product costs 4·N·C·d̃ operations and no pass through the network. H is positive
semi-definite, does not depend on the labels (nor on their smoothing), and has d̃ zero eigenvalues:
adding one vector to all rows of Θ changes no probability. Weight decay λ adds λI.

A trained network is sure of its samples, and then P∘U and P·rowsum(P∘U) cancel. Here the top class
t of each sample is the origin instead: with r = p but r_t = 0, and u measured from u_t,

    m = Σ r·u,   s = r∘(u − m),   s_t = −(1 − Σr)·m,

in which nothing cancels, however small r is. r is what is stored.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pof.hessian.features import CHUNK, FeatureCache, cache_features
from pof.network import Network


class ClassifierHessian:
    """The Hessian of the mean cross-entropy with respect to the classifier's weight and bias.

    Vectors have the C·d entries of the weight, row by row, and then the C of the bias: the order
    of ``classifier.parameters()``. Memory beside the cache: N·C probabilities in the features'
    precision. All in all, 600,000 samples of 640 features in float32 and 100 classes take 1.8 GB,
    and 2.4 GB while eigenvalues are searched for.

    Args:
        cache: Features of the samples.
        weight: Θ, (C, d).
        bias: (C,), or ``None`` for a classifier without one.
        weight_decay: λ; 0 leaves weight decay out.
        dtype: Of the arithmetic and the vectors, whatever the features are stored in.

    Attributes:
        samples: N.
        weight_decay: λ.
        mode: The mode that the features were computed in: evaluation.
    """

    mode = "eval"

    def __init__(
        self,
        cache: FeatureCache,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.cache = cache
        self.samples = len(cache)
        self.classes, self.features = weight.shape
        self.has_bias = bias is not None
        self.weight_decay = weight_decay
        self.dtype = dtype
        self.device = weight.device
        weight = weight.detach().to(dtype)
        bias = None if bias is None else bias.detach().to(dtype)
        self._rest = [_off_top(chunk, weight, bias) for chunk in cache.features]

    @property
    def shape(self) -> tuple[int, int]:
        """(D, D), with D = C·d̃: d̃ is d, and one more with a bias."""
        size = self.classes * (self.features + self.has_bias)
        return size, size

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Features, off-top probabilities and top classes of each chunk."""
        for features, (rest, top) in zip(self.cache.features, self._rest, strict=True):
            yield features.to(self.dtype), rest.to(self.dtype), top.to(torch.int64)

    def __matmul__(self, vector: Tensor) -> Tensor:
        """H·v for a vector (D,), or for k of them as columns (D, k)."""
        if vector.ndim == 2 and vector.shape[1] == 0:
            return vector.clone()
        columns = vector.reshape(self.shape[0], -1).T.to(self.dtype)  # (k, D)
        k, C, d = len(columns), self.classes, self.features
        weight = columns[:, : C * d].reshape(k * C, d)
        bias = columns[:, C * d :].reshape(-1)  # (k·C), or empty
        weight_product = torch.zeros_like(weight)
        bias_product = torch.zeros_like(bias)
        for features, rest, top in self._chunks():
            logits = features @ weight.T
            if self.has_bias:
                logits += bias
            scores = _curvature(logits.view(-1, k, C), rest[:, None], top[:, None, None])
            flat = scores.view(-1, k * C)
            weight_product += flat.T @ features
            if self.has_bias:
                bias_product += flat.sum(0)
        product = torch.cat([weight_product.view(k, -1), bias_product.view(k, -1)], dim=1)
        product /= self.samples
        product += self.weight_decay * columns
        return product.T.reshape(vector.shape)

    def trace(self) -> float:
        """Sum of the eigenvalues: mean[(1 − ‖p‖²)·‖f̃‖²] + λD, exactly."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for features, rest, _ in self._chunks():
            norm = features.square().sum(1) + self.has_bias
            total += (_variances(rest) * norm).sum().double()
        return float(total) / self.samples + self.weight_decay * self.shape[0]

    def dense(self) -> Tensor:
        """The matrix itself, (D, D), from C(C + 1)/2 weighted Gram matrices of the features."""
        C, d = self.classes, self.features + self.has_bias
        blocks = torch.zeros(C, d, C, d, dtype=self.dtype, device=self.device)
        for features, rest, top in self._chunks():
            ones = features.new_ones(len(features), int(self.has_bias))
            extended = torch.cat([features, ones], dim=1)
            identity = torch.eye(C, dtype=self.dtype, device=self.device)
            for c in range(C):
                # Row c of diag(p) − ppᵀ, for every sample.
                unit = identity[c].expand(len(rest), C)
                row = _curvature(unit, rest, top[:, None])[:, c:]
                weighted = (row[:, :, None] * extended[:, None, :]).flatten(1)
                blocks[c, :, c:] += (extended.T @ weighted).view(d, C - c, d)
        for c in range(C):
            blocks[c + 1 :, :, c] = blocks[c, :, c + 1 :].permute(1, 2, 0).mT
        return self._parameter_order(blocks / self.samples)

    def _parameter_order(self, blocks: Tensor) -> Tensor:
        """From blocks (C, d̃, C, d̃) to the order of the parameters, with λ on the diagonal."""
        C, d = self.classes, self.features
        index = torch.arange(C * (d + self.has_bias), device=self.device).view(C, -1)
        order = torch.cat([index[:, :d].reshape(-1), index[:, d:].reshape(-1)])
        matrix = blocks.reshape(len(order), len(order))[order][:, order]
        matrix.diagonal().add_(self.weight_decay)
        return matrix


@torch.no_grad()
def classifier_hessian(
    network: Network,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    weight_decay: float = 0.0,
    dtype: torch.dtype = torch.float64,
    chunk: int = CHUNK,
) -> ClassifierHessian:
    """The classifier's Hessian over a whole set, from one forward pass in evaluation mode.

    Args:
        network: The split network; left as it is.
        batches: Images (n, C, H, W) as the network takes them, and labels (n,), for instance
            `ImageBatches`. Batches of any size weigh by their samples.
        weight_decay: λ, which adds λI; 0 leaves it out.
        dtype: Of the arithmetic; the features are stored as the network computes them.
        chunk: Samples handled at a time.

    Raises:
        ValueError: There are no samples.
    """
    cache = cache_features(network, batches, chunk=chunk)
    classifier = network.classifier
    bias: Tensor | None = classifier.bias
    return ClassifierHessian(cache, classifier.weight, bias, weight_decay=weight_decay, dtype=dtype)


def _off_top(features: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities with the top class's set to 0, in the features' precision; the top class."""
    logits = torch.nn.functional.linear(features.to(weight.dtype), weight, bias)
    highest, top = logits.max(dim=1, keepdim=True)
    odds = (logits - highest).exp()
    rest = odds / odds.sum(1, keepdim=True)
    return rest.scatter_(1, top, 0.0).to(features.dtype), top.squeeze(1).to(torch.int32)


def _curvature(logits: Tensor, rest: Tensor, top: Tensor) -> Tensor:
    """(diag(p) − ppᵀ)·u for each sample, from the top class so that nothing cancels.

    Args:
        logits: u, (..., C).
        rest: p with the top class's set to 0, of a shape that broadcasts with u.
        top: The top class, (..., 1), broadcasting in front.
    """
    top = top.expand(*logits.shape[:-1], 1)
    relative = logits - logits.gather(-1, top)
    mean = (rest * relative).sum(-1, keepdim=True)
    certainty = 1.0 - rest.sum(-1, keepdim=True)
    return (rest * (relative - mean)).scatter_(-1, top, -certainty * mean)


def _variances(rest: Tensor) -> Tensor:
    """1 − ‖p‖² = Σ p(1 − p) for each sample, (N,)."""
    doubt = rest.sum(1)
    return (rest * (1.0 - rest)).sum(1) + (1.0 - doubt) * doubt
