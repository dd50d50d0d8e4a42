"""Several processes, one training: each takes its part of every batch, all take the same step.

Every process draws the whole batch from generators in the same state and keeps its part, so the
images and their order are the single process's; sums of gradients over the parts are the whole
batch's gradient, up to rounding. What is summed is summed here and not by
``DistributedDataParallel``: SAM's first pass must not be summed where replicas ascend on their own,
and PoF needs the whole batch's features in its line search. It is one flat message a pass.
"""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pof.objective import Linear, Objective, Outcome

Part = TypeVar("Part")


class Processes:
    """The processes that train one network together; alone, everything is the identity.

    Joined lazily: collectives need ``torch.distributed`` to be initialised by then.

    Args:
        rank: This process, from 0.
        size: How many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    def part(self, count: int) -> slice:
        """The part of ``count`` images that this process takes; contiguous, the first largest."""
        first, last = (-(-rank * count // self.size) for rank in (self.rank, self.rank + 1))
        return slice(first, last)

    def mine(self, parts: Sequence[Part]) -> Sequence[Part]:
        """Of parts that are worked on whole: every ``size``-th."""
        return parts[self.rank :: self.size]

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace every tensor by its sum over the processes: one message a data type."""
        if self.size == 1:
            return
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_type.setdefault(tensor.dtype, []).append(tensor)
        for group in by_type.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            dist.all_reduce(flat)
            for tensor, summed in zip(group, flat.split([t.numel() for t in group]), strict=True):
                tensor.copy_(summed.view_as(tensor))

    def gather(self, part: Tensor, count: int) -> Tensor:
        """All ``count`` rows, of which every process has its part."""
        if self.size == 1:
            return part
        whole = part.new_zeros(count, *part.shape[1:])
        whole[self.part(count)] = part
        dist.all_reduce(whole)
        return whole

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Take over the first process's values."""
        if self.size == 1:
            return
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


ALONE = Processes()


class SharedObjective(Objective):
    """An objective whose batches the processes share; every one gets the whole batch's numbers.

    BatchNorm normalises within each process's part, unless it is synchronised, and the running
    statistics that are kept are the first process's.

    Args:
        objective: What is minimised.
        processes: Who shares.
    """

    def __init__(self, objective: Objective, processes: Processes) -> None:
        super().__init__(
            objective.network,
            label_smoothing=objective.label_smoothing,
            precision=objective.precision,
        )
        self.processes = processes
        self._parameters = [p for p in self.network.parameters() if p.requires_grad]
        self._buffers = [b for b in self.network.buffers() if b.is_floating_point()]

    def gradient(
        self,
        images: Tensor,
        labels: Tensor,
        weight: float = 1.0,
        *,
        classifier: Linear | None = None,
    ) -> Outcome:
        """Set ``.grad``, which must be clear, to ``weight`` × the whole batch's gradient."""
        part = self.processes.part(len(labels))
        share = (part.stop - part.start) / len(labels)
        if not share:  # fewer images than processes: take part in the sum with nothing
            part = slice(0, 1)
        outcome = super().gradient(
            images[part], labels[part], weight * share, classifier=classifier
        )
        loss, error = outcome.loss * share, outcome.error * share
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        self.processes.add_up([*gradients, loss, error])
        return Outcome(loss, error)

    def whole_features(self, images: Tensor) -> Tensor:
        """Features of all images, each computed by one process."""
        if not self.network.feature_extractor.training:
            self.processes.follow(self._buffers)  # which BatchNorm now normalises with
        part = self.processes.part(len(images))
        few = part.start == part.stop
        features = self.features(images[0:1] if few else images[part])
        return self.processes.gather(features[:0] if few else features, len(images))
