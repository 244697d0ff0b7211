"""The training stream: image, crop, flip, jitter and prefix length (or mask) at position p, as functions of (seed, p).

Nothing is stored between positions, so any rank, worker or restarted process computes any position in O(1). Which image
stands where: `order`. Shards without an index (`wds://` and a path or URL, with braces for many) are drawn with
replacement and their images shuffled in a buffer, both by webdataset: these come in the order of reading.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from aimscale.aim.config import ModelConfig
from aimscale.harness.data import DataError
from aimscale.harness.data.images import (
    BOX,
    SMALL_SIDE,
    Boxes,
    UndecodableImageError,
    crop_resize_into,
    crop_resize_small,
    decode_interleaved,
    draw_boxes,
    jitter_colours,
    normalise,
)
from aimscale.harness.data.random_access import I64, make_key, random_bits, random_uniform
from aimscale.harness.data.store.index import ShardDataset, require_channels
from aimscale.harness.data.store.tars import read_images, shard_urls
from aimscale.harness.data.stream.order import Mixture, open_sources
from aimscale.harness.run.config import RunConfig, build_model_config

MAX_REPLACEMENTS = 16  # tries of one position before the stream gives up
_DRAWN = np.dtype([("source", "<i4"), ("sample", "<i8"), ("height", "<i4"), ("width", "<i4"), ("box", BOX)])
"""Draws at a position: source number, sample number within it, the image's sides in pixels, and its crop."""
_Drawn = npt.NDArray[Any]


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
        images = self.images.to(device, non_blocking=True).contiguous()
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
        self._num_tokens = self._model.num_tokens
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
        paired, num_tokens = self._objective.prefix == "paired", self._num_tokens
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
        self._located = (np.empty(0, np.int64),) * 3

    def locate(self, positions: npt.ArrayLike) -> tuple[I64, I64]:
        """Return (source number, sample number) at every position: the stream's order, without reading an image."""
        where = np.asarray(positions, dtype=np.int64).reshape(-1)
        if np.array_equal(where, self._located[0]):  # `fill` asks again for what `read_ahead` has just asked for
            return self._located[1:]
        source_of, rank = self._mixture.locate(where)
        sample_of = np.empty_like(where)
        for number, source in enumerate(self._sources):
            mine = np.flatnonzero(source_of == number)
            if mine.size:
                epochs, slots = np.divmod(rank[mine], source.order.num_unique)
                sample_of[mine] = source.sample_numbers(slots, epochs)
        self._located = where.copy(), source_of, sample_of
        return source_of, sample_of

    def read_ahead(self, positions: npt.ArrayLike) -> None:
        """Start to read what `fill` will next be called for, and fetch the shards of later positions."""
        where = np.asarray(positions, dtype=np.int64)
        source_now, sample_now = self.locate(where)
        for number, source in enumerate(self._sources):
            samples = sample_now[source_now == number]
            if source.positions_ahead:
                source_of, later = self.locate(where + source.positions_ahead)
                samples = np.concatenate([samples, later[source_of == number]])
            source.dataset.read_ahead(samples, self._channels)

    def _with_boxes(self, source_of: I64, sample_of: I64, positions: I64) -> _Drawn:
        """Add the sides and crops of these samples."""
        drawn = np.empty(len(positions), _DRAWN)
        drawn["source"], drawn["sample"] = source_of, sample_of
        for number, source in enumerate(self._sources):
            mine = np.flatnonzero(source_of == number)
            drawn["height"][mine], drawn["width"][mine] = source.dataset.sides(sample_of[mine])
        drawn["box"] = self._boxes(positions, drawn["height"], drawn["width"])
        return drawn

    def _decode(self, images: torch.Tensor, positions: I64) -> tuple[str, ...]:
        drawn, pending = self._with_boxes(*self.locate(positions), positions), np.arange(len(positions))
        bad: list[str] = []
        for attempt in range(MAX_REPLACEMENTS + 1):
            failed: list[int] = []
            for number, source in enumerate(self._sources):
                mine = np.flatnonzero(drawn["source"] == number)
                problems = self._decode_from(source.dataset, images, pending[mine], drawn[mine])
                failed += mine[list(problems)].tolist()
                bad += [
                    source.dataset.describe(int(drawn["sample"][mine[i]]), problem) for i, problem in problems.items()
                ]
            if not failed:
                return tuple(bad)
            pending = pending[failed]
            drawn = self._replaced(drawn["source"][failed], positions[pending], attempt)
        raise DataError(
            f"position {positions[pending[0]]}: {MAX_REPLACEMENTS} undecodable samples in a row, last {bad[-1]}"
        )

    def _decode_from(self, dataset: ShardDataset, images: torch.Tensor, rows: I64, drawn: _Drawn) -> dict[int, str]:
        """Fill `rows` of `images` from one source; returns the reasons of those of `drawn` that do not decode."""
        problems: dict[int, str] = {}
        is_small = (drawn["height"] <= SMALL_SIDE) & (drawn["width"] <= SMALL_SIDE)
        shapes = np.where(is_small, drawn["height"] * (SMALL_SIDE + 1) + drawn["width"], -1)
        for shape in np.unique(shapes):
            group = np.flatnonzero(shapes == shape)
            if shape < 0:
                problems |= self._decode_large(dataset, images, rows, drawn, group)
                continue
            whole, wrong = dataset.decode_many(drawn["sample"][group], self._channels)
            problems |= {int(group[i]): reason for i, reason in wrong.items()}
            group = np.delete(group, list(wrong))
            images[rows[group]] = crop_resize_small(whole, drawn["box"][group], self._size)
        return problems

    def _decode_large(
        self, dataset: ShardDataset, images: torch.Tensor, rows: I64, drawn: _Drawn, large: I64
    ) -> dict[int, str]:
        """Fill the rows of large images, one by one; see `_decode_from`."""
        problems: dict[int, str] = {}
        samples, boxes = drawn["sample"][large].tolist(), drawn["box"][large].tolist()
        for i, sample, box, data in zip(large.tolist(), samples, boxes, dataset.read_many(samples), strict=True):
            try:
                pixels = decode_interleaved(data, self._channels)
            except UndecodableImageError as error:
                problems[i] = str(error)
            else:
                dataset.check(sample, data, pixels.shape[:2])
                crop_resize_into(images[rows[i] : rows[i] + 1], pixels, box)
        return problems

    def _replaced(self, source_of: I64, positions: I64, attempt: int) -> _Drawn:
        """Draw another sample of the same source and subset for each position, chosen by (seed, position, attempt)."""
        draws = random_bits(make_key("replacement", self._seed), positions * MAX_REPLACEMENTS + attempt)
        sample_of = np.empty_like(positions)
        for row, source in enumerate(self._sources[number] for number in source_of):
            slots = (draws[row : row + 1] % np.uint64(source.order.num_unique)).astype(np.int64)
            sample_of[row : row + 1] = source.sample_numbers(slots, np.zeros_like(slots))
        return self._with_boxes(source_of, sample_of, positions)


