"""What the stream hands out: images, prefix lengths and positions."""

from __future__ import annotations

import dataclasses

import torch

from aimscale.harness.data.stream.augment import normalise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples at some positions of the stream; may be empty."""

    images: torch.Tensor
    """(B, C, H, W): uint8, a quarter of the bytes to move to a device, or float32, normalised already."""
    prefix_len: torch.Tensor
    """int64 (B,), 1..N-1."""
    positions: torch.Tensor
    """int64 (B,)."""
    bad_samples: tuple[str, ...] = ()
    """Shard and key of every undecodable sample that was replaced."""

    def __len__(self) -> int:
        return len(self.positions)

    def on(self, device: torch.device | str) -> Batch:
        """The batch with its images on a device, bytes still."""
        return dataclasses.replace(self, images=self.images.to(device, non_blocking=True).contiguous())

    def images_on(self, device: torch.device | str) -> torch.Tensor:
        """float32 (B, C, H, W), normalised; bytes are moved first, and normalised on the device."""
        images = self.on(device).images
        return normalise(images) if images.dtype == torch.uint8 else images
