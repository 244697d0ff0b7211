"""Images: decoded to uint8 tensors, cropped and resized at the centre or at random, jittered and normalised.

EXIF orientation is not applied, as elsewhere. simplejpeg decodes 40 % more images per second than Pillow, with the same
pixels. torchvision is faster than Pillow for PNGs, but version 0.29.2 ends the process on a damaged one.

Random choices are functions of (key, position) alone, and boxes of a whole batch are drawn at once. Small images (both
sides at most 64 px) are cropped and resized at once as well, in fixed point: weights are multiples of 2^-14, so all
sums are exact in fp32 and a position's pixels do not depend on the batch it is computed in. Larger images go one by one
through torch's antialiased uint8 kernel.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from aimscale.harness.data.random_access import I64, random_bits, random_uniform

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "ppm", "pgm", "tif", "tiff")
MAX_IMAGE_PIXELS = 89_478_485
"""Pixels above which an image is refused before it is decoded; Pillow's limit, too."""
MAX_IMAGE_SIDE = 65_535
"""Longest side, pixels: JPEG's own bound."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
"""Pillow's names of the accepted formats; Pillow knows others, and starts a program for one of them."""
_JPEG_START = b"\xff\xd8"
_MAX_ASPECT_RATIO = 64  # of images that are resized for a square crop
CROP_RATIO = (3 / 4, 4 / 3)
"""Aspect ratios of random resized crops, of training and of probes."""
IMAGE_MEAN = (0.485, 0.456, 0.406)
"""ImageNet's channel means, for pixels in 0..1."""
IMAGE_STD = (0.229, 0.224, 0.225)
"""ImageNet's channel standard deviations."""
SMALL_SIDE = 64
"""Longest side of images that take the fixed-point batch path, pixels."""
_NUM_TRIES = 10  # of torchvision's RandomResizedCrop before it falls back to a centre crop
_DRAWS = 2 * _NUM_TRIES + 3
_resize: Callable[..., torch.Tensor] = torch._C._nn._upsample_bicubic2d_aa  # F.interpolate calls it, without `out`
_VALUES_AT_A_TIME = 2**17  # of pixels: 42 images of 32 px in colour
_WEIGHT_SCALE = 2.0**14  # 255 * 1.5 * 2^14 < 2^24: exact in fp32
BOX = np.dtype([("top", "<i8"), ("left", "<i8"), ("height", "<i8"), ("width", "<i8"), ("flip", "?")])
"""Crop box of an image, pixels, and whether the crop is flipped."""
Boxes = npt.NDArray[Any]
"""Array (B,) of BOX."""
Box = tuple[int, int, int, int, bool]
"""Item of such an array: top, left, height, width, flip."""


class UndecodableImageError(Exception):
    """Bytes that cannot be read in full as an image, or an image that is too large."""


def decode(data: bytes, channels: int = 3) -> torch.Tensor:
    """Decode JPEG with simplejpeg, other formats with Pillow; of an animation the first frame.

    Returns:
        uint8 (channels, height, width); grey images are repeated over three channels, and transparent pixels
        lie on white.

    Raises:
        UndecodableImageError: the bytes are empty, truncated, no image, grey of more than 8 bits, or the header says
            more than MAX_IMAGE_PIXELS or MAX_IMAGE_SIDE.
    """
    return torch.from_numpy(decode_interleaved(data, channels)).permute(2, 0, 1)


def decode_interleaved(data: bytes, channels: int = 3) -> npt.NDArray[np.uint8]:
    """Decode to contiguous (height, width, channels), the layout in which a JPEG is decoded; see `decode`."""
    pixels = _decode_jpeg(data, channels) if data[:2] == _JPEG_START else None
    if pixels is not None:
        return pixels
    try:
        pixels = np.array(_on_white(_opened(data)).convert("L" if channels == 1 else "RGB"))
    except UndecodableImageError:
        raise
    except UnidentifiedImageError as error:  # Pillow's message names an object in memory
        raise UndecodableImageError("its format is not recognised") from error
    except Exception as error:  # Pillow raises many types on broken bytes, SyntaxError and struct.error among them
        raise UndecodableImageError(f"{type(error).__name__}: {error}") from error
    return pixels.reshape(pixels.shape[0], pixels.shape[1], channels)


def _decode_jpeg(data: bytes, channels: int) -> npt.NDArray[np.uint8] | None:
    """Decode a JPEG; None if simplejpeg does not know its variant (CMYK); a truncated one is an error."""
    try:
        _refuse_large(*simplejpeg.decode_jpeg_header(data)[:2])
        pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB")
    except ValueError as error:
        if "premature end" in str(error).lower():
            raise UndecodableImageError(str(error)) from error
        return None
    return pixels


