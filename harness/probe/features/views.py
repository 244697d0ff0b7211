"""Training views of probes by the published recipe (AIMv2, Table A2), repeatable image by image.

Random resized crops of scale 0.08 to 1, horizontal flips and RandAugment `rand-m9-mstd0.5-inc1`, by timm's operations.
timm draws from global generators; here every view has a generator of its own, so that threads can make views
concurrently. The recipe also lists colour jitter 0.3; timm leaves it out if RandAugment is on, and so does this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aimscale.harness.data.images import IMAGE_MEAN, crop_resize, draw_boxes, normalise
from aimscale.harness.data.random_access import make_key
from aimscale.harness.data.store.index import ShardDataset
from aimscale.harness.run.config import ModelSection

CROP_SCALE = (0.08, 1.0)
"""Area range of the crops."""
NUM_CHANGES = 2
"""Number of operations drawn for an image."""
CHANGE_PROBABILITY = 0.5
"""Probability with which each operation is applied."""
MAGNITUDE, MAGNITUDE_STD, MAGNITUDE_MAX = 9.0, 0.5, 10.0
"""Strength of m9, mstd0.5: normal around 9, clipped to 0..10."""

Sign = float
"""Direction of a change that has two: +1 or -1."""


def _either_way(most: float) -> Callable[[float, Sign], tuple[float, ...]]:
    return lambda strength, sign: (sign * most * strength,)


def _enhance(strength: float, sign: Sign) -> tuple[float, ...]:
    return (max(0.1, 1 + sign * 0.9 * strength),)


ARGUMENTS: dict[str, Callable[[float, Sign], tuple[float, ...]]] = {
    "AutoContrast": lambda strength, sign: (),
    "Equalize": lambda strength, sign: (),
    "Invert": lambda strength, sign: (),
    "Rotate": _either_way(30.0),
    "PosterizeIncreasing": lambda strength, sign: (max(1, 4 - int(strength * 4)),),  # Pillow keeps one bit at least
    "SolarizeIncreasing": lambda strength, sign: (256 - min(256, int(strength * 256)),),
    "SolarizeAdd": lambda strength, sign: (min(128, int(strength * 110)),),
    "ColorIncreasing": _enhance,
    "ContrastIncreasing": _enhance,
    "BrightnessIncreasing": _enhance,
    "SharpnessIncreasing": _enhance,
    "ShearX": _either_way(0.3),
    "ShearY": _either_way(0.3),
    "TranslateXRel": _either_way(0.45),
    "TranslateYRel": _either_way(0.45),
}
"""timm's name of an operation -> its arguments at a strength in 0..1 (the `inc1` set, in timm's order)."""


class PublishedViews:
    """Training views that depend on (seed, epoch, image) alone, not on the batch, rank, thread or order of calls."""

    def __init__(self, model_section: ModelSection, seed: int):
        self._size, self._channels = model_section.image_size, model_section.channels
        self._seed = seed

    def images(self, dataset: ShardDataset, rows: np.ndarray, epoch: int) -> Tensor:
        """Return normalised float32 views (len(rows), C, H, W) of samples `rows` in an epoch."""
        # Imported here: torchvision compiles at import, and a plan opens tasks without reading images.
        from torchvision.transforms.functional import pil_to_tensor, to_pil_image

        key = make_key("probe view", self._seed, epoch)
        views = []
        for row in rows:
            image = dataset.decode(int(row), self._channels)
            sides = (np.array([side], dtype=np.int32) for side in image.shape[-2:])
            (box,) = draw_boxes(key, np.array([row]), *sides, scale=CROP_SCALE, horizontal_flip=True).tolist()
            crop = crop_resize(image, box, self._size)
            changed = _changed(to_pil_image(crop).convert("RGB"), np.random.default_rng([self._seed, 2, epoch, row]))
            views.append(pil_to_tensor(changed)[: self._channels])
        return normalise(torch.stack(views))


def _changed(picture: Any, draw: np.random.Generator) -> Any:
    """Apply RandAugment to a picture."""
    from PIL import Image
    from timm.data.auto_augment import NAME_TO_OP  # slow to import

    fill = tuple(round(255 * mean) for mean in IMAGE_MEAN)
    for name in draw.choice(list(ARGUMENTS), NUM_CHANGES):
        if draw.random() >= CHANGE_PROBABILITY:
            continue
        strength = np.clip(draw.normal(MAGNITUDE, MAGNITUDE_STD), 0, MAGNITUDE_MAX) / MAGNITUDE_MAX
        arguments = ARGUMENTS[str(name)](float(strength), -1.0 if draw.random() < 0.5 else 1.0)
        operation: Any = NAME_TO_OP[str(name)]
        picture = operation(picture, *arguments, fillcolor=fill, resample=Image.Resampling.BICUBIC)
    return picture
