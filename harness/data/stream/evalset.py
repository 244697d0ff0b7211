"""Validation and probe images: no randomness in the pixels, fixed prefixes per image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from aimscale.harness.data import DataError
from aimscale.harness.data.random_access import make_key, random_uniform
from aimscale.harness.data.store.decoding import UndecodableImageError, crop_centre
from aimscale.harness.data.store.index import ShardDataset, require_channels
from aimscale.harness.data.stream.augment import normalise

if TYPE_CHECKING:
    from aimscale.harness.run.config import ModelSection


def eval_images(
    dataset: ShardDataset, indices: Sequence[int] | npt.NDArray[np.int64], model: ModelSection, centre_crop: float
) -> torch.Tensor:
    """Shorter side to ceil(image_size / centre_crop) (bicubic, antialiased), centre crop, normalised.

    Returns:
        float32 (B, C, image_size, image_size).

    Raises:
        DataError: an image cannot be read or decoded; an evaluation never replaces one.
    """
    require_channels(model.channels)
    pixels = torch.empty(len(indices), model.channels, model.image_size, model.image_size, dtype=torch.uint8)
    for row, index in enumerate(np.asarray(indices, dtype=np.int64).tolist()):
        pixels[row] = _prepared(dataset, index, model, centre_crop)
    return normalise(pixels)


def _prepared(dataset: ShardDataset, index: int, model: ModelSection, centre_crop: float) -> torch.Tensor:
    try:
        image = dataset.decode(index, model.channels)
    except UndecodableImageError as error:
        raise DataError(f"{dataset.describe(index)} cannot be decoded ({error}); remove it and index again") from error
    return crop_centre(image, model.image_size, math.ceil(model.image_size / centre_crop))


def prefix_lengths(num_images: int, num_prefixes: int, num_tokens: int) -> torch.Tensor:
    """Fixed prefix lengths: int64 (num_images, num_prefixes), a function of the image's position alone.

    The range 1..N-1 is cut into `num_prefixes` equal strata, and every image draws one length from each; the same for
    every run, so that losses can be compared image by image.
    """
    row = np.arange(num_images)[:, None]
    column = np.arange(num_prefixes)[None, :]
    draw = random_uniform(make_key("validation prefix"), row * 4096 + column)
    lengths = 1 + np.floor((column + draw) / num_prefixes * (num_tokens - 1)).astype(np.int64)
    return torch.from_numpy(np.minimum(lengths, num_tokens - 1))


def usable_indices(dataset: ShardDataset, num_images: int | None = None) -> npt.NDArray[np.int64]:
    """Sample numbers of the decodable images, in index order, the first `num_images` of them.

    Raises:
        DataError: fewer are there than asked for.
    """
    if num_images is not None and dataset.num_usable < num_images:
        raise DataError(
            f"{dataset.path} has {dataset.num_usable} usable images, {num_images} were asked for; lower num_images"
        )
    return dataset.usable(np.arange(dataset.num_usable if num_images is None else num_images))