def _opened(data: bytes) -> Image.Image:
    """Open a picture, reading its header alone, and refuse one that is too large."""
    picture = Image.open(io.BytesIO(data), formats=_FORMATS)
    _refuse_large(*picture.size)
    if picture.mode.startswith(("I", "F")):  # Pillow would clip their values to white
        raise ValueError(f"its pixels ({picture.mode}) have more than 8 bits; convert it")
    return picture


def _on_white(picture: Image.Image) -> Image.Image:
    """Lay transparent pixels on white."""
    if not picture.has_transparency_data:
        return picture
    white = Image.new("RGB", picture.size, "white")
    coloured = picture.convert("RGBA")
    white.paste(coloured, mask=coloured)
    return white


def is_transparent(data: bytes) -> bool:
    """Return whether `decode` lays some pixels of an image on white."""
    if data[:2] == _JPEG_START:
        return False
    picture = _opened(data)
    return picture.has_transparency_data and picture.convert("RGBA").getchannel("A").getextrema()[0] != 255


def _refuse_large(width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS or max(width, height) > MAX_IMAGE_SIDE:
        raise UndecodableImageError(
            f"{width} x {height} pixels; the limit is {MAX_IMAGE_PIXELS:,} pixels, {MAX_IMAGE_SIDE:,} on a side"
        )


def crop_centre(images: torch.Tensor, size: int, shorter_side: int | None = None) -> torch.Tensor:
    """Resize uint8 (B, C, H, W) to `shorter_side` (default `size`) and cut out the centre (B, C, size, size)."""
    height, width = images.shape[-2:]
    longest = _MAX_ASPECT_RATIO * min(height, width)
    if max(height, width) > longest:  # enlarged as a whole, a strip of 1 x 65,500 px would take 10 GB
        top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
        images = images[..., top : top + longest, left : left + longest]
    images = resize_shorter_side(images, shorter_side or size)
    height, width = images.shape[-2:]
    top, left = (height - size) // 2, (width - size) // 2
    return images[..., top : top + size, left : left + size]


def resize_shorter_side(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize uint8 (B, C, H, W) to a shorter side of `size`, keeping the aspect ratio: bicubic, antialiased."""
    height, width = images.shape[-2:]
    if min(height, width) == size:
        return images
    scale = size / min(height, width)
    shape = (max(size, round(height * scale)), max(size, round(width * scale)))
    return F.interpolate(images, size=shape, mode="bicubic", antialias=True)


@contextlib.contextmanager
def kernel_threads(count: int) -> Iterator[None]:
    """Set the number of torch's threads for the block; more than one spin at full load for small images."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def draw_boxes(
    key: int,
    positions: I64,
    image_height: npt.NDArray[np.int32],
    image_width: npt.NDArray[np.int32],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float] = CROP_RATIO,
    horizontal_flip: bool,
) -> Boxes:
    """Draw RandomResizedCrop's boxes of the images at B positions: area share uniform in `scale`, aspect ratio
    log-uniform in `ratio`; as in torchvision, the largest centre crop with an allowed ratio if no try fits."""
    draws = random_uniform(key, positions[:, None] * 32 + np.arange(_DRAWS))
    height, width = image_height.astype(np.float64), image_width.astype(np.float64)
    area = (scale[0] + (scale[1] - scale[0]) * draws[:, :_NUM_TRIES]) * (height * width)[:, None]
    log_ratio = np.log(ratio[0]) + np.log(ratio[1] / ratio[0]) * draws[:, _NUM_TRIES : 2 * _NUM_TRIES]
    widths = np.rint(np.sqrt(area * np.exp(log_ratio)))
    heights = np.rint(np.sqrt(area * np.exp(-log_ratio)))
    fits = (widths >= 1) & (widths <= width[:, None]) & (heights >= 1) & (heights <= height[:, None])
    rows, first = np.arange(len(draws)), fits.argmax(axis=1)
    crop_width, crop_height = widths[rows, first], heights[rows, first]
    top = np.floor(draws[:, -3] * (height - crop_height + 1))
    left = np.floor(draws[:, -2] * (width - crop_width + 1))
    none_fits = ~fits.any(axis=1)
    if none_fits.any():
        centre_width = np.where(width / height > ratio[1], np.rint(height * ratio[1]), width)
        centre_height = np.where(width / height < ratio[0], np.rint(width / ratio[0]), height)
        crop_width = np.where(none_fits, np.maximum(1, centre_width), crop_width)
        crop_height = np.where(none_fits, np.maximum(1, centre_height), crop_height)
        top = np.where(none_fits, (height - crop_height) // 2, top)
        left = np.where(none_fits, (width - crop_width) // 2, left)
    boxes = np.empty(len(draws), BOX)
    boxes["top"], boxes["left"], boxes["height"], boxes["width"] = top, left, crop_height, crop_width
    boxes["flip"] = (draws[:, -1] < 0.5) & horizontal_flip
    return boxes


def crop_resize(image: torch.Tensor, box: Box, size: int) -> torch.Tensor:
    """Crop uint8 (C, H, W) to (top, left, height, width), resize to (C, size, size) and flip: bicubic, antialiased."""
    into = image.new_empty(1, size, size, len(image)).permute(0, 3, 1, 2)
    crop_resize_into(into, image.permute(1, 2, 0).contiguous().numpy(), box)
    return into[0]


def crop_resize_into(into: torch.Tensor, pixels: npt.NDArray[np.uint8], box: Box) -> None:
    """Crop and resize uint8 (H, W, C) into (1, C, size, size), a slice of a batch; see `crop_resize`."""
    top, left, height, width, flip = box
    # torch's fast kernel needs contiguous interleaved colours: copying the crop saves a quarter of the time
    crop = torch.from_numpy(np.ascontiguousarray(pixels[None, top : top + height, left : left + width]))
    crop = crop.permute(0, 3, 1, 2)
    size = into.shape[-1]
    if (height, width) == (size, size):
        into.copy_(crop)
    else:
        _resize(crop, (size, size), False, None, out=into)
    if flip:
        into.copy_(into.flip(-1))


def crop_resize_small(images: torch.Tensor, boxes: Boxes, size: int) -> torch.Tensor:
    """Crop and resize uint8 (B, C, H, W), sides at most SMALL_SIDE; within 2 of 255 of `crop_resize`."""
    resized = images.new_empty(*images.shape[:2], size, size)
    # small enough for the processor's cache and for reuse by the allocator: half of the time
    step = max(1, _VALUES_AT_A_TIME // max(1, images[:1].numel()))
    for first in range(0, len(images), step):
        some = slice(first, first + step)
        resized[some] = _crop_resize(images[some], boxes[some], size)
    return resized


def _crop_resize(images: torch.Tensor, boxes: Boxes, size: int) -> torch.Tensor:
    num_rows, num_columns = images.shape[-2:]
    vertical = _resize_weights(num_rows, size)[boxes["top"] * num_rows + boxes["height"] - 1]
    horizontal = _resize_weights(num_columns, size)[boxes["left"] * num_columns + boxes["width"] - 1]
    flip = torch.from_numpy(boxes["flip"].copy())
    horizontal = torch.where(flip[:, None, None], horizontal.flip(-2), horizontal)
    pixels = torch.bmm(images.float().flatten(1, 2), horizontal.mT).unflatten(1, images.shape[1:3])
    pixels = torch.matmul(vertical[:, None], pixels.round_().clamp_(0, 255))
    return pixels.round_().clamp_(0, 255).byte()


def jitter_colours(images: torch.Tensor, key: int, positions: I64) -> None:
    """Apply torchvision's ColorJitter(0.4, 0.4, 0.2, 0.1) with probability 0.8 to uint8 (B, C, H, W), in place, each
    image with a generator seeded by its position."""
    from torchvision.transforms import v2  # slow to import

    jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
    before = torch.get_rng_state()  # torchvision draws from torch's own generator
    for row, seed in enumerate(random_bits(key, positions).tolist()):
        torch.default_generator.manual_seed(seed)
        images[row] = jitter(images[row])
    torch.set_rng_state(before)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Normalise uint8 (..., C, H, W) to float32 by ImageNet's statistics; one channel by their averages."""
    mean, std = _moments(images.device, images.shape[-3])
    return images.float().sub_(mean).div_(std)


@functools.cache
def _moments(device: torch.device, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of bytes, (C, 1, 1) each: computed on the CPU, so that every device has the
    same, and copied once."""
    mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
    if channels == 1:
        mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
    return (255 * mean[:, None, None]).to(device), (255 * std[:, None, None]).to(device)


@functools.lru_cache(maxsize=16)
def _resize_weights(side: int, size: int) -> torch.Tensor:
    """Compute the weights of every crop of a side, (side * side, size, side), by start * side + length - 1: Pillow's
    bicubic antialiased ones (Keys's with a = -0.5, stretched by the scale when shrinking)."""
    table = torch.zeros(side * side, size, side)
    for length in range(1, side + 1):
        scale = length / size
        stretch = max(scale, 1.0)
        centre = (torch.arange(size, dtype=torch.float64)[:, None] + 0.5) * scale
        distance = ((torch.arange(length, dtype=torch.float64) + 0.5 - centre) / stretch).abs()
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
        weights = torch.round(weights / weights.sum(-1, keepdim=True) * _WEIGHT_SCALE) / _WEIGHT_SCALE
        for start in range(side - length + 1):
            table[start * side + length - 1, :, start : start + length] = weights.float()
    return table