def open_stream(config: RunConfig, *, cache_dir: str | None = None, cache_gb: float = 100.0) -> Stream:
    """Open the stream of a run, by its sources; raises DataError as `open_sources` and `shard_urls` do."""
    if config.training.data.is_unindexed:
        return UnindexedStream(config)
    return TrainStream(config, cache_dir=cache_dir, cache_gb=cache_gb)


class UnindexedStream(Stream):
    """Stream of shards without an index, in the order of reading; every loading process draws its own shards."""

    unique_images, datasets = 0, ()

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._urls = shard_urls(config.training.data.sources[0].path)
        self.fingerprint = content_digest(self._urls)
        self._reading: Iterator[tuple[str, bytes]] | None = None

    def _decode(self, images: torch.Tensor, positions: I64) -> tuple[str, ...]:
        if not len(positions):
            return ()
        if self._reading is None:  # opened where it is used: in the trainer, or in each worker
            self._reading = self._read(seed=make_key("unindexed", self._seed, int(positions[0])))
        bad: list[str] = []
        for row in range(len(positions)):
            for name, data in itertools.islice(self._reading, MAX_REPLACEMENTS):
                try:
                    pixels = decode_interleaved(data, self._channels)
                    break
                except UndecodableImageError as error:
                    bad.append(f"{name} ({error})")
            else:
                raise DataError(f"{MAX_REPLACEMENTS} images in a row cannot be decoded, last {bad[-1]}")
            height, width = np.array(pixels.shape[:2], dtype=np.int32)[:, None]
            (box,) = self._boxes(positions[row : row + 1], height, width).tolist()
            crop_resize_into(images[row : row + 1], pixels, box)
        return tuple(bad)

    def _read(self, seed: int) -> Iterator[tuple[str, bytes]]:
        """Yield names and bytes of images, endlessly; processes have different seeds, and so draw different shards."""
        import webdataset  # slow to import

        shards = webdataset.ResampledShards(self._urls, seed=seed, worker_seed=lambda: 0, deterministic=True)
        samples = (sample for shard in shards for sample in read_images(shard["url"]))
        size = self._data.shuffle_buffer
        yield from webdataset.shuffle(size, initial=max(1, size // 2), rng=random.Random(seed))(samples)
