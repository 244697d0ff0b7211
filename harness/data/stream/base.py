"""A training stream whatever it reads from: the crop, flip, jitter and prefix length (or mask) at position p, as pure
functions of (seed, p); the kinds of stream add which image stands there.

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
    """(B, C, H, W): uint8, a quarter of the bytes to move to a device, or float32, normalised already."""
    prefix_lengths: torch.Tensor
    """What `AIM.forward` is given: prefix lengths int64 (B,), 1..N-1, or of a masked model patches, bool (B, N)."""
    positions: torch.Tensor
    """int64 (B,)."""
    bad_samples: tuple[str, ...] = ()
    """Shard and key of every undecodable sample that was replaced."""

    def __len__(self) -> int:
        return len(self.positions)

    def on(self, device: torch.device | str) -> Batch:
        """The batch with its images on a device, bytes still."""
        return dataclasses.replace(self, images=self.images.to(device, non_blocking=True).contiguous())

    def images_on(self, device: torch.device | str) -> torch.Tensor:
        """float32 (B, C, H, W), normalised; bytes are moved first, and normalised on the device."""
        images = self.on(device).images
        return normalise(images) if images.dtype == torch.uint8 else images


class PositionCache:
    """A function of positions that remembers the stretch it was last asked about, and some positions behind it.

    The order, the crops and the prefixes of a batch take numpy some two hundred small calls: those of 32 photographs
    took 17 microseconds for each of them, and those of 256 hardly take longer in all (Zen 4).
    """

    def __init__(self, function: Callable[[I64], Columns]) -> None:
        self._function = function
        self._known: tuple[int, Columns] | None = None

    def __call__(self, where: range | I64) -> Columns:
        """`function` at consecutive positions, or at any; only to be read."""
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
    """Which patches a masked model is given, bool (len(numbers), N), each a function of its number alone."""
    num_tokens = model.num_tokens
    draw = random_uniform(key, numbers[:, None] * num_tokens + np.arange(num_tokens))
    return draw > np.partition(draw, model.num_masked - 1, axis=1)[:, model.num_masked - 1, None]


def content_digest(parts: Iterable[str]) -> str:
    """16 hex digits of what identifies a stream's sources."""
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=8).hexdigest()


class Stream(abc.ABC):
    """The stream of one run; safe to pickle."""

    unique_images: int
    """U: how many different images the stream can give; 0 where they are not counted."""
    datasets: tuple[ShardDataset, ...]
    """The sources' data sets, in the order of the configuration; none where there is no index."""
    fingerprint: str
    """16 hex digits of what the stream reads from."""

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
        """Start to read what `fill` will be called for next in this process, in that order; returns at once."""

    def prefix_lengths(self, positions: npt.ArrayLike) -> I64:
        """S at every position, 1..N-1; see `ObjectiveSection.prefix`."""
        where = np.asarray(positions, dtype=np.int64).reshape(-1)
        if self._objective.prefix == "none":
            return np.ones_like(where)
        paired, num_tokens = self._objective.prefix == "paired", self._model.num_tokens
        draw = random_uniform(make_key("prefix", self._seed), where // 2 if paired else where)
        lengths = 1 + np.floor(draw * (num_tokens - 1)).astype(np.int64)
        return np.where(where % 2 == 1, num_tokens - lengths, lengths) if paired else lengths

    def batch(self, positions: Sequence[int] | I64) -> Batch:
        """Samples at any positions, in that order; whatever else is in the batch, each is the same bit for bit.

        Consecutive positions cost the least as a `range`.

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
        """Of the pixels of so many images."""
        return num_images * self._channels * self._size**2

    def fill(self, flat: torch.Tensor, where: range | I64) -> tuple[str, ...]:
        """Write the pixels of `batch` alone to the front of uint8 (`num_bytes` or more,); returns its `bad_samples`."""
        images = self._images(flat, len(where))
        bad = self._decode(images, where)
        if self._data.color_jitter:
            jitter_colours(images, make_key("jitter", self._seed), np.asarray(where, dtype=np.int64))
        return bad

    def batch_in(self, flat: torch.Tensor, where: range | I64, bad: tuple[str, ...]) -> Batch:
        """The batch at positions `where`, whose pixels `fill` has written, here or elsewhere."""
        return Batch(
            images=self._images(flat, len(where)),
            prefix_lengths=torch.from_numpy(self._prefixes(where)[0].copy()),
            positions=torch.arange(where.start, where.stop) if isinstance(where, range) else torch.from_numpy(where),
            bad_samples=bad,
        )

    def _boxes(
        self, uniforms: npt.NDArray[np.float64], height: npt.NDArray[np.int32], width: npt.NDArray[np.int32]
    ) -> Boxes:
        """Crops of images of these sides."""
        return draw_boxes(
            uniforms, height, width, scale=self._data.crop_scale, horizontal_flip=self._data.horizontal_flip
        )

    def _draw_prefixes(self, where: I64) -> Columns:
        if self._model.masked is None:
            return (self.prefix_lengths(where),)
        return (masks(make_key("mask", self._seed), where, self._model),)

    def _images(self, flat: torch.Tensor, num_images: int) -> torch.Tensor:
        """uint8 (B, C, H, W) at the front of a flat buffer."""
        channels, size = self._channels, self._size
        plane = size * size
        # decoded photographs come with interleaved colours, small images in planes, which jitter needs: keep copies
        # straight
        is_interleaved = size > SMALL_SIDE and not self._data.color_jitter
        strides = (1, size * channels, channels) if is_interleaved else (plane, size, 1)
        return flat.as_strided((num_images, channels, size, size), (channels * plane, *strides))
