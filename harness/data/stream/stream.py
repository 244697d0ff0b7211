"""The training stream: image, crop, flip, jitter and prefix length (or mask) at position p, as functions of (seed, p).

Nothing is stored between positions, so any rank, worker or restarted process computes any position in O(1). Which image
stands where: `order`.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from aimscale.aim.config import ModelConfig
from aimscale.harness.data import DataError
from aimscale.harness.data.random_access import I64, make_key, random_bits, random_uniform
from aimscale.harness.data.store.decoding import UndecodableImageError, decode_interleaved
from aimscale.harness.data.store.index import ShardDataset, require_channels
from aimscale.harness.data.stream.augment import (
    BOX,
    SMALL_SIDE,
    Boxes,
    box_uniforms,
    crop_resize_into,
    crop_resize_small,
    draw_boxes,
    jitter_colours,
    normalise,
)
from aimscale.harness.data.stream.order import Mixture
from aimscale.harness.data.stream.sources import Source, open_sources
from aimscale.harness.run.row import model_of

if TYPE_CHECKING:
    from aimscale.harness.run.config import RunConfig

MAX_REPLACEMENTS = 16  # tries of one position before the stream gives up
_BLOCK, _MAX_BLOCKS = 256, 32  # positions that are drawn at once, and blocks that are kept
_DRAWN = np.dtype([("source", "<i4"), ("sample", "<i8"), ("height", "<i4"), ("width", "<i4"), ("box", BOX)])
"""Draws at a position: source number, sample number within it, the image's sides in pixels, and its crop."""
_Drawn = npt.NDArray[Any]


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
        positions = np.asarray(where, dtype=np.int64)
        if self._model.masked is None:
            prefix_lengths: npt.NDArray[Any] = self.prefix_lengths(positions)
        else:
            prefix_lengths = masks(make_key("mask", self._seed), positions, self._model)
        return Batch(
            images=self._images(flat, len(where)),
            prefix_lengths=torch.from_numpy(prefix_lengths),
            positions=torch.from_numpy(positions),
            bad_samples=bad,
        )

    def _boxes(self, positions: I64, height: npt.NDArray[np.int32], width: npt.NDArray[np.int32]) -> Boxes:
        """Draw the crops at these positions, of images of these sides."""
        uniforms = box_uniforms(make_key("crop", self._seed), positions)
        scale, flip = self._data.crop_scale, self._data.horizontal_flip
        return draw_boxes(uniforms, height, width, scale=scale, horizontal_flip=flip)

    def _images(self, flat: torch.Tensor, num_images: int) -> torch.Tensor:
        """View the front of a flat buffer as uint8 (B, C, H, W)."""
        channels, size = self._channels, self._size
        plane = size * size
        # decoded photographs come with interleaved colours, small images in planes, which jitter needs: keep copies
        # straight
        is_interleaved = size > SMALL_SIDE and not self._data.color_jitter
        strides = (1, size * channels, channels) if is_interleaved else (plane, size, 1)
        return flat.as_strided((num_images, channels, size, size), (channels * plane, *strides))


