"""The training stream: image, crop, flip, jitter and prefix length (or mask) at position p, as functions of (seed, p).

Nothing is stored between positions, so any rank, worker or restarted process computes any position in O(1). Which image
stands where: `order`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from aimscale.harness.data import DataError
from aimscale.harness.data.random_access import I64, make_key, random_bits
from aimscale.harness.data.store.decoding import UndecodableImageError, decode_interleaved
from aimscale.harness.data.store.index import ShardDataset
from aimscale.harness.data.stream.augment import BOX, SMALL_SIDE, crop_resize_into, crop_resize_small
from aimscale.harness.data.stream.base import MAX_REPLACEMENTS, Stream, content_digest
from aimscale.harness.data.stream.order import Mixture, open_sources

if TYPE_CHECKING:
    from aimscale.harness.run.config import RunConfig


_DRAWN = np.dtype([("source", "<i4"), ("sample", "<i8"), ("height", "<i4"), ("width", "<i4"), ("box", BOX)])
"""Draws at a position: source number, sample number within it, the image's sides in pixels, and its crop."""
_Drawn = npt.NDArray[Any]


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
        from aimscale.harness.data.stream.unindexed import UnindexedStream  # webdataset is slow to import

        return UnindexedStream(config)
    return TrainStream(config, cache_dir=cache_dir, cache_gb=cache_gb)
