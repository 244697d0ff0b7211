"""Bytes of one image file to a uint8 tensor. EXIF orientation is not applied, as in other pre-training loaders.

`aimscale bench data` measures the JPEG decoders side by side; simplejpeg was the fastest by 3-4 % over torchvision and
OpenCV (all three wrap libjpeg-turbo and give the same pixels) and decodes 40 % more images per second than Pillow.
"""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

_MODES = {1: (ImageReadMode.GRAY, "L", "GRAY"), 3: (ImageReadMode.RGB, "RGB", "RGB")}
_JPEG_START = b"\xff\xd8"


class UndecodableImageError(Exception):
    """These bytes are no image that torchvision or Pillow can read in full."""


def decode(data: bytes, channels: int = 3) -> torch.Tensor:
    """Decode JPEG with simplejpeg, PNG, WebP and GIF (first frame) with torchvision, and whatever else Pillow reads.

    Returns:
        uint8 (channels, height, width); grey images are repeated over three channels, alpha is dropped.

    Raises:
        UndecodableImageError: the bytes are empty, truncated or no image.
    """
    mode, pillow_mode, jpeg_mode = _MODES[channels]
    try:
        if data[:2] == _JPEG_START:
            return torch.from_numpy(simplejpeg.decode_jpeg(data, jpeg_mode)).permute(2, 0, 1)
        image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode)
        if image.dim() == 3 and image.dtype == torch.uint8:
            return image
    except (RuntimeError, ValueError):
        pass  # a format or variant that neither knows (CMYK JPEG, BMP, TIFF): Pillow decides
    try:
        with Image.open(io.BytesIO(data)) as picture:
            pixels = np.array(picture.convert(pillow_mode))
    except (
        Exception
    ) as error:  # Pillow's decoders raise many types on broken bytes, SyntaxError and struct.error among them
        raise UndecodableImageError(f"{type(error).__name__}: {error}") from error
    return torch.from_numpy(pixels.reshape(pixels.shape[0], pixels.shape[1], channels)).permute(2, 0, 1)
