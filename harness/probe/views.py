"""The training views of the published probe recipe (AIMv2, Table A2), repeatable image by image.

Random resized crops of scale 0.08 to 1, horizontal flips and RandAugment `rand-m9-mstd0.5-inc1`, as timm builds them.
The recipe also lists colour jitter 0.3; timm leaves it out where RandAugment is on, and so does this.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from aimscale.harness.data.store.index import ShardDataset
from aimscale.harness.data.stream.augment import normalise
from aimscale.harness.run.config import ModelSection


class PublishedViews:
    """Views that depend on (seed, epoch, image) alone, not on the batch, the rank or the order of calls."""

    def __init__(self, model_section: ModelSection, seed: int):
        from timm.data import create_transform

        self._channels = model_section.channels
        self._seed = seed
        self._lock = threading.Lock()  # the generators that timm draws from are the process's, whatever the thread
        self._transform = create_transform(
            model_section.image_size,
            is_training=True,
            scale=(0.08, 1.0),
            hflip=0.5,
            color_jitter=0.3,
            auto_augment="rand-m9-mstd0.5-inc1",
            interpolation="bicubic",
            normalize=False,
        )
        _keep_a_bit(self._transform)

    def images(self, dataset: ShardDataset, rows: np.ndarray, epoch: int) -> Tensor:
        """Normalised float32 views (len(rows), C, H, W) of samples `rows` in an epoch.

        Raises:
            DataError: an image cannot be read.
        """
        views = []
        for row in rows:
            picture = to_pil_image(dataset.decode(int(row), self._channels)).convert("RGB")
            with self._lock, _seeded([self._seed, 2, epoch, int(row)]):
                views.append(self._transform(picture)[: self._channels])
        return normalise(torch.stack(views))


def _keep_a_bit(transform: Any) -> None:
    """Let RandAugment's posterise keep at least one bit: timm may ask for none, which Pillow 12 refuses."""
    for step in transform.transforms:
        for op in getattr(step, "ops", ()):
            if op.name.startswith("Posterize"):
                level_of = op.level_fn
                op.level_fn = lambda level, hparams, level_of=level_of: (max(1, level_of(level, hparams)[0]),)


@contextmanager
def _seeded(entropy: list[int]) -> Iterator[None]:
    """Seed the global generators that timm draws from, and put them back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    words = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002
    torch.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
