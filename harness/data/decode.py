"""Bytes of one image file to a uint8 tensor. EXIF orientation is not applied, as in other pre-training loaders."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

_MODES = {1: (ImageReadMode.GRAY, "L"), 3: (ImageReadMode.RGB, "RGB")}


class UndecodableImageError(Exception):
    """These bytes are no image that torchvision or Pillow can read in full."""


def decode(data: bytes, channels: int = 3) -> torch.Tensor:
    """Decode JPEG, PNG, WebP, GIF (first frame) with torchvision, and whatever else Pillow reads.

    Returns:
        uint8 (channels, height, width); grey images are repeated over three channels, alpha is dropped.

    Raises:
        UndecodableImageError: the bytes are empty, truncated or no image.
    """
    mode, pillow_mode = _MODES[channels]
    try:
        image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode)
        if image.dim() == 3 and image.dtype == torch.uint8:
            return image
    except (RuntimeError, ValueError):
        pass  # a format or variant that torchvision does not know (CMYK JPEG, BMP, TIFF): Pillow decides
    try:
        with Image.open(io.BytesIO(data)) as picture:
            pixels = np.array(picture.convert(pillow_mode))
    except (
        Exception
    ) as error:  # Pillow's decoders raise many types on broken bytes, SyntaxError and struct.error among them
        raise UndecodableImageError(f"{type(error).__name__}: {error}") from error
    return torch.from_numpy(pixels.reshape(pixels.shape[0], pixels.shape[1], channels)).permute(2, 0, 1)
