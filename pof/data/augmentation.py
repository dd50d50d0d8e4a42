"""From stored pixels to a training batch: gather, augment and normalise as batched operations.

Everything happens on the device that holds the images; the random numbers come from a generator
of that device. Images are stored (N, H, W, C), so that a cropped and flipped batch is a single
gather, and its result, seen as (N, C, H, W), is already in channels-last memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pof.settings import AugmentationSettings


class Normalise:
    """Pixels in 0..255 to (x/255 − mean)/std in floating point.

    Args:
        mean: Per channel, of pixels scaled to [0, 1].
        std: Likewise.
        device: Where the images are.
        dtype: Floating type of the result.
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        centre = torch.tensor(mean, dtype=torch.float64) * 255.0
        spread = torch.tensor(std, dtype=torch.float64) * 255.0
        self._scale = (1.0 / spread).to(device, dtype)
        self._shift = (-centre / spread).to(device, dtype)
        self.dtype = dtype

    def __call__(self, pixels: Tensor) -> Tensor:
        """(N, H, W, C) uint8 to (N, H, W, C) floating point."""
        # Along whole lines: a loop over the few channels of each pixel takes four times as long.
        width = pixels.shape[2]
        lines = pixels.to(self.dtype).flatten(2)
        shift, scale = self._shift.repeat(width), self._scale.repeat(width)
        return torch.addcmul(shift, lines, scale).view(pixels.shape)


class Augment:
    """Random crop, flip and cutout of a batch, one draw an image.

    Args:
        settings: What is done.
        generator: On the images' device.
    """

    def __init__(self, settings: AugmentationSettings, generator: torch.Generator) -> None:
        self.settings = settings
        self.generator = generator

    def crop_and_flip(self, pixels: Tensor) -> Tensor:
        """Zero-pad, crop back to size at a random place, flip half of the images.

        Args:
            pixels: (N, H, W, C), any type.
        """
        if self.settings.kind == "none":
            return pixels
        n, height, width, channels = pixels.shape
        padding = self.settings.padding
        rows = self._integers(2 * padding + 1, n)[:, None] + self._arange(height)
        columns = self._arange(width).expand(n, width)
        if self.settings.flip:
            flipped = self._integers(2, n)[:, None].bool()
            columns = torch.where(flipped, width - 1 - columns, columns)
        columns = columns + self._integers(2 * padding + 1, n)[:, None]
        padded = F.pad(pixels, (0, 0, padding, padding, padding, padding))
        line = (width + 2 * padding) * channels
        image = self._arange(n)[:, None] * (height + 2 * padding)
        starts = (image + rows) * line
        within = (columns[:, :, None] * channels + self._arange(channels)).flatten(1)
        # Values are gathered one by one: of pixels, PyTorch copies each in a call of its own.
        narrow = torch.int32 if padded.numel() < 2**31 else torch.int64
        index = starts.to(narrow)[:, :, None] + within.to(narrow)[:, None, :]
        return padded.view(-1).index_select(0, index.view(-1)).view_as(pixels)

    def cut_out(self, images: Tensor) -> Tensor:
        """Set one square an image to zero, in place; its centre is uniform over the image.

        Args:
            images: Normalised, (N, H, W, C): zero is the mean colour.
        """
        if self.settings.kind != "cutout":
            return images
        n, height, width, _ = images.shape
        half = self.settings.cutout_size // 2
        size = self.settings.cutout_size
        top = self._integers(height, n)[:, None] - half
        left = self._integers(width, n)[:, None] - half
        rows, columns = self._arange(height), self._arange(width)
        hidden_rows = (rows >= top) & (rows < top + size)
        hidden_columns = (columns >= left) & (columns < left + size)
        hidden = hidden_rows[:, :, None] & hidden_columns[:, None, :]
        return images.masked_fill_(hidden[..., None], 0.0)

    def _integers(self, high: int, n: int) -> Tensor:
        return torch.randint(high, (n,), generator=self.generator, device=self.generator.device)

    def _arange(self, n: int) -> Tensor:
        return torch.arange(n, device=self.generator.device)
