"""Crops of different sizes in one flat buffer, and their resizing in the batch on the training device.

Loader processes then only decode and cut out; resizing, flip and jitter follow on the device. It is a choice of where,
not of what: the device computes with the integer weights of torch's CPU kernel, in sums that are exact, so that both
places give the same bytes, and a run may change place when it is resumed.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aimscale.aim.model import copy_to
from aimscale.harness.data.random_access import I64
from aimscale.harness.data.stream.augment import crop_resize
from aimscale.harness.data.stream.jitter import jitter_colours

MAX_CROP_PIXELS = 1 << 18
"""Larger crops (more than 512 x 512) are resized by the loader: moving them would cost more than it saves."""
_GROUP = 32  # crops resized at once: bounds the memory on the device to 0.3 GB
_MAX_PRECISION = 22  # as in torch
_PART = 256  # weights are split into two digits of this base: exact in every float format, TF32 and bf16 included


class CropLayout(NamedTuple):
    """Which crops a flat buffer holds, in order; arrays (B,)."""

    height: npt.NDArray[np.int32]
    """Rows, pixels."""
    width: npt.NDArray[np.int32]
    """Columns, pixels."""
    flip: npt.NDArray[np.bool_]
    """Whether the resized crop is flipped left to right."""


class Jitter(NamedTuple):
    """Colour jitter that is still to be applied."""

    key: int
    positions: I64
    """(B,): the counters of the draws."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crops:
    """B images, cut out and not yet resized."""

    pixels: Tensor
    """uint8 (number of bytes,): each crop's rows, top to bottom, colours interleaved."""
    layout: CropLayout
    size: int
    """Side of the resized image, pixels."""
    channels: int
    """Colours, 1 or 3."""
    jitter: Jitter | None = None
    """Colour jitter, applied after resizing."""

    def resized(self, device: torch.device | str) -> Tensor:
        """uint8 (B, C, size, size) on the device."""
        pixels = self.pixels.to(device, non_blocking=True)
        crops = self._split(pixels)
        if not crops:
            images = pixels.new_empty(0, self.channels, self.size, self.size)
        elif pixels.device.type == "cpu":  # the kernel whose result `resize_exactly` reproduces, and faster here
            images = torch.stack(
                [self._resize_one(crop, flip) for crop, flip in zip(crops, self.layout.flip, strict=True)]
            )
        else:
            images = resize_exactly(crops, self.layout.flip, self.size)
        return images if self.jitter is None else jitter_colours(images, *self.jitter)

    def _split(self, pixels: Tensor) -> list[Tensor]:
        """uint8 (H, W, C) of every crop."""
        shapes = list(zip(self.layout.height.tolist(), self.layout.width.tolist(), strict=True))
        parts = pixels.split([height * width * self.channels for height, width in shapes])
        return [part.view(*shape, self.channels) for part, shape in zip(parts, shapes, strict=True)]

    def _resize_one(self, crop: Tensor, flip: np.bool_) -> Tensor:
        return crop_resize(crop.permute(2, 0, 1), (0, 0, crop.shape[0], crop.shape[1], bool(flip)), self.size)


def pack(crops: list[tuple[Tensor, bool]], into: Tensor) -> tuple[Tensor, CropLayout]:
    """Write uint8 (C, H, W) crops one after the other to the front of `into`; returns that part and what is in it."""
    offset = 0
    for crop, _ in crops:
        stop = offset + crop.numel()
        into[offset:stop].view(*crop.shape[1:], crop.shape[0]).copy_(crop.permute(1, 2, 0))
        offset = stop
    shapes = np.array([crop.shape[1:] for crop, _ in crops], dtype=np.int32).reshape(-1, 2)
    flips = np.array([flip for _, flip in crops], dtype=bool)
    return into[:offset], CropLayout(shapes[:, 0], shapes[:, 1], flips)


