"""An endless stream of augmented training batches from images held on the device."""

from typing import Any

import torch
from torch import Tensor

from pof.data.augmentation import Augment, Normalise
from pof.settings import AugmentationSettings


def laid_out(images: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A copy of ``images`` (N, C, H, W) with the strides of a memory format, to the last one.

    With one channel ``contiguous`` takes either format for the other and keeps the strides, and by
    those strides the first convolution chooses the format that the whole network computes in.
    """
    empty = torch.empty(
        images.shape, dtype=images.dtype, device=images.device, memory_format=memory_format
    )
    return empty.copy_(images)


class Batches:
    """Draws batches in a fresh random order each epoch; the last of an epoch may be smaller.

    Order and augmentation have generators of their own, so that changing one leaves the other's
    draws as they were. ``state_dict`` is enough to continue in the middle of an epoch.

    Args:
        images: (N, H, W, C) uint8, on the training device.
        labels: (N,) int64, on the same device.
        batch_size: Images a batch.
        augmentation: What is done to each image.
        normalise: Pixels to network input.
        order_seed: Seeds the order (drawn on the host, copied once an epoch).
        augmentation_seed: Seeds the augmentation (drawn on the device).
        channels_last: Memory format of the batches.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        augmentation: AugmentationSettings,
        normalise: Normalise,
        order_seed: int,
        augmentation_seed: int,
        channels_last: bool = True,
    ) -> None:
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.normalise = normalise
        self.channels_last = channels_last
        self._order_generator = torch.Generator().manual_seed(order_seed)
        self._augment = Augment(
            augmentation, torch.Generator(images.device).manual_seed(augmentation_seed)
        )
        self._order = torch.empty(0, dtype=torch.int64)
        self._order_state = self._order_generator.get_state()
        self._position = 0

    @property
    def per_epoch(self) -> int:
        """Batches an epoch."""
        return -(-len(self.images) // self.batch_size)

    def draw(self) -> tuple[Tensor, Tensor]:
        """The next batch: images (n, C, H, W), normalised, and labels (n,)."""
        if self._position >= len(self._order):
            self._start_epoch()
        chosen = self._order[self._position : self._position + self.batch_size]
        self._position += self.batch_size
        pixels = self._augment.crop_and_flip(self.images.index_select(0, chosen))
        images = self._augment.cut_out(self.normalise(pixels)).permute(0, 3, 1, 2)
        if not self.channels_last:
            images = laid_out(images, torch.contiguous_format)
        return images, self.labels.index_select(0, chosen)

    def _start_epoch(self) -> None:
        self._order_state = self._order_generator.get_state()
        order = torch.randperm(len(self.images), generator=self._order_generator)
        self._order = order.to(self.images.device)
        self._position = 0

    def state_dict(self) -> dict[str, Any]:
        """Both generators and the place within the epoch."""
        return {
            "order": self._order_state,  # as it was before this epoch's order was drawn
            "started": len(self._order) > 0,
            "position": self._position,
            "augmentation": self._augment.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where ``state_dict`` was taken."""
        self._order_generator.set_state(state["order"].cpu())
        self._order = self._order[:0]
        if state["started"]:
            self._start_epoch()
        self._position = state["position"]
        self._augment.generator.set_state(state["augmentation"].cpu())
