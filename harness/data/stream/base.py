"""Streams of training images: batches, and what indexed and unindexed streams share.

Crop, flip, jitter and prefix length (or mask) at position p are functions of (seed, p).
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from aimscale.aim.config import ModelConfig
from aimscale.harness.data.random_access import I64, make_key, random_uniform
from aimscale.harness.data.store.index import ShardDataset, require_channels
from aimscale.harness.data.stream.augment import SMALL_SIDE, Boxes, draw_boxes, jitter_colours, normalise
from aimscale.harness.run.row import build_model_config

if TYPE_CHECKING:
    from aimscale.harness.run.config import RunConfig

MAX_REPLACEMENTS = 16  # tries of one position before the stream gives up


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples at some positions of the stream; may be empty."""

    images: torch.Tensor
    """Images (B, C, H, W): uint8, a quarter of the bytes to move to a device, or float32, already normalised."""
    prefix_lengths: torch.Tensor
    """Prefix lengths, int64 (B,), in 1..N-1; for a masked model its visible patches, bool (B, N)."""
    positions: torch.Tensor
    """Positions in the stream, int64 (B,)."""
    bad_samples: tuple[str, ...] = ()
    """Shard, key and reason of every undecodable sample that was replaced."""

    def __len__(self) -> int:
        return len(self.positions)

    def on(self, device: torch.device | str) -> Batch:
        """Move the images to a device, as the bytes that they are."""
        return dataclasses.replace(self, images=self.images.to(device, non_blocking=True).contiguous())

    def images_on(self, device: torch.device | str) -> torch.Tensor:
        """Return normalised float32 images (B, C, H, W) on a device; bytes are moved first and normalised there."""
        images = self.on(device).images
        return normalise(images) if images.dtype == torch.uint8 else images


def masks(key: int, numbers: I64, model: ModelConfig) -> npt.NDArray[np.bool_]:
    """Draw the visible patches of a masked model, bool (len(numbers), N), each row a function of its number alone."""
    num_tokens = model.num_tokens
    draw = random_uniform(key, numbers[:, None] * num_tokens + np.arange(num_tokens))
    return draw > np.partition(draw, model.num_masked - 1, axis=1)[:, model.num_masked - 1, None]


def content_digest(parts: Iterable[str]) -> str:
    """Compute 16 hex digits that identify a stream's sources."""
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=8).hexdigest()


class Stream(abc.ABC):
    """Training stream of one run; safe to pickle."""

    unique_images: int
    """U: number of different images that the stream can yield; 0 if unknown."""
    datasets: tuple[ShardDataset, ...]
    """Data sets of the sources, in the order of the configuration; empty without an index."""
    fingerprint: str
    """Hash, 16 hex digits, of what the stream reads from."""

    def __init__(self, config: RunConfig) -> None:
        training = config.training
        self._data, self._objective, self._seed = training.data, training.objective, training.seed
        self._size, self._channels = training.model.image_size, training.model.channels
        self._model = build_model_config(training)
        require_channels(self._channels)

    @abc.abstractmethod
    def _decode(self, images: torch.Tensor, positions: I64) -> tuple[str, ...]:
        """Fill uint8 (B, C, size, size) with the positions' images, cropped, resized and flipped.

        Returns the samples that were replaced.
        """

    def read_ahead(self, positions: npt.ArrayLike) -> None:  # noqa: B027  # without an index, shards are read in a row
        """Start to read what this process will next call `fill` for, in that order; returns at once."""

    def prefix_lengths(self, positions: npt.ArrayLike) -> I64:
        """Draw S at every position, in 1..N-1; see `ObjectiveSection.prefix`."""
        where = np.asarray(positions, dtype=np.int64).reshape(-1)
        if self._objective.prefix == "none":
            return np.ones_like(where)
        paired, num_tokens = self._objective.prefix == "paired", self._model.num_tokens
        draw = random_uniform(make_key("prefix", self._seed), where // 2 if paired else where)
        lengths = 1 + np.floor(draw * (num_tokens - 1)).astype(np.int64)
        return np.where(where % 2 == 1, num_tokens - lengths, lengths) if paired else lengths

    def batch(self, positions: npt.ArrayLike) -> Batch:
        """Load the samples at any positions, in that order; each is the same bit for bit, whatever else is in the
        batch.

        Raises:
            DataError: a shard cannot be read, or sixteen replacements of one undecodable sample are undecodable too.
        """
        where = np.asarray(positions, dtype=np.int64).reshape(-1)
        flat = torch.empty(self.num_bytes(len(where)), dtype=torch.uint8)
        return self.batch_in(flat, where, self.fill(flat, where))

    def num_bytes(self, num_images: int) -> int:
        """Return the bytes of the pixels of so many images."""
        return num_images * self._channels * self._size**2

    def fill(self, flat: torch.Tensor, positions: npt.ArrayLike) -> tuple[str, ...]:
        """Write the pixels of `batch` to the front of a uint8 buffer; returns its `bad_samples`."""
        where = np.asarray(positions, dtype=np.int64)
        images = self._images(flat, len(where))
        bad = self._decode(images, where)
        if self._data.color_jitter:
            jitter_colours(images, make_key("jitter", self._seed), where)
        return bad

    def batch_in(self, flat: torch.Tensor, positions: npt.ArrayLike, bad: tuple[str, ...]) -> Batch:
        """Make the batch at some positions from pixels that `fill` has written, here or in another process."""
        where = np.asarray(positions, dtype=np.int64)
        if self._model.masked is None:
            prefix_lengths: npt.NDArray[Any] = self.prefix_lengths(where)
        else:
            prefix_lengths = masks(make_key("mask", self._seed), where, self._model)
        return Batch(
            images=self._images(flat, len(where)),
            prefix_lengths=torch.from_numpy(prefix_lengths),
            positions=torch.from_numpy(where),
            bad_samples=bad,
        )

    def _boxes(self, positions: I64, height: npt.NDArray[np.int32], width: npt.NDArray[np.int32]) -> Boxes:
        """Draw the crops at these positions, of images of these sides."""
        scale, flip = self._data.crop_scale, self._data.horizontal_flip
        return draw_boxes(make_key("crop", self._seed), positions, height, width, scale=scale, horizontal_flip=flip)

    def _images(self, flat: torch.Tensor, num_images: int) -> torch.Tensor:
        """View the front of a flat buffer as uint8 (B, C, H, W).

        Colours are interleaved as decoded photographs have them, or in planes as small images and jitter have them, so
        that copies are straight.
        """
        channels, size = self._channels, self._size
        is_interleaved = size > SMALL_SIDE and not self._data.color_jitter
        strides = (1, size * channels, channels) if is_interleaved else (size * size, size, 1)
        return flat.as_strided((num_images, channels, size, size), (channels * size * size, *strides))
