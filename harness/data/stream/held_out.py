"""Preprocessing of held-out images for validation and probes: without randomness, and with fixed prefixes per image."""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from aimscale.aim.errors import some
from aimscale.harness.data import DataError, refuse_bad
from aimscale.harness.data.images import SMALL_SIDE, crop_centre
from aimscale.harness.data.random_access import make_key, random_uniform
from aimscale.harness.data.store.index import ShardDataset, require_channels
from aimscale.harness.data.stream.stream import masks

_log = logging.getLogger(__name__)

MAX_DECODERS = 8
"""Maximum number of threads that decode the next images while a model works, if there are as many cores."""
Chunk = TypeVar("Chunk")

if TYPE_CHECKING:
    from aimscale.aim.config import ModelConfig
    from aimscale.harness.distributed.group import Group
    from aimscale.harness.run.config import ModelSection


class EvalImages:
    """Images of a data set as evaluations see them: without randomness, and without those that do not decode.

    Images that the index counts as undecodable are not asked for. Others, whose bytes were damaged since, are found
    when they are read: their pixels are black, and the evaluation leaves them out.
    """

    def __init__(
        self, dataset: ShardDataset, model: ModelSection, *, centre_crop: float, max_bad_fraction: float
    ) -> None:
        """Prepare images: shorter side to ceil(image_size / centre_crop), bicubic and antialiased; centre crop."""
        self.dataset = dataset
        self._channels, self._size = model.channels, model.image_size
        self._shorter_side = math.ceil(model.image_size / centre_crop)
        self._max_bad_fraction = max_bad_fraction
        info = dataset.info
        self._is_small = info.one_size and max(info.max_height, info.max_width) <= SMALL_SIDE  # decoded at once
        self._bad: dict[int, str] = {}
        self._num_named = 0
        self.is_read = False
        """Whether all images were read: one that does not decode afterwards is an error."""

    def pixels(self, samples: npt.ArrayLike) -> torch.Tensor:
        """Load samples as uint8 (B, C, image_size, image_size); threads may call this at once."""
        require_channels(self._channels)
        numbers = np.asarray(samples, dtype=np.int64)
        pixels = torch.zeros(len(numbers), self._channels, self._size, self._size, dtype=torch.uint8)
        self.dataset.read_ahead(numbers, self._channels)
        for rows in np.array_split(np.arange(len(numbers)), 1 if self._is_small else max(1, len(numbers))):
            images, problems = self.dataset.decode_many(numbers[rows], self._channels)
            for place, problem in problems.items():
                number = int(numbers[rows[place]])
                name = self.dataset.describe(number, problem)
                if self.is_read:
                    raise DataError(f"{name} cannot be decoded any more; repair the shard, or index it again")
                self._bad[number] = name
            if len(images):
                pixels[np.delete(rows, list(problems))] = crop_centre(images, self._size, self._shorter_side)
        return pixels

    def is_good(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return whether each of these samples has not been found undecodable."""
        return ~np.isin(samples, [*self._bad])

    def agree(self, group: Group, samples: npt.NDArray[np.int64]) -> None:
        """Tell all ranks which images each of them found undecodable, and name new ones in the log.

        Args:
            samples: images that the ranks have read together.
        """
        for bad in group.all_gather_object(self._bad):
            self._bad |= bad
        names = [self._bad[number] for number in sorted(self._bad)]
        number = len(np.union1d(samples, [*self._bad]))  # with those that were left out before
        images = f"{number} images of {self.dataset.path}"
        if not self.is_good(samples).any():
            raise DataError(f"none of {images} can be decoded: {some(names)}; restore its shards")
        refuse_bad(images, len(names), number, self._max_bad_fraction, lambda: names[-1])
        if group.is_first and len(names) > self._num_named:
            _log.warning("left out of %s, cannot be decoded: %s", self.dataset.path, some(names))
        self._num_named = len(names)


def decoded_ahead(
    images: Callable[[Chunk], torch.Tensor], chunks: Iterable[Chunk]
) -> Iterator[tuple[Chunk, torch.Tensor]]:
    """Yield each chunk with its images, in order, decoded by threads ahead of the caller; an error is raised at its
    chunk."""
    num_threads = min(MAX_DECODERS, len(os.sched_getaffinity(0)))
    pool = ThreadPoolExecutor(num_threads, "decode")
    try:
        under_way = ((chunk, pool.submit(images, chunk)) for chunk in chunks)
        pending = deque(itertools.islice(under_way, num_threads))
        while pending:
            pending.extend(itertools.islice(under_way, 1))
            chunk, future = pending.popleft()
            yield chunk, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def validation_prefixes(num_images: int, num_prefixes: int, model: ModelConfig) -> torch.Tensor:
    """Return prefix lengths (images, prefixes) of validation images, or visible patches (images, prefixes, N)."""
    if model.masked is None:
        return prefix_lengths(num_images, num_prefixes, model.num_tokens)
    numbers = np.arange(num_images)[:, None] * 4096 + np.arange(num_prefixes)
    drawn = masks(make_key("validation mask"), numbers.reshape(-1), model)
    return torch.from_numpy(drawn).unflatten(0, numbers.shape)


def prefix_lengths(num_images: int, num_prefixes: int, num_tokens: int) -> torch.Tensor:
    """Draw fixed prefix lengths, int64 (num_images, num_prefixes), by the image's position alone, so that losses of all
    runs can be compared image by image: one from each of `num_prefixes` equal strata of 1..N-1."""
    row = np.arange(num_images)[:, None]
    column = np.arange(num_prefixes)[None, :]
    draw = random_uniform(make_key("validation prefix"), row * 4096 + column)
    lengths = 1 + np.floor((column + draw) / num_prefixes * (num_tokens - 1)).astype(np.int64)
    return torch.from_numpy(np.minimum(lengths, num_tokens - 1))