class TrainStream(Stream):
    """Stream of a run on indexed data sets."""

    def __init__(self, config: RunConfig, *, cache_dir: str | None = None, cache_gb: float = 100.0) -> None:
        """Open the sources; shards at a URL are kept in `cache_dir`, up to `cache_gb`."""
        super().__init__(config)
        self._mixture = Mixture([source.probability for source in config.training.data.sources])
        self._sources = open_sources(config, cache_dir, cache_gb)
        self.unique_images = sum(source.order.num_unique for source in self._sources)
        self.datasets = tuple(source.dataset for source in self._sources)
        self.fingerprint = content_digest(dataset.fingerprint for dataset in self.datasets)
        self._blocks: dict[int, _Drawn] = {}

    def locate(self, positions: npt.ArrayLike) -> tuple[I64, I64]:
        """Return (source number, sample number) at every position: the stream's order, without reading an image."""
        where = np.asarray(positions, dtype=np.int64).reshape(-1)
        source_of, rank = self._mixture.locate(where)
        sample_of = np.empty_like(where)
        for number, source in enumerate(self._sources):
            mine = np.flatnonzero(source_of == number)
            if mine.size:
                epochs, slots = np.divmod(rank[mine], source.order.num_unique)
                sample_of[mine] = source.sample_numbers(slots, epochs)
        return source_of, sample_of

    def read_ahead(self, where: range) -> None:
        """Start to read what `fill` will next be called for, and fetch the shards of later positions."""
        drawn = self._drawn(where)
        for number, source in enumerate(self._sources):
            samples = drawn["sample"][drawn["source"] == number]
            if source.positions_ahead:
                source_of, later = self.locate(np.arange(where.start, where.stop) + source.positions_ahead)
                samples = np.concatenate([samples, later[source_of == number]])
            source.dataset.read_ahead(samples, self._channels)

    def _drawn(self, where: range | I64) -> _Drawn:
        """Return the draws at these positions.

        numpy's calls take as long for 256 positions as for 32: for 32 photographs they took 17 microseconds per
        photograph (Zen 4). So consecutive positions are drawn by blocks, which are kept for the next batches.
        """
        if not isinstance(where, range):
            return self._draw(where)
        first, last = where.start // _BLOCK, -(-where.stop // _BLOCK)
        drawn = np.concatenate([self._block(number) for number in range(first, last)] or [np.empty(0, _DRAWN)])
        return drawn[where.start - first * _BLOCK : where.stop - first * _BLOCK]

    def _block(self, number: int) -> _Drawn:
        if number not in self._blocks:
            if len(self._blocks) == _MAX_BLOCKS:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[number] = self._draw(np.arange(number * _BLOCK, (number + 1) * _BLOCK))
        return self._blocks[number]

    def _draw(self, positions: I64) -> _Drawn:
        return self._with_boxes(*self.locate(positions), positions)

    def _with_boxes(self, source_of: I64, sample_of: I64, positions: I64) -> _Drawn:
        """Add the sides and crops of these samples."""
        drawn = np.empty(len(positions), _DRAWN)
        drawn["source"], drawn["sample"] = source_of, sample_of
        height, width = np.empty((2, len(positions)), dtype=np.int32)
        for number, source in enumerate(self._sources):
            mine = np.flatnonzero(source_of == number)
            height[mine], width[mine] = source.dataset.sides(sample_of[mine])
        drawn["height"], drawn["width"], drawn["box"] = height, width, self._boxes(positions, height, width)
        return drawn

    def _decode(self, images: torch.Tensor, where: range | I64) -> tuple[str, ...]:
        drawn, pending, bad = self._drawn(where), np.arange(len(where)), list[str]()
        for attempt in range(MAX_REPLACEMENTS + 1):
            failed: list[int] = []
            for number, source in enumerate(self._sources):
                mine = np.flatnonzero(drawn["source"] == number)
                if mine.size:
                    problems = self._decode_from(source.dataset, images, pending[mine], drawn[mine])
                    failed += mine[list(problems)].tolist()
                    samples = drawn["sample"][mine]
                    bad += [source.dataset.describe(int(samples[i]), why) for i, why in problems.items()]
            if not failed:
                return tuple(bad)
            pending = pending[failed]
            drawn = self._replaced(drawn["source"][failed], np.asarray(where)[pending], attempt)
        raise DataError(
            f"position {where[pending[0]]}: {MAX_REPLACEMENTS} undecodable samples in a row, last {bad[-1]}"
        )

    def _decode_from(self, dataset: ShardDataset, images: torch.Tensor, rows: I64, drawn: _Drawn) -> dict[int, str]:
        """Fill `rows` of `images` from one source; returns the reasons of those of `drawn` that do not decode."""
        samples, height, width, boxes = (drawn[name] for name in ("sample", "height", "width", "box"))
        is_small = (height <= SMALL_SIDE) & (width <= SMALL_SIDE)
        small, large = np.flatnonzero(is_small), np.flatnonzero(~is_small)
        problems: dict[int, str] = {}
        shapes = height[small] * (SMALL_SIDE + 1) + width[small]
        for shape in np.unique(shapes) if small.size else ():
            group = small[shapes == shape]
            whole, wrong = dataset.decode_many(samples[group], self._channels)
            problems |= {int(group[i]): reason for i, reason in wrong.items()}
            group = np.delete(group, list(wrong))
            images[rows[group]] = crop_resize_small(whole, boxes[group], self._size)
        if large.size:
            problems |= self._decode_large(dataset, images, rows, drawn, large)
        return problems

    def _decode_large(
        self, dataset: ShardDataset, images: torch.Tensor, rows: I64, drawn: _Drawn, large: I64
    ) -> dict[int, str]:
        """Fill the rows of large images, one by one; see `_decode_from`."""
        samples, box_of = drawn["sample"][large], drawn["box"].tolist()
        problems, decoded, sides = dict[int, str](), list[int](), list[tuple[int, ...]]()
        data = dataset.read_many(samples)
        for turn, i in enumerate(large.tolist()):
            try:
                pixels = decode_interleaved(data[turn], self._channels)
            except UndecodableImageError as error:
                problems[i] = str(error)
                continue
            decoded.append(turn)
            sides.append(pixels.shape[:2])
            if sides[-1] != (drawn["height"][i], drawn["width"][i]):
                break  # `check` refuses it
            crop_resize_into(images[rows[i] : rows[i] + 1], pixels, box_of[i])
        dataset.check(samples[decoded], [data[turn] for turn in decoded], sides)
        return problems

    def _replaced(self, source_of: I64, positions: I64, attempt: int) -> _Drawn:
        """Draw another sample of the same source and subset for each position, chosen by (seed, position, attempt)."""
        draws = random_bits(make_key("replacement", self._seed), positions * MAX_REPLACEMENTS + attempt)
        sample_of = [_other_sample(self._sources[number], draw) for number, draw in zip(source_of, draws, strict=True)]
        return self._with_boxes(source_of, np.array(sample_of), positions)


def _other_sample(source: Source, draw: np.uint64) -> int:
    """Return the number of one of a source's samples, chosen by a random number of 64 bits."""
    slot = np.array([draw % np.uint64(source.order.num_unique)], dtype=np.int64)
    return int(source.sample_numbers(slot, np.zeros_like(slot))[0])
