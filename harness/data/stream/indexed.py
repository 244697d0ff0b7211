"""The stream of indexed data sets: which image stands at position p is a pure function of (seed, p); see `order`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from aimscale.harness.data import DataError
from aimscale.harness.data.random_access import I64, make_key, random_bits
from aimscale.harness.data.store.decoding import UndecodableImageError, decode_interleaved
from aimscale.harness.data.store.index import ShardDataset, open_dataset
from aimscale.harness.data.store.shards import is_url
from aimscale.harness.data.stream.augment import SMALL_SIDE, Boxes, box_uniforms, crop_resize_into, crop_resize_small
from aimscale.harness.data.stream.base import MAX_REPLACEMENTS, PositionCache, Stream, content_digest
from aimscale.harness.data.stream.held_out import refuse_overlap
from aimscale.harness.data.stream.order import Mixture, SourceOrder

if TYPE_CHECKING:
    from aimscale.harness.data.store.dataset_info import DatasetInfo
    from aimscale.harness.run.config import DataSection, RunConfig, SourceSection

_SHARDS_AHEAD = 8  # shards that are fetched before they are needed


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    """Data set of the mixture."""

    dataset: ShardDataset
    order: SourceOrder
    """Order of its usable images."""
    positions_ahead: int
    """Distance, in positions, at which whole shards are fetched ahead; 0 if this machine will read less than half of a
    shard's images while the shard is in its cache."""

    def sample_numbers(self, slots: I64, epochs: I64) -> I64:
        """Return the sample numbers at `slots` (0..U-1) of `epochs`."""
        return self.dataset.usable(self.order.numbers(slots, epochs))


class _Drawn(NamedTuple):
    """Draws at some positions, one row each."""

    source: I64
    """Source numbers."""
    sample: I64
    """Sample numbers within the source."""
    uniforms: npt.NDArray[np.float64]
    """Uniform numbers that the boxes are made of, (rows, some)."""
    image_height: npt.NDArray[np.int32]
    """Heights before the crop, pixels."""
    image_width: npt.NDArray[np.int32]
    """Widths before the crop, pixels."""
    top: I64
    """Crops, with the four fields below as in `Boxes`."""
    left: I64
    height: I64
    width: I64
    flip: npt.NDArray[np.bool_]

    @property
    def boxes(self) -> Boxes:
        """Crop boxes."""
        return Boxes._make(self[-len(Boxes._fields) :])

    def select(self, rows: I64) -> _Drawn:
        """Select some rows."""
        return _Drawn._make(column[rows] for column in self)


class TrainStream(Stream):
    """Stream of a run on indexed data sets."""

    def __init__(
        self, config: RunConfig, *, cache_dir: str | None = None, cache_gb: float = 100.0, machines: int = 1
    ) -> None:
        """Open the sources; `machines` share the reading, each with a cache of its own."""
        super().__init__(config)
        self._mixture = Mixture([source.probability for source in config.training.data.sources])
        self._sources = _open_sources(config, cache_dir, cache_gb, machines)
        self.unique_images = sum(source.order.num_unique for source in self._sources)
        self.datasets = tuple(source.dataset for source in self._sources)
        self.fingerprint = content_digest(dataset.fingerprint for dataset in self.datasets)
        self._drawn = PositionCache(self._draw)
        self._located_ahead, self._located_later = PositionCache(self.locate), PositionCache(self.locate)

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
        """Start to read what `fill` will next be called for, and fetch later positions' shards into the cache if that
        pays."""
        source_of, sample_of = self._located_ahead(where)
        ahead = max((source.positions_ahead for source in self._sources), default=0)
        later_source_of, later = (
            self._located_later(range(where.start + ahead, where.stop + ahead)) if ahead else ((), ())
        )
        for number, source in enumerate(self._sources):
            samples, whole = sample_of[source_of == number], sample_of[:0]
            if source.positions_ahead:
                whole = np.concatenate([samples, later[later_source_of == number]])
            source.dataset.read_ahead(samples[source.dataset.is_uncached(samples, self._channels)], whole)

    def _draw(self, where: I64) -> _Drawn:
        return self._with_boxes(*self.locate(where), box_uniforms(make_key("crop", self._seed), where))

    def _with_boxes(self, source_of: I64, sample_of: I64, uniforms: npt.NDArray[np.float64]) -> _Drawn:
        """Add the crops of these samples."""
        height, width = np.empty((2, len(sample_of)), dtype=np.int32)
        for number, source in enumerate(self._sources):
            mine = np.flatnonzero(source_of == number)
            height[mine], width[mine] = source.dataset.sides(sample_of[mine])
        return _Drawn(source_of, sample_of, uniforms, height, width, *self._boxes(uniforms, height, width))

    def _decode(self, images: torch.Tensor, where: range | I64) -> tuple[str, ...]:
        drawn = _Drawn._make(self._drawn(where))
        bad: list[str] = []
        pending = np.arange(len(where))
        for attempt in range(MAX_REPLACEMENTS + 1):
            failed: list[int] = []
            for number, source in enumerate(self._sources):
                mine = np.flatnonzero(drawn.source == number)
                if mine.size:
                    theirs = drawn if len(mine) == len(pending) else drawn.select(mine)
                    problems = self._decode_from(source, images, pending[mine], theirs)
                    failed += mine[list(problems)].tolist()
                    bad += [source.dataset.describe(int(theirs.sample[i]), why) for i, why in problems.items()]
            if not failed:
                return tuple(bad)
            pending = pending[failed]
            drawn = self._replaced(drawn.select(np.array(failed)), np.asarray(where)[pending], attempt)
        raise DataError(
            f"position {where[pending[0]]}: {MAX_REPLACEMENTS} undecodable samples in a row, last {bad[-1]}"
        )

    def _decode_from(self, source: _Source, images: torch.Tensor, rows: I64, drawn: _Drawn) -> dict[int, str]:
        """Fill `rows` of `images` from one source; returns the reasons of those of `drawn` that do not decode."""
        dataset, height, width = source.dataset, drawn.image_height, drawn.image_width
        data = dataset.read_uncached(drawn.sample, self._channels)
        problems: dict[int, str] = {}
        is_small = (height <= SMALL_SIDE) & (width <= SMALL_SIDE)
        small, large = np.flatnonzero(is_small), np.flatnonzero(~is_small).tolist()
        shapes = height[small] * (SMALL_SIDE + 1) + width[small]
        for shape in np.unique(shapes) if small.size else ():
            group = small[shapes == shape]
            whole, wrong = dataset.decode_many(drawn.sample[group], [data[i] for i in group], self._channels)
            problems |= {int(group[i]): reason for i, reason in wrong.items()}
            group = np.delete(group, list(wrong))
            boxes = Boxes(*(values[group] for values in drawn.boxes))
            images[rows[group]] = crop_resize_small(whole, boxes, self._size)
        box_of = list(zip(*(values.tolist() for values in drawn.boxes), strict=True))
        decoded: list[int] = []
        sides: list[tuple[int, ...]] = []
        for i in large:
            try:
                pixels = decode_interleaved(data[i], self._channels)
            except UndecodableImageError as error:
                problems[i] = str(error)
                continue
            decoded.append(i)
            sides.append(pixels.shape[:2])
            if sides[-1] != (height[i], width[i]):
                break  # `check` refuses it
            crop_resize_into(images[rows[i] : rows[i] + 1], pixels, box_of[i])
        dataset.check(drawn.sample[decoded], [data[i] for i in decoded], sides)
        return problems

    def _replaced(self, drawn: _Drawn, positions: I64, attempt: int) -> _Drawn:
        """Replace each sample by another of the same source and subset, chosen by (seed, position, attempt)."""
        sample_of = drawn.sample.copy()
        draws = random_bits(make_key("replacement", self._seed), positions * MAX_REPLACEMENTS + attempt)
        for row, (number, draw) in enumerate(zip(drawn.source, draws, strict=True)):
            source = self._sources[number]
            slot = np.array([draw % np.uint64(source.order.num_unique)], dtype=np.int64)
            sample_of[row] = source.sample_numbers(slot, np.zeros_like(slot))[0]
        return self._with_boxes(drawn.source, sample_of, drawn.uniforms)


