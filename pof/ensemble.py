"""Several trainings in step: networks of one shape, side by side in the channels of one.

Seeds of a small network leave most of a large accelerator idle, and each pays for launching its
own kernels. Here every member trains as it would alone, in a thread of its own, with its own
method, batches and optimizer; only where it asks for a gradient it waits for the others, and one
network computes them all: convolutions with as many groups as members, BatchNorm over all their
channels. The members' weights are views into that network's, so that nothing is copied back and
forth. Results are those of the members alone up to rounding.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pof.errors import PofError
from pof.objective import Linear, Objective, Outcome

_PROBED = 4  # images a member that the common network is tried on
_AGREEMENT = 1e-9  # relative, in float64


class NotSideBySide(PofError):
    """Networks of this kind cannot be computed side by side."""


def side_by_side(modules: Sequence[nn.Module], example: Tensor | None) -> nn.Module:
    """One module that computes several of the same architecture, each in its own channels.

    From then on their parameters and BatchNorm statistics are views into those of the module.

    Args:
        modules: Of convolutions, BatchNorm and whatever treats every channel alike. Each keeps
            its values.
        example: A few images (n, C, H, W): what comes out for them is compared, in float64.
            ``None`` where modules of this architecture have passed that.

    Returns:
        Maps images of all of them (n, S·C, H, W), the first's channels first, to their outputs,
        in the same order along dimension 1.

    Raises:
        NotSideBySide: A layer works across channels in another way. The modules are as before.
    """
    count = len(modules)
    joined = copy.deepcopy(modules[0])
    parts = []  # a tensor of the joined module and those of the members
    for path, layer in joined.named_modules():
        own = dict(layer.named_parameters(recurse=False))
        if isinstance(layer, nn.Conv2d):
            layer.groups *= count
            layer.in_channels *= count
            layer.out_channels *= count
        elif isinstance(layer, _BatchNorm):
            layer.num_features *= count
            own |= {name: b for name, b in layer.named_buffers(recurse=False) if b.ndim}
        elif own or any(True for _ in layer.buffers(recurse=False)):
            raise NotSideBySide(f"{path} ({type(layer).__name__}) works across channels")
        for name, tensor in own.items():
            members = [getattr(module.get_submodule(path), name) for module in modules]
            whole = torch.cat([member.detach() for member in members])
            if isinstance(tensor, nn.Parameter):
                whole = nn.Parameter(whole, requires_grad=tensor.requires_grad)
            setattr(layer, name, whole)
            parts.append((whole, members))
    if example is not None:
        _compare(joined, modules, example)
    for whole, members in parts:
        for member, part in zip(members, whole.detach().chunk(count), strict=True):
            member.data = part
    return joined


@torch.no_grad()
def _compare(joined: nn.Module, modules: Sequence[nn.Module], example: Tensor) -> None:
    """Raise unless copies in float64 agree, on images that differ from member to member."""
    images = [example.double().roll(i, 0) * (1 + i) for i in range(len(modules))]
    try:
        together = copy.deepcopy(joined).double().train()(torch.cat(images, 1))
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise NotSideBySide(f"it cannot be computed: {reason}") from error
    alone = torch.cat(
        [copy.deepcopy(m).double().train()(x) for m, x in zip(modules, images, strict=True)], 1
    )
    difference = torch.linalg.vector_norm(together - alone)
    if not bool(difference <= _AGREEMENT * torch.linalg.vector_norm(alone)):
        raise NotSideBySide("a layer works across channels, or draws at random")


@dataclass
class _Request:
    """What a member waits for.

    Attributes:
        member: Which.
        kind: ``gradient`` or ``features``.
        images: Its batch.
        labels: For a gradient.
        weight: Of its loss.
        classifier: In place of its own.
        answer: Once there is one.
        error: What went wrong instead.
    """

    member: int
    kind: Literal["gradient", "features"]
    images: Tensor
    labels: Tensor | None = None
    weight: float = 1.0
    classifier: Linear | None = None
    answer: Any = None
    error: BaseException | None = None


class Ensemble:
    """Where the members of an ensemble meet.

    Every member has a thread of its own and must say when it leaves, also when it never came.
    Whenever all who are left wait, they are answered at once where they ask for the same, and one
    after the other where not (the smaller last batch of an epoch, say). Members whose networks
    cannot be computed side by side, or not in the memory there is, get `NotSideBySide` for an
    answer: they may go on alone from their last checkpoints.

    Args:
        size: How many members are expected.
        compile: Whether the common network is compiled.
    """

    def __init__(self, size: int, *, compile: bool = False) -> None:
        self._compile = compile
        self._present = set(range(size))
        self._objectives: dict[int, Objective] = {}
        self._norms: dict[int, list[_BatchNorm]] = {}
        self._waiting: dict[int, _Request] = {}
        self._turn = threading.Condition()
        self._joined: _Joined | None = None
        self._compared = False
        self._met: dict[int, set[int]] = {}

    def met(self, index: int) -> set[int]:
        """Members that were ever computed side by side with this one, itself among them."""
        return self._met.get(index, set())

    def member(self, index: int, objective: Objective) -> "MemberObjective":
        """The objective of a member, computed together with the others'."""
        with self._turn:
            self._objectives[index] = objective
            self._norms[index] = _norms(objective.network.feature_extractor)
        return MemberObjective(objective, lambda **asked: self._ask(_Request(index, **asked)))

    def leave(self, index: int) -> None:
        """Go on without this member."""
        with self._turn:
            self._present.discard(index)
            self._serve()

    def _ask(self, request: _Request) -> Any:
        with self._turn:
            self._waiting[request.member] = request
            self._serve()
            while request.member in self._waiting:
                self._turn.wait()
        if request.error is not None:
            raise request.error
        return request.answer

    def _serve(self) -> None:
        """Answer those who wait, if nobody is missing; the others sleep meanwhile."""
        if not self._waiting or len(self._waiting) < len(self._present):
            return
        requests = [self._waiting[member] for member in sorted(self._waiting)]
        try:
            joined = self._side_by_side(requests)
            if joined is not None:
                joined.answer(requests)
        except torch.OutOfMemoryError as error:
            refusal = NotSideBySide(f"together they need too much memory: {error}")
            for request in requests:
                request.error = refusal
        except BaseException as error:
            for request in requests:
                request.error = error
        else:
            for request in requests if joined is None else ():
                try:
                    _answer_alone(request, self._objectives[request.member])
                except BaseException as error:
                    request.error = error
        self._waiting.clear()
        self._turn.notify_all()

    def _side_by_side(self, requests: list[_Request]) -> "_Joined | None":
        """What computes these requests at once; ``None`` if nothing can."""
        members = tuple(request.member for request in requests)
        objectives = [self._objectives[member] for member in members]
        asked = {
            (request.kind, request.images.shape, _modes(self._norms[request.member]))
            for request in requests
        }
        if len(members) == 1 or len(asked) > 1:
            return None
        if self._joined is None or self._joined.members != members:
            example = None if self._compared else requests[0].images[:_PROBED]
            self._joined = None  # its memory goes before the next one's comes
            self._joined = _Joined(members, objectives, example, compile=self._compile)
            self._compared = True
            for member in members:
                self._met.setdefault(member, set()).update(members)
        return self._joined


