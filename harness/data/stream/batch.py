"""What the stream hands out: images, prefix lengths and positions."""

from __future__ import annotations

import dataclasses

import torch

from aimscale.harness.data.stream.augment import normalise
from aimscale.harness.data.stream.crops import Crops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples at some positions of the stream; may be empty."""

    images: torch.Tensor | Crops
    """(B, C, H, W): uint8 as decoded, a quarter of the bytes to move between processes and to a device, or float32,
    normalised already; or crops that the device resizes. `images_on` takes each."""
    prefix_len: torch.Tensor
    """int64 (B,), 1..N-1."""
    positions: torch.Tensor
    """int64 (B,)."""
    bad_samples: tuple[str, ...] = ()
    """Shard and key of every undecodable sample that was replaced."""

    def __len__(self) -> int:
        return len(self.positions)

    def on(self, device: torch.device | str) -> Batch:
        """The batch with its images on a device, resized and jittered there, bytes still."""
        is_cut = isinstance(self.images, Crops)
        images = self.images.resized(device) if is_cut else self.images.to(device, non_blocking=True)  # type: ignore[union-attr]
        return dataclasses.replace(self, images=images.contiguous())

    def images_on(self, device: torch.device | str) -> torch.Tensor:
        """float32 (B, C, H, W), normalised; bytes are moved first, and resized and normalised on the device."""
        images = self.on(device).images
        assert isinstance(images, torch.Tensor)
        return normalise(images) if images.dtype == torch.uint8 else images

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory, for asynchronous copies to a CUDA device."""
        return dataclasses.replace(
            self._with_pixels(self._pixels().pin_memory()), prefix_len=self.prefix_len.pin_memory()
        )

    @property
    def num_bytes(self) -> int:
        """Of the pixels, as the loader hands them out."""
        return self._pixels().nbytes

    def clone(self) -> Batch:
        """A copy with memory of its own."""
        return self._with_pixels(self._pixels().clone())

    def split(self, sizes: list[int]) -> list[Batch]:
        """Views of so many samples each; of images that are a tensor, none replaced."""
        assert isinstance(self.images, torch.Tensor)
        assert not self.bad_samples
        parts = zip(self.images.split(sizes), self.prefix_len.split(sizes), self.positions.split(sizes), strict=True)
        return [Batch(images=images, prefix_len=lengths, positions=where) for images, lengths, where in parts]

    def _pixels(self) -> torch.Tensor:
        return self.images.pixels if isinstance(self.images, Crops) else self.images

    def _with_pixels(self, pixels: torch.Tensor) -> Batch:
        images = dataclasses.replace(self.images, pixels=pixels) if isinstance(self.images, Crops) else pixels
        return dataclasses.replace(self, images=images)
