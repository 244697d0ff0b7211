"""Resizing and cropping without randomness."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_MAX_ASPECT_RATIO = 64  # of what is resized for a square crop


def crop_centre(image: torch.Tensor, size: int, shorter_side: int | None = None) -> torch.Tensor:
    """uint8 (C, H, W) to (C, size, size): shorter side to `shorter_side` (by default `size`), then the middle."""
    height, width = image.shape[-2:]
    longest = _MAX_ASPECT_RATIO * min(height, width)
    if max(height, width) > longest:  # enlarged as a whole, a strip of 1 x 65,500 px would take 10 GB
        image = image[:, max(0, height - longest) // 2 :, max(0, width - longest) // 2 :][:, :longest, :longest]
    image = resize_shorter_side(image, shorter_side or size)
    height, width = image.shape[-2:]
    top, left = (height - size) // 2, (width - size) // 2
    return image[:, top : top + size, left : left + size]


def resize_shorter_side(image: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 (C, H, W) with its shorter side brought to `size`, aspect ratio kept: bicubic, antialiased."""
    height, width = image.shape[-2:]
    if min(height, width) == size:
        return image
    scale = size / min(height, width)
    shape = (max(size, round(height * scale)), max(size, round(width * scale)))
    return F.interpolate(image[None], size=shape, mode="bicubic", antialias=True)[0]