class _Joined:
    """Members that are computed by one network."""

    def __init__(
        self,
        members: tuple[int, ...],
        objectives: Sequence[Objective],
        example: Tensor | None,
        *,
        compile: bool,
    ) -> None:
        self.members = members
        self.objectives = objectives
        extractors = [objective.network.feature_extractor for objective in objectives]
        self.extractor = side_by_side(extractors, example)
        self.layers = _norms(self.extractor)
        self.own_layers = [_norms(extractor) for extractor in extractors]
        self.parameters = [
            (whole, [extractor.get_parameter(name) for extractor in extractors])
            for name, whole in self.extractor.named_parameters()
        ]
        if compile:
            self.extractor.compile(dynamic=False)

    def answer(self, requests: list[_Request]) -> None:
        """Answer all requests, which are of one kind and shape."""
        if requests[0].kind == "features":
            with torch.no_grad():
                features = self._features(requests)
            for request, part in zip(requests, features, strict=True):
                request.answer = part
        else:
            with torch.enable_grad():
                self._gradients(requests)

    def _features(self, requests: list[_Request]) -> tuple[Tensor, ...]:
        """The members' features (N, d), one after the other."""
        self._take_over_modes()
        # Pixel by pixel, the members' channels lie next to each other.
        pixels = torch.cat([request.images.permute(0, 2, 3, 1) for request in requests], 3)
        images = pixels.permute(0, 3, 1, 2)
        if requests[0].images.stride(1) != 1:  # not channels-last
            images = images.contiguous()
        features = self.objectives[0].through(self.extractor, images)
        self._count_batches()
        return features.chunk(len(requests), 1)

    def _take_over_modes(self) -> None:
        """Modes and recording of BatchNorm as the members have them at this moment."""
        training = self.objectives[0].network.feature_extractor.training
        if self.extractor.training != training:
            self.extractor.train(training)
        for layer, own in zip(self.layers, self.own_layers[0], strict=True):
            layer.training = own.training
            layer.track_running_stats = own.track_running_stats

    def _count_batches(self) -> None:
        counters = [
            own.num_batches_tracked
            for layers in self.own_layers
            for own in layers
            if own.training and own.track_running_stats and own.num_batches_tracked is not None
        ]
        if counters:
            torch._foreach_add_(counters, 1)

    def _gradients(self, requests: list[_Request]) -> None:
        for whole, _ in self.parameters:
            whole.grad = None
        losses = []
        for request, objective, features in zip(
            requests, self.objectives, self._features(requests), strict=True
        ):
            own = objective.network.classifier
            classifier = request.classifier or Linear(own.weight, own.bias)
            assert request.labels is not None
            outcome = objective.at(features, request.labels, *classifier)
            losses.append(outcome.loss * request.weight)
            request.answer = Outcome(outcome.loss.detach(), outcome.error)
        torch.stack(losses).sum().backward()
        for whole, members in self.parameters:
            if whole.grad is None:
                continue
            for member, part in zip(members, whole.grad.chunk(len(members)), strict=True):
                member.grad = part if member.grad is None else member.grad.add_(part)


