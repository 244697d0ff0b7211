"""Preprocessing of held-out images for validation and probes: without randomness, and with fixed prefixes per image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from aimscale.harness.data import DataError
from aimscale.harness.data.random_access import make_key, random_uniform
from aimscale.harness.data.store.decoding import crop_centre
from aimscale.harness.data.store.index import ShardDataset, require_channels
from aimscale.harness.data.stream.augment import normalise
from aimscale.harness.data.stream.stream import masks

if TYPE_CHECKING:
    from aimscale.aim.config import ModelConfig
    from aimscale.harness.data.store.dataset_info import DatasetInfo
    from aimscale.harness.run.config import ModelSection


def eval_images(
    dataset: ShardDataset, indices: Sequence[int] | npt.NDArray[np.int64], model: ModelSection, centre_crop: float
) -> torch.Tensor:
    """Preprocess images for evaluation: shorter side to ceil(image_size / centre_crop) (bicubic, antialiased), centre
    crop, normalised.

    Returns:
        float32 (B, C, image_size, image_size).
    """
    return normalise(eval_pixels(dataset, indices, model, centre_crop))


def eval_pixels(
    dataset: ShardDataset, indices: Sequence[int] | npt.NDArray[np.int64], model: ModelSection, centre_crop: float
) -> torch.Tensor:
    """Preprocess images as `eval_images` does, but without normalisation, to uint8.

    Raises:
        DataError: an image cannot be read or decoded; an evaluation never replaces one.
    """
    require_channels(model.channels)
    pixels = torch.empty(len(indices), model.channels, model.image_size, model.image_size, dtype=torch.uint8)
    samples = np.asarray(indices, dtype=np.int64)
    dataset.read_ahead(samples, model.channels)
    for row, index in enumerate(samples.tolist()):
        image = dataset.decode(index, model.channels)
        pixels[row] = crop_centre(image, model.image_size, math.ceil(model.image_size / centre_crop))
    return pixels


def validation_prefixes(num_images: int, num_prefixes: int, model: ModelConfig) -> torch.Tensor:
    """Return what a model conditions on for validation images: prefix lengths (images, prefixes), or visible patches
    (images, prefixes, N)."""
    if model.masked is None:
        return prefix_lengths(num_images, num_prefixes, model.num_tokens)
    numbers = np.arange(num_images)[:, None] * 4096 + np.arange(num_prefixes)
    drawn = masks(make_key("validation mask"), numbers.reshape(-1), model)
    return torch.from_numpy(drawn).unflatten(0, numbers.shape)


def prefix_lengths(num_images: int, num_prefixes: int, num_tokens: int) -> torch.Tensor:
    """Draw fixed prefix lengths, int64 (num_images, num_prefixes), a function of the image's position alone.

    The range 1..N-1 is cut into `num_prefixes` equal strata, and every image draws one length from each; the same for
    every run, so that losses can be compared image by image.
    """
    row = np.arange(num_images)[:, None]
    column = np.arange(num_prefixes)[None, :]
    draw = random_uniform(make_key("validation prefix"), row * 4096 + column)
    lengths = 1 + np.floor((column + draw) / num_prefixes * (num_tokens - 1)).astype(np.int64)
    return torch.from_numpy(np.minimum(lengths, num_tokens - 1))


def require_images(path: str, info: DatasetInfo, num_images: int | None) -> None:
    """Raise DataError if a data set has fewer images that decode than are asked for, or none."""
    if info.num_usable < (num_images or 1):
        raise DataError(
            f"{path} has {info.num_usable} usable images, {num_images or 1} were asked for; lower num_images"
        )


def usable_indices(dataset: ShardDataset, num_images: int | None = None) -> npt.NDArray[np.int64]:
    """Return the sample numbers of the decodable images, in index order, the first `num_images` of them."""
    require_images(dataset.path, dataset.info, num_images)
    return dataset.usable(None if num_images is None else np.arange(num_images))
