"""The training stream: which image, crop, flip and prefix length stand at position p, as a pure function of (seed, p).

Nothing is stored between positions, so any rank, worker or restarted process computes any position in O(1). Each
source is walked epoch by epoch, every epoch a fresh permutation of the same U images; sources are interleaved by quota
(after p positions a source of probability q has given p q images, within one), so their epochs stay exact too.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch

from aimscale.harness.data.errors import DataError
from aimscale.harness.data.processes import SharedArray
from aimscale.harness.data.random_access import I64, make_key, permute, random_bits, random_uniform
from aimscale.harness.data.store.decoding import UndecodableImageError, decode_interleaved, decode_into
from aimscale.harness.data.store.index import ShardDataset, open_dataset, require_channels
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
from aimscale.harness.data.stream.overlap import refuse_overlap
from aimscale.harness.data.stream.pixel_cache import PixelCache
from aimscale.harness.data.stream.stretch import Columns, Stretch

if TYPE_CHECKING:
    from aimscale.harness.run.config import RunConfig

_MAX_LISTED = 1 << 22  # subsets up to this size are listed at start-up, which takes 2 s and spares a permutation later
MAX_REPLACEMENTS = 16  # tries of one position before the stream gives up


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    """One data set of the mixture."""

    dataset: ShardDataset
    num_unique: int
    """U of this source: the first of the fixed permutation of its pool."""
    subset: SharedArray | None
    """Those U sample numbers; None when they are too many to list at start-up."""
    key: int
    """Of its epochs; depends on the run's seed."""
    pixels: PixelCache

    def sample_numbers(self, slots: I64, epochs: I64) -> I64:
        """Sample numbers at `slots` (0..U-1) of `epochs`."""
        keys = random_bits(self.key, epochs)
        within = permute(slots, self.num_unique, keys)
        return self.subset.values[within] if self.subset is not None else _first_of_pool(self.dataset, within)


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
        sources = config.training.data.sources
        self._mixture = Mixture([source.probability for source in sources])
        datasets = [open_dataset(source.path, cache_dir=cache_dir, cache_gb=cache_gb) for source in sources]
        for source, dataset in zip(sources, datasets, strict=True):
            if source.fingerprint not in (None, dataset.fingerprint):
                raise DataError(
                    f"{source.path} holds other images (fingerprint {dataset.fingerprint}) than those this run trains "
                    f"on ({source.fingerprint}); put those back, or launch the sweep again to train a new run on these"
                )
        held_out = open_dataset(config.evaluation.validation.path, cache_dir=cache_dir, cache_gb=cache_gb)
        refuse_overlap(datasets, held_out)
        self._sources = [
            _Source(
                dataset=dataset,
                num_unique=num_unique,
                subset=SharedArray(_first_of_pool(dataset, np.arange(num_unique)))
                if num_unique <= _MAX_LISTED
                else None,
                key=make_key("epoch", self._seed, number),
                pixels=PixelCache(dataset, self._channels),
            )
            for number, (dataset, num_unique) in enumerate(
                zip(datasets, self._unique_per_source(datasets), strict=True)
            )
        ]

        if augment_on == "device":
            largest = max(dataset.info.max_pixels for dataset in datasets)
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
    def hands_out_crops(self) -> bool:
        """Whether the device resizes."""
        return self._augment_on == "device"

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

    def _draw(self, where: I64) -> Columns:
        """`locate`, and what the crops' boxes are made of."""
        return *self.locate(where), box_draws(make_key("crop", self._seed), where)

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
            positions: B of them.
            into: uint8, `num_bytes(B)` or more: where the pixels go; None takes new memory.

        Raises:
            DataError: a shard cannot be read, or sixteen replacements of one undecodable sample are undecodable too.
        """
        where = np.asarray(positions, dtype=np.int64).reshape(-1)
        if into is None:
            into = torch.empty(self.num_bytes(len(where)), dtype=torch.uint8)
        if self._augment_on == "loader":
            bad = self._decode_all(where, self._rows(into, len(where)), None)
            if self._data.color_jitter:
                jitter_colours(self._rows(into, len(where)), *self._jitter(where))
            return self.batch_in(into, where, None, bad)
        resized = self._rows(torch.empty(len(where) * self._channels * self._size**2, dtype=torch.uint8), len(where))
        raw: dict[int, tuple[torch.Tensor, bool]] = {}
        bad = self._decode_all(where, resized, raw)
        _, layout = pack([raw[row] if row in raw else (resized[row], False) for row in range(len(where))], into)
        return self.batch_in(into, where, layout, bad)

    def batch_in(self, pixels: torch.Tensor, where: I64, layout: CropLayout | None, bad: tuple[str, ...]) -> Batch:
        """The batch at positions `where`, whose pixels `batch` has written into a flat buffer, here or elsewhere."""
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
            positions=torch.from_numpy(where),
            bad_samples=bad,
        )

    def _rows(self, flat: torch.Tensor, num_images: int) -> torch.Tensor:
        """uint8 (B, C, H, W) at the front of a flat buffer."""
        shape = (num_images, self._channels, self._size, self._size)
        images = flat[: num_images * self._channels * self._size**2]
        # decoded photographs come with interleaved colours, small images from the cache in planes, which jitter needs:
        # keep copies straight
        if self._size > SMALL_SIDE and not self._data.color_jitter:
            return images.view(num_images, self._size, self._size, self._channels).permute(0, 3, 1, 2)
        return images.view(shape)

    def _jitter(self, where: I64) -> Jitter:
        return Jitter(make_key("jitter", self._seed), where)

    def _decode_all(
        self, where: I64, resized: torch.Tensor, raw: dict[int, tuple[torch.Tensor, bool]] | None
    ) -> tuple[str, ...]:
        """Fill each row of `resized`, or put its crop and flip into `raw`; returns the samples that were replaced."""
        source_of, sample_of, draws = self._drawn(where)
        bad: list[str] = []
        pending = np.arange(len(where))
        for attempt in range(MAX_REPLACEMENTS + 1):
            failed: list[int] = []
            for number, source in enumerate(self._sources):
                rows = pending[source_of[pending] == number]
                if rows.size:
                    failed += self._fill(resized, raw, rows, source, sample_of[rows], draws[rows])
            if not failed:
                return tuple(bad)
            bad += [self._sources[source_of[row]].dataset.describe(int(sample_of[row])) for row in failed]
            pending, sample_of = np.array(failed), sample_of.copy()
            self._replace(pending, where, source_of, sample_of, attempt)
        raise DataError(
            f"position {where[pending[0]]}: {MAX_REPLACEMENTS} undecodable samples in a row, last {bad[-1]}"
        )

    def _fill(
        self,
        resized: torch.Tensor,
        raw: dict[int, tuple[torch.Tensor, bool]] | None,
        rows: I64,
        source: _Source,
        samples: I64,
        draws: npt.NDArray[np.float64],
    ) -> list[int]:
        """`_decode_all` of one source's rows, once; returns the rows whose image did not decode."""
        dataset = source.dataset
        height, width = dataset.sides(samples)
        boxes = draw_boxes(
            draws,
            height,
            width,
            scale=self._data.crop_scale,
            ratio=self._data.crop_ratio,
            horizontal_flip=self._data.horizontal_flip,
        )
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
            resized[rows[group]] = crop_resize_small(images, Boxes(*(values[group] for values in boxes)), self._size)
        boxes_of = list(zip(*(values.tolist() for values in boxes), strict=True))
        slots, row_of = resized.split(1), rows.tolist()
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
            self._place(pixels, boxes_of[i], row_of[i], slots, raw)
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

    def _replace(self, rows: I64, positions: I64, source_of: I64, sample_of: I64, attempt: int) -> None:
        """Put another image of the same source and subset in the place of each row's, chosen by (seed, p, attempt)."""
        key = make_key("replacement", self._seed)
        for row in rows:
            source = self._sources[source_of[row]]
            draw = random_bits(key, positions[row : row + 1] * MAX_REPLACEMENTS + attempt)
            slot = (draw % np.uint64(source.num_unique)).astype(np.int64)
            sample_of[row] = source.sample_numbers(slot, np.zeros_like(slot))[0]

    def _unique_per_source(self, datasets: Sequence[ShardDataset]) -> list[int]:
        for dataset in datasets:
            num_bad = dataset.info.num_bad
            if not dataset.num_usable or num_bad / len(dataset) > self._data.max_bad_fraction:
                first = dataset.describe(int(dataset.index.bad[0]))
                raise DataError(
                    f"{dataset.path}: {num_bad} of {len(dataset)} images cannot be decoded, first {first}; "
                    f"repair them or raise data.max_bad_fraction ({self._data.max_bad_fraction:g})"
                )
        wanted = self._data.unique_images
        if wanted is None:
            return [dataset.num_usable for dataset in datasets]
        counts = self._mixture.counts(wanted)
        for dataset, count in zip(datasets, counts, strict=True):
            if not 1 <= count <= dataset.num_usable:
                raise DataError(
                    f"unique_images {wanted} takes {count} images of {dataset.path}, which has {dataset.num_usable} "
                    f"usable ones; {'lower' if count else 'raise'} data.unique_images or change the probabilities"
                )
        return counts


def _first_of_pool(dataset: ShardDataset, numbers: I64) -> I64:
    """Sample numbers at `numbers` of the one fixed permutation of the usable images, the same for every seed."""
    return dataset.usable(permute(numbers, dataset.num_usable, make_key("subset")))