def resize_exactly(crops: list[Tensor], flip: npt.NDArray[np.bool_], size: int) -> Tensor:
    """What torch's antialiased bicubic uint8 kernel for CPUs gives, byte for byte, on any device: as matrix products.

    Args:
        crops: uint8 (H, W, C) each.
        flip: (B,) flip the result left to right.

    Returns:
        uint8 (B, C, size, size).
    """
    assert crops, "resize_exactly: no crops"
    device, channels = crops[0].device, crops[0].shape[-1]
    images = torch.empty(len(crops), channels, size, size, dtype=torch.uint8, device=device)
    flips = copy_to(torch.from_numpy(flip), device)
    for first in range(0, len(crops), _GROUP):
        group = crops[first : first + _GROUP]
        heights, widths = ([crop.shape[axis] for crop in group] for axis in (0, 1))
        canvas = torch.zeros(len(group), channels, max(heights), max(widths), device=device)
        for row, crop in enumerate(group):
            canvas[row, :, : crop.shape[0], : crop.shape[1]] = crop.permute(2, 0, 1)
        rows = _resize_last(canvas.flatten(1, 2), widths, size).unflatten(1, (channels, -1))
        result = _resize_last(rows.transpose(-1, -2).flatten(1, 2), heights, size)
        result = result.unflatten(1, (channels, size)).transpose(-1, -2)
        flipped = flips[first : first + _GROUP, None, None, None]
        images[first : first + _GROUP] = torch.where(flipped, result.flip(-1), result)
    return images


def _resize_last(values: Tensor, lengths: list[int], size: int) -> Tensor:
    """Resize the last axis of (B, M, L), integers 0..255 in float32, of which the first `lengths` count, to `size`."""
    length = copy_to(torch.tensor(lengths, dtype=torch.float64), values.device)
    num_taps = 2 * math.ceil(2 * max(1.0, max(lengths) / size)) + 1
    weights, precision = _integer_weights(length, size, values.shape[-1], num_taps)
    low = torch.remainder(weights, _PART)
    digits = torch.cat([(weights - low) / _PART, low], dim=1).float()
    high_sum, low_sum = torch.bmm(values, digits.mT).int().split(size, dim=-1)  # integers below 2^24: exact
    shift = precision[:, None, None]
    total = high_sum * _PART + low_sum + torch.bitwise_left_shift(torch.ones_like(shift), shift - 1)
    return torch.bitwise_right_shift(total, shift).clamp_(0, 255).float()


def _integer_weights(length: Tensor, size: int, num_columns: int, num_taps: int) -> tuple[Tensor, Tensor]:
    """Weights of the antialiased bicubic filter from `length` (B,) to `size` pixels, as integers; `num_taps` hold all.

    Returns:
        float64 (B, size, num_columns), multiples of one, and the precision p, int32 (B,): a weight is its integer over
        2^p, and p is the largest with which every weight of the image fits into 16 bits (torch, UpSampleKernel.cpp).
    """
    scale = (length / size)[:, None, None]
    stretch = scale.clamp(min=1.0)
    centre = (torch.arange(size, dtype=torch.float64, device=length.device)[:, None] + 0.5) * scale
    first = torch.floor(centre - 2 * stretch + 0.5).clamp(min=0)
    column = first + torch.arange(num_taps, dtype=torch.float64, device=length.device)
    distance = ((column - centre + 0.5) * (1.0 / stretch)).abs()
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weights = torch.where(column < length[:, None, None], weights, 0.0)
    total = torch.zeros_like(centre)
    for tap in range(num_taps):  # in a fixed order: the same digits everywhere
        total = total + weights[..., tap : tap + 1]
    weights = weights / total
    precision = _precision(weights.amax(dim=(1, 2)))
    scaled = weights * 2 ** precision.long()[:, None, None]  # of integers: exp2 may be off by a digit on a card
    scaled = torch.trunc(scaled + torch.where(scaled < 0, -0.5, 0.5))
    dense = torch.zeros(len(length), size, num_columns + num_taps, dtype=torch.float64, device=length.device)
    dense.scatter_(2, column.long(), scaled)
    return dense[..., :num_columns], precision


def _precision(largest: Tensor) -> Tensor:
    """torch's choice: the first p for which the largest weight times 2^(p + 1) needs more than 15 bits."""
    candidates = torch.arange(1, _MAX_PRECISION + 1, device=largest.device)
    fits = torch.floor(0.5 + largest[:, None] * 2**candidates) < 1 << 15
    return fits.sum(dim=1, dtype=torch.int32)
