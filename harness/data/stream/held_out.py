"""Held-out images: the check that none of them enters training, and their preprocessing for validation and probes.

Two data sets are compared by the checksums in their indexes. Preprocessing has no randomness, and prefixes are fixed
per image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from aimscale.harness.data import DataError
from aimscale.harness.data.random_access import make_key, random_uniform
from aimscale.harness.data.store.columns import BLOCK_ROWS
from aimscale.harness.data.store.decoding import crop_centre
from aimscale.harness.data.store.index import ShardDataset, require_channels
from aimscale.harness.data.stream.augment import normalise
from aimscale.harness.data.stream.base import masks

if TYPE_CHECKING:
    from aimscale.aim.config import ModelConfig
    from aimscale.harness.data.store.dataset_info import DatasetInfo
    from aimscale.harness.run.config import ModelSection

_TABLE_BITS = 24  # of the checksums; one lookup in the table rules out almost all images

SharedImages = tuple[ShardDataset, npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Pool, some of its samples, and the held-out samples that are the same files."""


def refuse_overlap(pools: Iterable[ShardDataset], held_out: ShardDataset) -> None:
    """Raise DataError if a training image is held out, comparing image files by checksum.

    The whole data sets are compared, whatever subset a run uses, so that a later extension of the run cannot leak.

    Raises:
        DataError: names the first image that both sides hold, and how many there are.
    """
    if found := list(shared_images(pools, held_out)):
        pool, samples, partners = found[0]
        number = sum(len(some) for which, some, _ in found if which is pool)
        raise DataError(
            f"{number} training images of {pool.path} are validation images of {held_out.path} too, first "
            f"{pool.describe(int(samples[0]))} = {held_out.describe(int(partners[0]))}; take them out of one side and "
            "index it again"
        )


def count_shared(pools: Sequence[ShardDataset], held_out: ShardDataset) -> int:
    """Count the usable held-out images that some pool holds too, byte for byte."""
    is_shared = np.zeros(len(held_out), dtype=bool)
    checksums = held_out.index.checksum
    found = [checksums[partners] for _, _, partners in shared_images(pools, held_out)]
    if found:
        is_shared = np.isin(checksums, np.concatenate(found))
        is_shared[held_out.index.bad] = False
    return int(is_shared.sum())


def shared_images(pools: Iterable[ShardDataset], held_out: ShardDataset) -> Iterator[SharedImages]:
    """Yield the usable pool images that are held out too; reads no image, and holds a block of the index in memory at a
    time."""
    order = np.argsort(held_out.index.checksum)
    wanted = held_out.index.checksum[order]
    table = np.zeros(1 << _TABLE_BITS, dtype=bool)
    table[_low_bits(wanted)] = True
    for pool in pools if len(wanted) else ():
        for first in range(0, len(pool), BLOCK_ROWS):
            checksums = pool.index.checksum[first : first + BLOCK_ROWS]
            likely = np.flatnonzero(table[_low_bits(checksums)])
            nearest = np.minimum(np.searchsorted(wanted, checksums[likely]), len(wanted) - 1)
            same = wanted[nearest] == checksums[likely]
            if same.any():  # few blocks share an image, and searching many bad samples takes long
                same &= ~np.isin(first + likely, pool.index.bad)
            if same.any():
                yield pool, first + likely[same], order[nearest[same]]


def _low_bits(checksums: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    return (checksums & np.uint64((1 << _TABLE_BITS) - 1)).astype(np.int64)


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
    dataset.read_ahead(fresh := samples[dataset.is_uncached(samples, model.channels)], whole=fresh)
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
