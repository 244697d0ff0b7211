"""Colour jitter of a batch: torchvision's ColorJitter, with the same bytes on every device.

torchvision's own blending rounds once or twice, as the compiler chose for a device, and its means add up in another
order on each. On other devices than CPUs, sums of products are therefore taken in float64, where they are exact, and
means are sums of integers; what remains are single operations, which all devices round alike.

On a CPU the hue took three quarters of the time. `_shift_hue` gives torchvision's bytes in a third of it: candidates of
each colour become bytes before one is chosen, by masks of bits. Brightness and contrast are tables of 256 bytes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as colour

from aimscale.aim.model import copy_to
from aimscale.harness.data.random_access import I64, random_uniform

_PROBABILITY = 0.8
_STRENGTH = np.array([0.4, 0.4, 0.2, 0.1])  # of brightness, contrast, saturation, hue
_ORDERS = np.array(list(itertools.permutations(range(4))))
_ALL_BYTES = torch.arange(256, dtype=torch.uint8)[None, None]
_TINY = np.float32(1e-3)  # less than any difference of two bytes over 255
_SIXTH, _ONE, _TWO, _FOUR, _SIX = (np.float32(number) for number in (1 / 6, 1, 2, 4, 6))
_GREY = (0.2989, 0.587, 0.114)  # torchvision's


def jitter_colours(images: Tensor, key: int, positions: I64) -> Tensor:
    """ColorJitter(0.4, 0.4, 0.2, 0.1) with probability 0.8 of uint8 (B, C, H, W), one draw per position, in place.

    As in torchvision the four changes come in random order, each by a factor uniform around one (the hue: a shift
    around zero).
    """
    if images.device.type != "cpu":
        return jitter_exactly(images, key, positions)
    adjust = (_scale_brightness, _scale_contrast, colour.adjust_saturation, _shift_hue)
    chosen, order, strength = _draw(key, positions)
    for row in np.flatnonzero(chosen):
        image = images[row].contiguous()  # colours in planes: strided ones take half as long again
        for change in order[row]:
            image = adjust[change](image, float(strength[row, change]))
        images[row] = image
    return images


def _scale_brightness(image: Tensor, factor: float) -> Tensor:
    """torchvision's adjust_brightness of uint8 (C, H, W), byte for byte."""
    return _looked_up(image, colour.adjust_brightness(_ALL_BYTES, factor))


def _scale_contrast(image: Tensor, factor: float) -> Tensor:
    """torchvision's adjust_contrast of uint8 (C, H, W), byte for byte."""
    if image.shape[0] == 1:
        grey = image.float()
    else:
        red, green, blue = image.unbind()
        grey = red.mul(_GREY[0]).add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2]).floor_()[None]
    mean = torch.mean(grey, dim=(-3, -2, -1), keepdim=True)
    blended = _ALL_BYTES.mul(factor).add_(mean, alpha=1.0 - factor).clamp_(0, 255)
    return _looked_up(image, blended.to(torch.uint8))


def _looked_up(image: Tensor, table: Tensor) -> Tensor:
    """Each byte of a contiguous image by its entry of uint8 (1, 1, 256)."""
    data = bytearray(image.numpy().tobytes().translate(table.numpy().tobytes()))
    return torch.frombuffer(data, dtype=torch.uint8).view(image.shape)


def _shift_hue(image: Tensor, shift: float) -> Tensor:
    """torchvision's adjust_hue of uint8 (C, H, W), byte for byte."""
    if image.shape[0] == 1:
        return image
    floats = colour.to_dtype(image, torch.float32, scale=True).numpy()
    red, green, blue = image.numpy()
    largest = np.maximum(np.maximum(red, green), blue)
    value = np.maximum(np.maximum(floats[0], floats[1]), floats[2])
    spread = value - np.minimum(np.minimum(floats[0], floats[1]), floats[2])
    # a grey pixel has spread 0, over which divisors do not matter as long as they are not 0
    saturation = spread / np.maximum(value, _TINY)
    from_red, from_green, from_blue = np.divide(np.subtract(value, floats, out=floats), np.maximum(spread, _TINY))
    is_red = _mask(red == largest)
    is_green = _mask(green == largest) & ~is_red
    hue = _masked(from_blue - from_green, is_red)
    hue += _masked(from_red + _TWO - from_blue, is_green)
    hue += _masked(from_green + _FOUR - from_red, ~(is_red | is_green))
    hue = hue * _SIXTH + _ONE
    hue -= np.floor(hue)
    hue += np.float32(shift)
    hue -= np.floor(hue)
    hue *= _SIX
    sextant = np.floor(hue)
    product = (hue - sextant) * saturation
    rest = _ONE - saturation
    levels = np.stack([rest, _ONE - product, product + rest])
    levels *= value
    low, falls, rises = colour.to_dtype(torch.from_numpy(levels), torch.uint8, scale=True).numpy()
    sextant = sextant.astype(np.uint8)
    first, second, third, fourth, fifth = (_byte_mask(sextant == number) for number in range(1, 6))
    zeroth = ~(first | second | third | fourth | fifth)  # a hue that was rounded up to 1 begins anew
    shifted = np.empty(image.shape, np.uint8)
    shifted[0] = largest & (zeroth | fifth) | falls & first | low & (second | third) | rises & fourth
    shifted[1] = rises & zeroth | largest & (first | second) | falls & third | low & (fourth | fifth)
    shifted[2] = low & (zeroth | first) | rises & second | largest & (third | fourth) | falls & fifth
    return torch.from_numpy(shifted)


