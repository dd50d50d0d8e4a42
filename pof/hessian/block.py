"""The Hessian and the Gauss-Newton matrix of any block of a network's parameters, by autograd.

With logits z, targets y, p = softmax(z) and r = p − y, a product is

    Hv = ∇ Σ r·(Jv)                the whole second derivative,
    Gv = Jᵀ (diag(p) − ppᵀ) (Jv)   without the curvature of the network itself,

a sum over the samples (Pearlmutter, Neural Computation 6, 1994). Of the orders to differentiate
in, the fastest is reverse over forward: one forward pass carries the tangent Jv along, one
backward pass goes through both; measured on a WRN, it takes 0.7 of the time of double backward. But
PyTorch's tangents need not be differentiable themselves: those of LayerNorm and of BatchNorm in
training silently lose terms. So the first samples are computed by double backward too, in
float64; where the two differ, double backward is what is used.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from pof import batchnorm
from pof.errors import PofError
from pof.hessian.lanczos import gaussian
from pof.perturbation import target_distribution

Mode = Literal["eval", "train"]
Kind = Literal["hessian", "gauss_newton"]
Method = Literal["reverse-over-forward", "double-backward"]

_PROBED = 8  # samples that the two orders of differentiation are compared on
_AGREEMENT = 1e-7  # relative, in float64


class UnknownBlock(PofError):
    """The network has no parameters of this name."""


class BlockCurvature:
    """A curvature matrix of the mean cross-entropy with respect to a block of the parameters.

    Vectors hold the block's parameters one after the other, in the order of
    ``named_parameters()``. Memory is that of a training step on one batch, whatever the set.

    Args:
        network: Any module that maps images to logits. Its modes, buffers and gradients are left
            as they are; its parameters are read at each product.
        batches: Images and labels (n,); walked once a product, so the same at every walk: a list,
            `ImageBatches`, or a loader that does not shuffle. Batches of any size weigh by their
            samples.
        block: Path of a module (such as ``feature_extractor.layer3``) or of a parameter; the
            empty path is the whole network. Parameters that do not require a gradient are
            part of it.
        kind: ``hessian``, or ``gauss_newton``: positive semi-definite.
        label_smoothing: Share of the target spread evenly over the classes.
        weight_decay: λ, which adds λI; 0 leaves it out.
        mode: ``eval``, or ``train``: BatchNorm normalises each batch by its own statistics (and
            records nothing). Dropout is off in both, for the matrix must be one matrix.
        dtype: Computes in this precision; ``None``: in the network's own.

    Attributes:
        samples: N.
        names: The parameters of the block, in order.
        method: The order of differentiation that is used.

    Raises:
        UnknownBlock: The network has no such block.
        ValueError: There are no samples; at a product: the batches are not what they were.
    """

    def __init__(
        self,
        network: nn.Module,
        batches: Iterable[tuple[Tensor, Tensor]],
        *,
        block: str = "",
        kind: Kind = "hessian",
        label_smoothing: float = 0.0,
        weight_decay: float = 0.0,
        mode: Mode = "eval",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.network = network
        self.batches = batches
        self.block = block
        self.kind = kind
        self.label_smoothing = label_smoothing
        self.weight_decay = weight_decay
        self.mode = mode
        self.names = _names_within(network, block)
        parameters = dict(network.named_parameters())
        self._shapes = [parameters[name].shape for name in self.names]
        self.dtype = parameters[self.names[0]].dtype if dtype is None else dtype
        self.device = parameters[self.names[0]].device
        self.samples = 0
        first = None
        for images, labels in batches:
            self.samples += len(labels)
            first = (images[:_PROBED], labels[:_PROBED]) if first is None else first
        if first is None or self.samples == 0:
            raise ValueError("there are no samples to take a Hessian of")
        self.method: Method = self._fastest_sound_method(*first)

    @property
    def shape(self) -> tuple[int, int]:
        """(D, D), with D the number of the block's parameters."""
        size = sum(shape.numel() for shape in self._shapes)
        return size, size

    def __matmul__(self, vector: Tensor) -> Tensor:
        """The product with a vector (D,), or with k of them as columns (D, k), one by one."""
        if vector.ndim == 2:
            return torch.stack([self @ column for column in vector.T], dim=1)
        tangents = self._unflatten(vector.to(self.dtype))
        total = [torch.zeros_like(tangent) for tangent in tangents]
        seen = 0
        with self._prepared(self.dtype) as tensors:
            for batch in self.batches:
                pieces = self._batch_product(self.method, tensors, batch, tangents)
                torch._foreach_add_(total, pieces)
                seen += len(batch[1])
        if seen != self.samples:
            raise ValueError(
                f"the batches held {self.samples} samples at first and {seen} now:"
                " give batches that can be walked again, such as a list"
            )
        product = torch.cat([piece.reshape(-1) for piece in total]) / self.samples
        return product + self.weight_decay * vector

    def start(self, generator: torch.Generator) -> Tensor:
        """A random vector (D,) whose covariance is N times the Gauss-Newton matrix.

        It is the gradient of the loss for labels drawn from the network's own predictions, at
        less than half the cost of a product. Where a few eigenvalues stand out, as they do in
        trained networks, it has a large part in their directions, a normal vector a tiny one.

        Args:
            generator: On the host.
        """

        def gradient(logits: Tensor) -> Tensor:
            p = logits.detach().softmax(1)
            drawn = torch.multinomial(p.double().cpu(), 1, generator=generator).to(p.device)
            return p.scatter_add(1, drawn, -torch.ones_like(p[:, :1]))

        total = [torch.zeros(s, dtype=self.dtype, device=self.device) for s in self._shapes]
        with self._prepared(self.dtype) as tensors, torch.enable_grad():
            primals = [tensors[name].requires_grad_() for name in self.names]
            for images, _ in self.batches:
                logits = self._logits(tensors, images, primals)
                pieces = _gradients((logits * gradient(logits)).sum(), primals)
                torch._foreach_add_(total, pieces)
        return torch.cat([piece.reshape(-1) for piece in total])

    def _unflatten(self, vector: Tensor) -> list[Tensor]:
        pieces = vector.split([shape.numel() for shape in self._shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    def _fastest_sound_method(self, images: Tensor, labels: Tensor) -> Method:
        """Compare the two orders of differentiation along one random vector in float64."""
        vector = gaussian(self.shape[0], torch.Generator().manual_seed(0)).to(self.device)
        tangents = self._unflatten(vector)
        with self._prepared(torch.float64) as tensors:
            batch = (images, labels)
            sound = self._batch_product("double-backward", tensors, batch, tangents)
            try:
                fast = self._batch_product("reverse-over-forward", tensors, batch, tangents)
            except RuntimeError:  # a tangent that was computed in place
                return "double-backward"
        norm = torch.stack(torch._foreach_norm(sound)).norm()
        distance = torch.stack(torch._foreach_norm(torch._foreach_sub(fast, sound))).norm()
        agree = bool(distance <= _AGREEMENT * norm)
        return "reverse-over-forward" if agree else "double-backward"

    @contextmanager
    def _prepared(self, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
        """Within the context the network is in its mode; parameters and buffers as computed."""
        tensors = {
            name: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in (*self.network.named_parameters(), *self.network.named_buffers())
        }
        modes = [(module, module.training) for module in self.network.modules()]
        layers = batchnorm.layers(self.network)
        self.network.eval()
        train = self.mode == "train"
        for layer in layers:
            layer.training = train
        try:
            # The fused attention kernels have no second derivatives.
            with (
                batchnorm.frozen_statistics(layers) if train else nullcontext(),
                sdpa_kernel(SDPBackend.MATH),
            ):
                yield tensors
        finally:
            for module, training in modes:
                module.training = training

    def _logits(
        self, tensors: dict[str, Tensor], images: Tensor, block: Sequence[Tensor]
    ) -> Tensor:
        """The logits of a batch with the block's parameters replaced, in their precision."""
        images = images.to(block[0].dtype) if images.is_floating_point() else images
        own = dict(zip(self.names, block, strict=True))
        logits: Tensor = functional_call(self.network, {**tensors, **own}, (images,))
        return logits

    @torch.enable_grad()
    def _batch_product(
        self,
        method: Method,
        tensors: dict[str, Tensor],
        batch: tuple[Tensor, Tensor],
        tangents: list[Tensor],
    ) -> list[Tensor]:
        """The product with one batch's matrix, summed over its samples."""
        images, labels = batch
        primals = [tensors[name].requires_grad_() for name in self.names]

        def logits_of(block: Sequence[Tensor]) -> Tensor:
            return self._logits(tensors, images, block)

        def target_like(logits: Tensor) -> Tensor:
            return target_distribution(labels, logits.shape[1], self.label_smoothing).to(
                logits.dtype
            )

        product = _PRODUCTS[self.kind, method]
        return product(logits_of, target_like, primals, tangents)


_Logits = Callable[[Sequence[Tensor]], Tensor]
_Target = Callable[[Tensor], Tensor]


def _gradients(
    scalar: Tensor, primals: list[Tensor], *, create_graph: bool = False
) -> list[Tensor]:
    """The scalar's gradients; 0 where it does not depend on a parameter, or on none of them."""
    if not scalar.requires_grad:
        return [torch.zeros_like(primal) for primal in primals]
    return list(
        torch.autograd.grad(scalar, primals, create_graph=create_graph, materialize_grads=True)
    )


def _duals(primals: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
    return [forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)]


def _logits_and_change(logits_of: _Logits, duals: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits z and their change Jv. Logits that the block does not reach do not change."""
    logits, change = forward_ad.unpack_dual(logits_of(duals))
    return logits, torch.zeros_like(logits) if change is None else change


def _output_curvature(logits: Tensor, change: Tensor) -> Tensor:
    """(diag(p) − ppᵀ)·Jv for each sample, (n, C), as a constant."""
    p, change = logits.detach().softmax(1), change.detach()
    return p * (change - (p * change).sum(1, keepdim=True))


def _hessian_reverse_over_forward(
    logits_of: _Logits, target_like: _Target, primals: list[Tensor], tangents: list[Tensor]
) -> list[Tensor]:
    with forward_ad.dual_level():
        logits, change = _logits_and_change(logits_of, _duals(primals, tangents))
        slope = ((logits.softmax(1) - target_like(logits)) * change).sum()
    return _gradients(slope, primals)


def _hessian_double_backward(
    logits_of: _Logits, target_like: _Target, primals: list[Tensor], tangents: list[Tensor]
) -> list[Tensor]:
    logits = logits_of(primals)
    loss = (logits.logsumexp(1) - (target_like(logits) * logits).sum(1)).sum()
    gradients = _gradients(loss, primals, create_graph=True)
    slope = sum(
        ((g * t).sum() for g, t in zip(gradients, tangents, strict=True)), loss.new_zeros(())
    )
    return _gradients(slope, primals)


def _gauss_newton_in_one_pass(
    logits_of: _Logits, _: _Target, primals: list[Tensor], tangents: list[Tensor]
) -> list[Tensor]:
    with forward_ad.dual_level():
        logits, change = _logits_and_change(logits_of, _duals(primals, tangents))
    back = _output_curvature(logits, change)
    return _gradients((logits * back).sum(), primals)


def _gauss_newton_in_two_passes(
    logits_of: _Logits, _: _Target, primals: list[Tensor], tangents: list[Tensor]
) -> list[Tensor]:
    with torch.no_grad(), forward_ad.dual_level():
        back = _output_curvature(*_logits_and_change(logits_of, _duals(primals, tangents)))
    return _gradients((logits_of(primals) * back).sum(), primals)


_PRODUCTS: dict[tuple[Kind, Method], Callable[..., list[Tensor]]] = {
    ("hessian", "reverse-over-forward"): _hessian_reverse_over_forward,
    ("hessian", "double-backward"): _hessian_double_backward,
    ("gauss_newton", "reverse-over-forward"): _gauss_newton_in_one_pass,
    ("gauss_newton", "double-backward"): _gauss_newton_in_two_passes,
}


def block_hessian(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    block: str = "",
    label_smoothing: float = 0.0,
    weight_decay: float = 0.0,
    mode: Mode = "eval",
    dtype: torch.dtype | None = None,
) -> BlockCurvature:
    """The exact Hessian of a block, or of the whole network; see `BlockCurvature`."""
    return BlockCurvature(
        network,
        batches,
        block=block,
        kind="hessian",
        label_smoothing=label_smoothing,
        weight_decay=weight_decay,
        mode=mode,
        dtype=dtype,
    )


def block_gauss_newton(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    block: str = "",
    weight_decay: float = 0.0,
    mode: Mode = "eval",
    dtype: torch.dtype | None = None,
) -> BlockCurvature:
    """The Gauss-Newton matrix of a block, or of the whole network; see `BlockCurvature`.

    For the cross-entropy it is the Fisher matrix; like it, it does not depend on the labels.
    """
    return BlockCurvature(
        network,
        batches,
        block=block,
        kind="gauss_newton",
        weight_decay=weight_decay,
        mode=mode,
        dtype=dtype,
    )


def _names_within(network: nn.Module, block: str) -> list[str]:
    """The names of the parameters at or below a path.

    Raises:
        UnknownBlock: There are none.
    """
    names = [
        name
        for name, _ in network.named_parameters()
        if not block or name == block or name.startswith(f"{block}.")
    ]
    if not names:
        paths = {path for path, _ in network.named_modules() if path}
        close = difflib.get_close_matches(block, sorted(paths), n=3)
        top = ", ".join(close or [name for name, _ in network.named_children()])
        raise UnknownBlock(
            f"the network has no parameters under {block!r}: did you mean one of {top}?"
        )
    return names
