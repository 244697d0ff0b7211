"""The training stream: which image, crop, flip and prefix length stand at position p, as a pure function of (seed, p).

Nothing is stored between positions, so any rank, worker or restarted process computes any position in O(1). Each
source is walked epoch by epoch, every epoch a fresh permutation of the same U images; sources are interleaved by quota
(after p positions a source of probability q has given p q images, within one), so their epochs stay exact too.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from aimscale.harness.data.errors import DataError
from aimscale.harness.data.random_access import I64, make_key, random_bits, random_uniform
from aimscale.harness.data.store.decoding import UndecodableImageError, decode_interleaved, decode_into
from aimscale.harness.data.store.index import ShardDataset, require_channels
from aimscale.harness.data.stream.augment import (
    SMALL_SIDE,
    Boxes,
    box_draws,
    crop_resize_into,
    crop_resize_small,
    draw_boxes,
)
from aimscale.harness.data.stream.batch import Batch
from aimscale.harness.data.stream.crops import MAX_CROP_PIXELS, CropLayout, Crops, Jitter, pack
from aimscale.harness.data.stream.jitter import jitter_colours
from aimscale.harness.data.stream.mixture import Mixture
from aimscale.harness.data.stream.sources import Source, open_sources
from aimscale.harness.data.stream.stretch import Columns, Drawn, Stretch

if TYPE_CHECKING:
    from aimscale.harness.run.config import RunConfig

MAX_REPLACEMENTS = 16  # tries of one position before the stream gives up


class Canvas(NamedTuple):
    """Memory for the images of a batch, made once where it is used again: it takes a call of torch for each image."""

    flat: torch.Tensor
    """uint8, as many bytes as the pixels of the batch may take."""
    rows: torch.Tensor
    """uint8 (B, C, H, W) at its front."""
    slots: tuple[torch.Tensor, ...]
    """Each row: (1, C, H, W)."""


class TrainStream:
    """The stream of one run.

    Raises:
        DataError: a source cannot be opened, holds other images than the run was planned with, a validation image, or
            too many undecodable ones, or has fewer images than `unique_images` asks of it.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        cache_dir: str | None = None,
        cache_gb: float = 100.0,
        augment_on: Literal["loader", "device"] = "loader",
    ) -> None:
        self._set_up(config, augment_on)
        self._mixture = Mixture([source.probability for source in config.training.data.sources])
        self._sources = open_sources(config, self._mixture, cache_dir=cache_dir, cache_gb=cache_gb)
        if augment_on == "device":
            largest = max(dataset.info.max_pixels for dataset in self.datasets)
            self._max_pixels = max(self._size**2, min(largest, MAX_CROP_PIXELS))

    def _set_up(self, config: RunConfig, augment_on: Literal["loader", "device"]) -> None:
        """What is the same wherever images come from."""
        training = config.training
        self._augment_on = augment_on
        self._data, self._prefix, self._seed = training.data, training.objective.prefix, training.seed
        self._size, self._channels = training.model.image_size, training.model.channels
        self.num_tokens = (training.model.image_size // training.model.patch_size) ** 2
        self._max_pixels = max(self._size**2, MAX_CROP_PIXELS if augment_on == "device" else 0)
        self._drawn, self._prefixes = Stretch(self._draw), Stretch(self._draw_prefixes)
        require_channels(self._channels)

    @property
    def can_be_split(self) -> bool:
        """Whether several micro-batches may be read as one: crops for a device lie in a buffer that nothing cuts."""
        return self._augment_on == "loader"

    @property
    def image_size(self) -> int:
        """Side of the images that it hands out, pixels."""
        return self._size

    @property
    def unique_images(self) -> int:
        """U: how many different images the stream can give."""
        return sum(source.num_unique for source in self._sources)

    @property
    def max_bad_fraction(self) -> float:
        """Share of undecodable images above which a run stops."""
        return self._data.max_bad_fraction

    @property
    def datasets(self) -> tuple[ShardDataset, ...]:
        """The sources' data sets, in the order of the configuration."""
        return tuple(source.dataset for source in self._sources)

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the sources' content."""
        text = " ".join(dataset.fingerprint for dataset in self.datasets)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def locate(self, positions: npt.ArrayLike) -> tuple[I64, I64]:
        """(source number, sample number) at every position: the stream's order, without reading an image."""
        where = np.asarray(positions, dtype=np.int64).reshape(-1)
        source_of, rank = self._mixture.locate(where)
        sample_of = np.empty_like(where)
        for number, source in enumerate(self._sources):
            mine = np.flatnonzero(source_of == number)
            if mine.size:
                epochs, slots = np.divmod(rank[mine], source.num_unique)
                sample_of[mine] = source.sample_numbers(slots, epochs)
        return source_of, sample_of

    def _draw(self, where: I64) -> Drawn:
        return self._with_boxes(*self.locate(where), box_draws(make_key("crop", self._seed), where))

    def _with_boxes(self, source_of: I64, sample_of: I64, uniforms: npt.NDArray[np.float64]) -> Drawn:
        """The crops of these samples."""
        height, width = np.empty((2, len(sample_of)), dtype=np.int32)
        for number, source in enumerate(self._sources):
            mine = np.flatnonzero(source_of == number)
            height[mine], width[mine] = source.dataset.sides(sample_of[mine])
        return Drawn(source_of, sample_of, uniforms, height, width, *self._boxes(uniforms, height, width))

    def _boxes(
        self, uniforms: npt.NDArray[np.float64], height: npt.NDArray[np.int32], width: npt.NDArray[np.int32]
    ) -> Boxes:
        """Crops of images of these sides."""
        return draw_boxes(
            uniforms,
            height,
            width,
            scale=self._data.crop_scale,
            ratio=self._data.crop_ratio,
            horizontal_flip=self._data.horizontal_flip,
        )

    def prefix_lengths(self, positions: npt.ArrayLike) -> I64:
        """S at every position, 1..N-1; see `ObjectiveSection.prefix`."""
        where = np.asarray(positions, dtype=np.int64).reshape(-1)
        if self._prefix == "none":
            return np.ones_like(where)
        paired = self._prefix == "paired"
        draw = random_uniform(make_key("prefix", self._seed), where // 2 if paired else where)
        lengths = 1 + np.floor(draw * (self.num_tokens - 1)).astype(np.int64)
        return np.where(where % 2 == 1, self.num_tokens - lengths, lengths) if paired else lengths

    def _draw_prefixes(self, where: I64) -> Columns:
        return (self.prefix_lengths(where),)

    def num_bytes(self, num_images: int) -> int:
        """Most bytes that the pixels of a batch of so many images take."""
        return num_images * self._channels * self._max_pixels

    def batch(self, positions: Sequence[int] | I64, *, into: torch.Tensor | None = None) -> Batch:
        """Samples at any positions, in that order; whatever else is in the batch, each is the same bit for bit.

        Args:
            positions: B of them; consecutive ones cost the least as a `range`.
            into: uint8, `num_bytes(B)` or more: where the pixels go; None takes new memory.

        Raises:
            DataError: a shard cannot be read, or sixteen replacements of one undecodable sample are undecodable too.
        """
        where: range | I64
        if isinstance(positions, range) and positions.step == 1:
            where = positions
        else:
            where = np.asarray(positions, dtype=np.int64).reshape(-1)
        if into is None:
            into = torch.empty(self.num_bytes(len(where)), dtype=torch.uint8)
        return self.batch_in(into, where, *self.fill(self.canvas(into, len(where)), where))

    def canvas(self, flat: torch.Tensor, num_images: int) -> Canvas:
        """For so many images, in a flat buffer of `num_bytes`."""
        rows = self._rows(flat, num_images)
        return Canvas(flat, rows, rows.split(1))

    def fill(self, into: Canvas, where: range | I64) -> tuple[CropLayout | None, tuple[str, ...]]:
        """Write the pixels of `batch` alone; returns what `batch_in` asks for besides."""
        if self._augment_on == "loader":
            bad = self._decode_all(where, into, None)
            if self._data.color_jitter:
                jitter_colours(into.rows[: len(where)], *self._jitter(where))
            return None, bad
        num_bytes = len(where) * self._channels * self._size**2
        resized = self.canvas(torch.empty(num_bytes, dtype=torch.uint8), len(where))
        raw: dict[int, tuple[torch.Tensor, bool]] = {}
        bad = self._decode_all(where, resized, raw)
        crops = [raw[row] if row in raw else (resized.rows[row], False) for row in range(len(where))]
        _, layout = pack(crops, into.flat)
        return layout, bad

    def batch_in(
        self, pixels: torch.Tensor, where: range | I64, layout: CropLayout | None, bad: tuple[str, ...]
    ) -> Batch:
        """The batch at positions `where`, whose pixels `fill` has written into a flat buffer, here or elsewhere."""
        images: torch.Tensor | Crops = self._rows(pixels, len(where))
        if layout is not None:
            num_bytes = int((layout.height.astype(np.int64) * layout.width).sum()) * self._channels
            jitter = Jitter(*self._jitter(where)) if self._data.color_jitter else None
            images = Crops(
                pixels=pixels[:num_bytes], layout=layout, size=self._size, channels=self._channels, jitter=jitter
            )
        return Batch(
            images=images,
            prefix_len=torch.from_numpy(self._prefixes(where)[0].copy()),
            positions=torch.arange(where.start, where.stop) if isinstance(where, range) else torch.from_numpy(where),
            bad_samples=bad,
        )

    def _rows(self, flat: torch.Tensor, num_images: int) -> torch.Tensor:
        """uint8 (B, C, H, W) at the front of a flat buffer."""
        channels, size = self._channels, self._size
        plane = size * size
        # decoded photographs come with interleaved colours, small images from the cache in planes, which jitter needs:
        # keep copies straight
        is_interleaved = size > SMALL_SIDE and not self._data.color_jitter
        strides = (1, size * channels, channels) if is_interleaved else (plane, size, 1)
        return flat.as_strided((num_images, channels, size, size), (channels * plane, *strides))

    def _jitter(self, where: range | I64) -> Jitter:
        return Jitter(make_key("jitter", self._seed), np.asarray(where, dtype=np.int64))

    def _decode_all(
        self, where: range | I64, resized: Canvas, raw: dict[int, tuple[torch.Tensor, bool]] | None
    ) -> tuple[str, ...]:
        """Fill each row of `resized`, or put its crop and flip into `raw`; returns the samples that were replaced."""
        drawn = Drawn._make(self._drawn(where))
        bad: list[str] = []
        pending = np.arange(len(where))
        for attempt in range(MAX_REPLACEMENTS + 1):
            failed: list[int] = []
            for number, source in enumerate(self._sources):
                rows = pending[drawn.source[pending] == number]
                if rows.size:
                    theirs = drawn if len(rows) == len(where) else drawn.of(rows)
                    failed += self._fill_from(source, resized, raw, rows, theirs)
            if not failed:
                return tuple(bad)
            bad += [self._sources[drawn.source[row]].dataset.describe(int(drawn.sample[row])) for row in failed]
            pending = np.array(failed)
            drawn = self._replaced(drawn, pending, np.asarray(where)[pending], attempt)
        raise DataError(
            f"position {where[pending[0]]}: {MAX_REPLACEMENTS} undecodable samples in a row, last {bad[-1]}"
        )

    def _fill_from(
        self, source: Source, resized: Canvas, raw: dict[int, tuple[torch.Tensor, bool]] | None, rows: I64, drawn: Drawn
    ) -> list[int]:
        """`_decode_all` of one source's rows, once; returns the rows whose image did not decode."""
        dataset, samples, boxes = source.dataset, drawn.sample, drawn.boxes
        height, width = drawn.image_height, drawn.image_width
        data = [b""] * len(samples)  # those that are in memory decoded are not read
        fresh = np.flatnonzero(~source.pixels.holds(samples))
        for i, read in zip(fresh.tolist(), dataset.read_many(samples[fresh]), strict=True):
            data[i] = read
        failed: list[int] = []
        is_small = (height <= SMALL_SIDE) & (width <= SMALL_SIDE)
        small, large = np.flatnonzero(is_small), np.flatnonzero(~is_small).tolist()
        shapes = height[small] * (SMALL_SIDE + 1) + width[small]
        for shape in np.unique(shapes) if small.size else ():
            group = small[shapes == shape]
            images, good = source.pixels.stack(samples[group], [data[i] for i in group])
            failed += rows[group[~good]].tolist()
            group = group[good]
            resized.rows[rows[group]] = crop_resize_small(
                images, Boxes(*(values[group] for values in boxes)), self._size
            )
        boxes_of = list(zip(*(values.tolist() for values in boxes), strict=True))
        row_of = rows.tolist()
        decode: Callable[[bytes, int], npt.NDArray[np.uint8]] = decode_interleaved  # raw crops are views of the image
        if raw is None:  # else an image makes room for the next
            most = int((height.astype(np.int64) * width)[large].max(initial=0)) * self._channels
            decode = functools.partial(decode_into, np.empty(most, dtype=np.uint8))
        decoded: list[int] = []
        for i in large:
            try:
                pixels = decode(data[i], self._channels)
            except UndecodableImageError:
                failed.append(row_of[i])
                continue
            decoded.append(i)
            self._place(pixels, boxes_of[i], row_of[i], resized.slots, raw)
        dataset.check(samples[decoded], [data[i] for i in decoded])
        return failed

    def _place(
        self,
        pixels: npt.NDArray[np.uint8],
        box: tuple[int, int, int, int, bool],
        row: int,
        slots: Sequence[torch.Tensor],
        raw: dict[int, tuple[torch.Tensor, bool]] | None,
    ) -> None:
        """Fill slot `row` (1, C, size, size) with an image (H, W, C), or put its crop and flip into `raw`."""
        top, left, height, width, flip = box
        if raw is not None and height * width <= MAX_CROP_PIXELS:
            crop = pixels[top : top + height, left : left + width]
            raw[row] = torch.from_numpy(crop).permute(2, 0, 1), flip
        else:
            crop_resize_into(slots[row], pixels, box)

    def _replaced(self, drawn: Drawn, rows: I64, positions: I64, attempt: int) -> Drawn:
        """With another image of the same source and subset in the place of each row's, by (seed, position, attempt)."""
        sample_of = drawn.sample.copy()
        for row, draw in zip(
            rows, random_bits(make_key("replacement", self._seed), positions * MAX_REPLACEMENTS + attempt), strict=True
        ):
            source = self._sources[drawn.source[row]]
            slot = np.array([draw % np.uint64(source.num_unique)], dtype=np.int64)
            sample_of[row] = source.sample_numbers(slot, np.zeros_like(slot))[0]
        return self._with_boxes(drawn.source, sample_of, drawn.uniforms)