def _mask(where: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """All bits of a float where it is true: choosing by bits is faster than by branches."""
    return -where.astype(np.int32)


def _byte_mask(where: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    return -where.view(np.uint8)


def _masked(values: npt.NDArray[np.float32], mask: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """The values where the mask is set, 0 elsewhere."""
    return (values.view(np.int32) & mask).view(np.float32)


def jitter_exactly(images: Tensor, key: int, positions: I64) -> Tensor:
    """`jitter_colours` of a batch at once, on any device."""
    chosen, order, strength = _draw(key, positions)
    for stage in range(4):
        for number, change in enumerate(_CHANGES):
            rows = np.flatnonzero(chosen & (order[:, stage] == number))
            if rows.size and (images.shape[1] == 3 or number < 2):  # a grey image has neither saturation nor hue
                where = copy_to(torch.from_numpy(rows), images.device)
                by = copy_to(torch.from_numpy(strength[rows, number, None, None, None]), images.device)
                images[where] = change(images[where], by)
    return images


def _draw(key: int, positions: I64) -> tuple[npt.NDArray[np.bool_], I64, npt.NDArray[np.float64]]:
    """Which images are changed, bool (B,); in which order, (B, 4); and by how much, (B, 4) by the kind of change."""
    uniform = random_uniform(key, positions[:, None] * 8 + np.arange(6))
    order = _ORDERS[np.floor(uniform[:, 1] * len(_ORDERS)).astype(np.int64)]
    strength = np.array([1, 1, 1, 0]) + _STRENGTH * (2 * uniform[:, 2:] - 1)
    return uniform[:, 0] < _PROBABILITY, order, strength


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return _bytes(images.float() * factor.float())


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    grey = _grey(images)
    total = grey.long().sum(dim=(1, 2, 3), keepdim=True)
    mean = total.float() / torch.full_like(total, grey[0].numel()).float()  # tensors: divided by, not multiplied
    return _blend(images, mean, factor)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _grey(images), factor)


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    values = images.float()
    values = values / torch.full_like(values, 255)  # a tensor: a card multiplies by the inverse of a number
    red, green, _ = values.unbind(1)
    value = values.amax(1)
    spread = value - values.amin(1)
    is_grey = spread == 0
    saturation = spread / value.masked_fill(is_grey, 1)
    distance = (value[:, None] - values) / spread.masked_fill(is_grey, 1)[:, None]
    from_red, from_green, from_blue = distance.unbind(1)
    by_green_or_blue = torch.where(value == green, from_red + 2 - from_blue, from_green + 4 - from_red)
    hue = torch.where(value == red, from_blue - from_green, by_green_or_blue)
    hue = hue.mul(1 / 6).add(1).fmod(1)
    hue = (hue + shift.float()[:, 0]).remainder(1)
    six = hue * 6
    sextant = six.floor()
    product, rest = saturation * (six - sextant), 1 - saturation
    levels = torch.stack([torch.ones_like(value), rest, 1 - product, product + rest], dim=1) * value[:, None]
    which = _level_by_sextant(images.device)[:, sextant.long().remainder(6)].movedim(0, 1)
    return (levels.clamp(0, 1).gather(1, which) * (256 - 1e-3)).to(torch.uint8)


@functools.cache
def _level_by_sextant(device: torch.device) -> Tensor:
    """Which of value, low, falling and rising each of red, green and blue is, int64 (3, 6)."""
    return torch.tensor([[0, 2, 1, 1, 3, 0], [3, 0, 0, 2, 1, 1], [1, 1, 3, 0, 0, 2]], device=device)


_CHANGES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (_brightness, _contrast, _saturation, _hue)


def _grey(images: Tensor) -> Tensor:
    """float32 (B, 1, H, W), whole numbers."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = (channel.float() * weight for channel, weight in zip(images.unbind(1), _GREY, strict=True))
    return torch.floor(red + green + blue)[:, None]


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    ours = (images.float() * factor.float()).double()
    return _bytes((ours + other.double() * (1 - factor).float()).float())


def _bytes(values: Tensor) -> Tensor:
    return values.clamp(0, 255).to(torch.uint8)