class MemberObjective(Objective):
    """An objective whose gradients and features are computed together with others'.

    Args:
        objective: The member's own.
        ask: Waits for an answer from the ensemble.
    """

    def __init__(self, objective: Objective, ask: Callable[..., Any]) -> None:
        super().__init__(
            objective.network,
            label_smoothing=objective.label_smoothing,
            precision=objective.precision,
        )
        self._ask = ask

    def gradient(
        self,
        images: Tensor,
        labels: Tensor,
        weight: float = 1.0,
        *,
        classifier: Linear | None = None,
    ) -> Outcome:
        """As the member alone would."""
        outcome: Outcome = self._ask(
            kind="gradient", images=images, labels=labels, weight=weight, classifier=classifier
        )
        return outcome

    def whole_features(self, images: Tensor) -> Tensor:
        """As the member alone would; without a graph."""
        features: Tensor = self._ask(kind="features", images=images)
        return features


def _answer_alone(request: _Request, objective: Objective) -> None:
    if request.kind == "features":
        with torch.no_grad():
            request.answer = objective.whole_features(request.images)
        return
    assert request.labels is not None
    with torch.enable_grad():
        request.answer = objective.gradient(
            request.images, request.labels, request.weight, classifier=request.classifier
        )


def _norms(module: nn.Module) -> list[_BatchNorm]:
    """Every BatchNorm layer, whatever it records at this moment."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]


def _modes(layers: Sequence[_BatchNorm]) -> tuple[tuple[bool, bool], ...]:
    """How BatchNorm normalises and whether it records: SAM's second pass may not."""
    return tuple((layer.training, layer.track_running_stats) for layer in layers)
