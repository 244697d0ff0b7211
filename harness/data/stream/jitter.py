"""Colour jitter of a batch: torchvision's ColorJitter, with the same bytes on every device.

torchvision's own blending rounds once or twice, as the compiler chose for a device, and its means add up in another
order on each. On other devices than CPUs, sums of products are therefore taken in float64, where they are exact, and
means are sums of integers; what remains are single operations, which all devices round alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as colour

from aimscale.harness.data.random_access import I64, random_uniform

_PROBABILITY = 0.8
_STRENGTH = np.array([0.4, 0.4, 0.2, 0.1])  # of brightness, contrast, saturation, hue
_ORDERS = np.array(list(itertools.permutations(range(4))))
_GREY = (0.2989, 0.587, 0.114)  # torchvision's


def jitter_colours(images: Tensor, key: int, positions: I64) -> Tensor:
    """ColorJitter(0.4, 0.4, 0.2, 0.1) with probability 0.8 of uint8 (B, C, H, W), one draw per position, in place.

    As in torchvision the four changes come in random order, each by a factor uniform around one (the hue: a shift
    around zero).
    """
    if images.device.type != "cpu":
        return jitter_exactly(images, key, positions)
    adjust = (colour.adjust_brightness, colour.adjust_contrast, colour.adjust_saturation, colour.adjust_hue)
    chosen, order, strength = _draw(key, positions)
    for row in np.flatnonzero(chosen):
        for change in order[row]:
            images[row] = adjust[change](images[row], float(strength[row, change]))
    return images


def jitter_exactly(images: Tensor, key: int, positions: I64) -> Tensor:
    """`jitter_colours` of a batch at once, on any device."""
    chosen, order, strength = _draw(key, positions)
    for stage in range(4):
        for number, change in enumerate(_CHANGES):
            rows = np.flatnonzero(chosen & (order[:, stage] == number))
            if rows.size and (images.shape[1] == 3 or number < 2):  # a grey image has neither saturation nor hue
                where = torch.from_numpy(rows).to(images.device)
                by = torch.from_numpy(strength[rows, number, None, None, None])
                images[where] = change(images[where], by if number == 3 else by.to(images.device))
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
    turned = [colour.adjust_hue(image, by) for image, by in zip(images, shift.flatten().tolist(), strict=True)]
    return torch.stack(turned)


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
