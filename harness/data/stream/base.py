"""Base of training streams: crop, flip, jitter and prefix length (or mask) at position p, as pure functions of (seed,
p); subclasses add the image.

Nothing is stored between positions, so any rank, worker or restarted process computes any position in O(1).
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from aimscale.aim.config import ModelConfig
from aimscale.harness.data.random_access import I64, make_key, random_uniform
from aimscale.harness.data.store.index import ShardDataset, require_channels
from aimscale.harness.data.stream.augment import SMALL_SIDE, Boxes, draw_boxes, normalise
from aimscale.harness.data.stream.jitter import jitter_colours
from aimscale.harness.run.row import model_of

if TYPE_CHECKING:
    from aimscale.harness.run.config import RunConfig


MAX_REPLACEMENTS = 16  # tries of one position before the stream gives up
_NUM_AHEAD = 256

Columns = tuple[npt.NDArray[Any], ...]
"""Arrays with one row per position."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples at some positions of the stream; may be empty."""

    images: torch.Tensor
    """Images (B, C, H, W): uint8, a quarter of the bytes to move to a device, or float32, already normalised."""
    prefix_lengths: torch.Tensor
    """Prefix lengths, int64 (B,), in 1..N-1; for a masked model its visible patches, bool (B, N). Input of
    `AIM.forward`."""
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


class PositionCache:
    """Function of positions that caches its values for a run of consecutive positions.

    The order, the crops and the prefixes of a batch take numpy some two hundred small calls: for 32 photographs they
    took 17 microseconds per photograph, and for 256 hardly more in all (Zen 4). So at least 256 positions are computed
    at once.
    """

    def __init__(self, function: Callable[[I64], Columns]) -> None:
        self._function = function
        self._known: tuple[int, Columns] | None = None

    def __call__(self, where: range | I64) -> Columns:
        """Evaluate `function` at consecutive positions, or at any; the result must not be modified."""
        if not isinstance(where, range):
            return self._function(where)
        first, number = where.start, len(where)
        known_from, columns = self._known or (first, ())
        if not columns or not 0 <= first - known_from <= len(columns[0]) - number:
            known_from, columns = first, self._function(np.arange(first, first + max(number, _NUM_AHEAD)))
            self._known = known_from, columns
        rows = slice(first - known_from, first - known_from + number)
        return tuple(column[rows] for column in columns)


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
        self._model = model_of(training)
        self._prefixes = PositionCache(self._draw_prefixes)
        require_channels(self._channels)

    @abc.abstractmethod
    def _decode(self, images: torch.Tensor, where: range | I64) -> tuple[str, ...]:
        """Fill uint8 (B, C, size, size) with the positions' images, cropped, resized and flipped.

        Returns the samples that were replaced.
        """

    def read_ahead(self, where: range) -> None:  # noqa: B027  # a stream without an index reads its shards in a row
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

    def batch(self, positions: Sequence[int] | I64) -> Batch:
        """Load the samples at any positions, in that order; each is the same bit for bit, whatever else is in the
        batch.

        Consecutive positions are fastest as a `range`.

        Raises:
            DataError: a shard cannot be read, or sixteen replacements of one undecodable sample are undecodable too.
        """
        where: range | I64
        if isinstance(positions, range) and positions.step == 1:
            where = positions
        else:
            where = np.asarray(positions, dtype=np.int64).reshape(-1)
        flat = torch.empty(self.num_bytes(len(where)), dtype=torch.uint8)
        return self.batch_in(flat, where, self.fill(flat, where))

    def num_bytes(self, num_images: int) -> int:
        """Return the bytes of the pixels of so many images."""
        return num_images * self._channels * self._size**2

    def fill(self, flat: torch.Tensor, where: range | I64) -> tuple[str, ...]:
        """Write the pixels of `batch` to the front of a uint8 buffer (`num_bytes` or more,); returns its
        `bad_samples`."""
        images = self._images(flat, len(where))
        bad = self._decode(images, where)
        if self._data.color_jitter:
            jitter_colours(images, make_key("jitter", self._seed), np.asarray(where, dtype=np.int64))
        return bad

    def batch_in(self, flat: torch.Tensor, where: range | I64, bad: tuple[str, ...]) -> Batch:
        """Make the batch at positions `where` from pixels that `fill` has written, here or in another process."""
        return Batch(
            images=self._images(flat, len(where)),
            prefix_lengths=torch.from_numpy(self._prefixes(where)[0].copy()),
            positions=torch.arange(where.start, where.stop) if isinstance(where, range) else torch.from_numpy(where),
            bad_samples=bad,
        )

    def _boxes(
        self, uniforms: npt.NDArray[np.float64], height: npt.NDArray[np.int32], width: npt.NDArray[np.int32]
    ) -> Boxes:
        """Draw the crops of images of these sides."""
        return draw_boxes(
            uniforms, height, width, scale=self._data.crop_scale, horizontal_flip=self._data.horizontal_flip
        )

    def _draw_prefixes(self, where: I64) -> Columns:
        if self._model.masked is None:
            return (self.prefix_lengths(where),)
        return (masks(make_key("mask", self._seed), where, self._model),)

    def _images(self, flat: torch.Tensor, num_images: int) -> torch.Tensor:
        """View the front of a flat buffer as uint8 (B, C, H, W)."""
        channels, size = self._channels, self._size
        plane = size * size
        # decoded photographs come with interleaved colours, small images in planes, which jitter needs: keep copies
        # straight
        is_interleaved = size > SMALL_SIDE and not self._data.color_jitter
        strides = (1, size * channels, channels) if is_interleaved else (plane, size, 1)
        return flat.as_strided((num_images, channels, size, size), (channels * plane, *strides))
