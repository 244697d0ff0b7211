"""Colour jitter of a batch: torchvision's ColorJitter on float images, rounded once, at the end.

Every machine gives the same bytes, since only elementary operations, which all round alike, and means of integer sums
are used. Values are not selected by comparisons, which take a CPU as long as six additions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aimscale.harness.data.random_access import I64, random_uniform

_PROBABILITY = 0.8
_STRENGTH = np.array([0.4, 0.4, 0.2, 0.1])  # of brightness, contrast, saturation, hue
_ORDERS = np.array(list(itertools.permutations(range(4))))
_GREY = (0.2989, 0.587, 0.114)  # torchvision's
_TINY = 1e-6  # replaces a spread of 0, which grey pixels have


def jitter_colours(images: Tensor, key: int, positions: I64) -> Tensor:
    """Apply ColorJitter(0.4, 0.4, 0.2, 0.1) with probability 0.8 to uint8 (B, C, H, W), one draw per position, in
    place.

    As in torchvision the four changes come in random order, each by a factor uniform around one (the hue: a shift
    around zero).
    """
    chosen, order, strength = _draw(key, positions)
    for row in np.flatnonzero(chosen):  # one by one, so that the image stays in the core's cache over all passes
        images[row] = _jittered(images[row : row + 1], order[row], strength[row])[0]
    return images


def _draw(key: int, positions: I64) -> tuple[npt.NDArray[np.bool_], I64, npt.NDArray[np.float32]]:
    """Draw which images are changed, bool (B,); the order of changes, (B, 4); and their strengths, (B, 4) by the kind
    of change."""
    uniform = random_uniform(key, positions[:, None] * 8 + np.arange(6))
    order = _ORDERS[np.floor(uniform[:, 1] * len(_ORDERS)).astype(np.int64)]
    strength = np.array([1, 1, 1, 0]) + _STRENGTH * (2 * uniform[:, 2:] - 1)
    return uniform[:, 0] < _PROBABILITY, order, strength.astype(np.float32)


def _jittered(image: Tensor, order: I64, strength: npt.NDArray[np.float32]) -> Tensor:
    """Apply all changes to uint8 (1, C, H, W); a grey image has neither saturation nor hue."""
    values = image.to(torch.float32, memory_format=torch.contiguous_format)
    for number in order:
        if number < 2 or image.shape[1] > 1:
            _CHANGES[number](values, torch.from_numpy(strength[number, None, None, None, None]))
    return values.add_(0.5).int().to(torch.uint8)  # by way of integers: four times as fast on a CPU


def _brightness(values: Tensor, factor: Tensor) -> None:
    values.mul_(factor).clamp_(0, 255)


def _contrast(values: Tensor, factor: Tensor) -> None:
    grey = _grey(values).mul_(256).int()
    mean = grey.sum(dim=(1, 2, 3), keepdim=True).double().mul_(1 / (256 * grey[0].numel())).float()
    values.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, 255)


def _saturation(values: Tensor, factor: Tensor) -> None:
    grey = _grey(values).mul_(1 - factor)
    values.mul_(factor).add_(grey).clamp_(0, 255)


def _hue(values: Tensor, shift: Tensor) -> None:
    red, green, blue = values.unbind(1)
    least = torch.minimum(torch.minimum(red, green), blue)
    spread = torch.maximum(torch.maximum(red, green), blue).sub_(least)
    # The hue as an angle from red, in sixths of the circle: green is at 2, blue at -2, and cyan at 3.
    hue = (green + blue).sub_(red).sub_(least).div_(spread.clamp(min=_TINY)).add_(1)
    hue.copysign_(green - blue).add_(shift[:, 0] * 6)
    # A colour has full strength up to 1 from its own angle, and none from 2 on: 3 - angle, clamped to 1..2.
    torch.sub(3, hue.abs(), out=values[:, 0])
    torch.sub((hue - 2).abs_(), 3, out=values[:, 1]).abs_()  # wraps around for angles beyond the opposite
    torch.sub(hue.add_(2).abs_(), 3, out=values[:, 2]).abs_()
    values.clamp_(1, 2).mul_(spread[:, None]).add_(least.sub_(spread)[:, None])


_CHANGES: tuple[Callable[[Tensor, Tensor], None], ...] = (_brightness, _contrast, _saturation, _hue)


def _grey(values: Tensor) -> Tensor:
    """Compute the grey image, a new float32 (B, 1, H, W)."""
    if values.shape[1] == 1:
        return values.clone()
    red, green, blue = values.unbind(1)
    return red.mul(_GREY[0]).add_(green.mul(_GREY[1])).add_(blue.mul(_GREY[2]))[:, None]