def _open_sources(config: RunConfig, cache_dir: str | None, cache_gb: float, machines: int) -> list[_Source]:
    """Open the sources of a run, in the order of its configuration; see `TrainStream` for what is refused."""
    training = config.training
    datasets = [open_dataset(source.path, cache_dir=cache_dir, cache_gb=cache_gb) for source in training.data.sources]
    for source, dataset in zip(training.data.sources, datasets, strict=True):
        require_fingerprint(source, dataset.info)
    held_out = open_dataset(config.evaluation.validation.path, cache_dir=cache_dir, cache_gb=cache_gb)
    refuse_overlap(datasets, held_out)
    counts = unique_per_source(training.data, [dataset.info for dataset in datasets])
    found: list[_Source] = []
    for number, (source, dataset, num_unique) in enumerate(zip(training.data.sources, datasets, counts, strict=True)):
        fits = dataset.index.shards["size"].sum() <= cache_gb * 1e9
        num_reads = max(num_unique, max(config.evaluation.budgets) * source.probability if fits else 0)
        pays = cache_dir is not None and is_url(dataset.location) and num_reads / machines >= len(dataset) / 2
        order = SourceOrder(
            num_images=dataset.info.num_usable,
            num_shards=dataset.info.num_shards,
            num_unique=num_unique,
            num_lanes=math.ceil(training.data.shuffle_shards * source.probability),
            key=make_key("epoch", training.seed, number),
        )
        ahead = math.ceil(_SHARDS_AHEAD * dataset.info.num_usable / dataset.info.num_shards / source.probability)
        found.append(_Source(dataset=dataset, order=order, positions_ahead=ahead if pays else 0))
    return found


def require_fingerprint(source: SourceSection, info: DatasetInfo) -> None:
    """Raise DataError if a data set is not the one that a run was planned with."""
    if source.fingerprint not in (None, info.fingerprint):
        raise DataError(
            f"{source.path} holds other images (fingerprint {info.fingerprint}) than those this run trains "
            f"on ({source.fingerprint}); put those back, or launch the sweep again to train a new run on these"
        )


def unique_per_source(data: DataSection, infos: Sequence[DatasetInfo]) -> list[int]:
    """Return U of every source, given the infos of their data sets."""
    for source, info in zip(data.sources, infos, strict=True):
        if not info.num_usable or info.num_bad / info.num_samples > data.max_bad_fraction:
            raise DataError(
                f"{source.path}: {info.num_bad} of {info.num_samples} images cannot be decoded (`aimscale data info` "
                f"names some); repair them or raise data.max_bad_fraction ({data.max_bad_fraction:g})"
            )
    if data.unique_images is None:
        return [info.num_usable for info in infos]
    counts = Mixture([source.probability for source in data.sources]).counts(data.unique_images)
    for source, info, count in zip(data.sources, infos, counts, strict=True):
        if not 1 <= count <= info.num_usable:
            raise DataError(
                f"unique_images {data.unique_images} takes {count} images of {source.path}, which has "
                f"{info.num_usable} usable ones; {'lower' if count else 'raise'} data.unique_images or change the "
                "probabilities"
            )
    return counts
