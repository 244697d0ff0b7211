"""The order of a stream's images: its data sets, and in closed form the source at a position, and its image.

Sources are interleaved by quota: after p positions, a source of probability q has taken p q images, within one. Each
source is traversed epoch by epoch; every epoch is a fresh shuffle of the same U images, which reads shards one after
another, some of them side by side. No held-out image may be among them (`refuse_overlap`), by the checksums in indexes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from aimscale.harness.data import DataError
from aimscale.harness.data.random_access import I64, U64, make_key, permute, random_bits
from aimscale.harness.data.store.dataset_info import DatasetInfo, require_usable
from aimscale.harness.data.store.index import ShardDataset, open_dataset
from aimscale.harness.data.store.shards import is_url

if TYPE_CHECKING:
    from aimscale.harness.run.config import DataSection, RunConfig, SourceSection


_HALF = np.uint64(32)
_SHARDS_AHEAD = 8  # shards that are fetched before they are needed
_UNITS = 1 << 20  # probabilities are rounded to multiples of 2^-20, so that positions may reach 2^42
_TABLE_BITS = 24  # of the checksums; one lookup in the table rules out almost all images
BLOCK_ROWS = 1 << 16
"""Rows of the index that are read at once."""


class Mixture:
    """Interleaving of sources with probabilities that add up to 1: by quota, not by independent draws.

    The first source takes position p if floor(p q + 1/2) steps up there; the remaining positions, renumbered, are
    divided among the other sources in the same way. So how often a source came up before p is known at once, as O(1)
    resuming and exact epochs need.
    """

    def __init__(self, probabilities: Sequence[float]) -> None:
        units = [max(1, round(probability * _UNITS)) for probability in probabilities]
        self._quotas = [(units[number], sum(units[number:])) for number in range(len(units))]

    def locate(self, positions: I64) -> tuple[I64, I64]:
        """Return (source number, number of earlier positions of the same source) at every position."""
        source_of, rank = np.full_like(positions, len(self._quotas) - 1), positions.copy()
        pending = np.arange(len(positions))
        for number, (units, total) in enumerate(self._quotas[:-1]):
            before = _taken(rank[pending], units, total)
            takes = _taken(rank[pending] + 1, units, total) > before
            source_of[pending[takes]] = number
            rank[pending[~takes]] -= before[~takes]
            rank[pending[takes]] = before[takes]
            pending = pending[~takes]
        return source_of, rank

    def counts(self, num_positions: int) -> list[int]:
        """Count the first `num_positions` positions by source."""
        counts, remaining = [], num_positions
        for units, total in self._quotas:
            counts.append((remaining * units + total // 2) // total)
            remaining -= counts[-1]
        return counts


def _taken(positions: I64, units: int, total: int) -> I64:
    """Count the first positions that a source with `units` of `total` takes."""
    return (positions * units + total // 2) // total


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceOrder:
    """Order of one source's images, numbered as they lie in its shards.

    The pool is cut into blocks of consecutive images, of a shard's mean size, so that a block lies in about two shards;
    a remainder of less than a block belongs to none. One fixed order, the same for every seed, takes an image of each
    block in turn, and the remainder last: its first U images hold `U // num_blocks` of every block, or one more.

    An epoch reads `num_lanes` lanes side by side: each round takes one image of every lane, starting with a random
    lane. Laid end to end, the lanes hold the blocks in an order drawn for the epoch, with each block's images shuffled.
    Lanes start at points spread evenly over a block, so that they do not all change blocks at once: within each block's
    worth of rounds, they change one after the other.
    """

    num_images: int
    """Number of images of the pool."""
    num_shards: int
    """Number of shards of the pool."""
    num_unique: int
    """U: number of images of an epoch, the first of the fixed order."""
    num_lanes: int
    """Number of blocks that are read side by side; a source with no more blocks is shuffled as a whole."""
    key: int
    """Random key of the epochs; depends on the run's seed."""

    def numbers(self, slots: I64, epochs: I64) -> I64:
        """Return the numbers (0..num_images-1) of the images at `slots` (0..U-1) of `epochs`."""
        num_blocks, size = self._blocks
        keys = random_bits(self.key, epochs)
        block_size = self.num_unique // num_blocks
        if num_blocks <= self.num_lanes or not block_size:
            return self._dealt(permute(slots, self.num_unique, keys))
        along = self._along_lanes(slots, keys, block_size)
        turns, within = np.divmod(along, block_size)
        blocks = permute(turns % num_blocks, num_blocks, ~keys)
        within = permute(within, block_size, _keys(keys, blocks))
        numbers = blocks * size + within if block_size == size else self._image(blocks, within)
        if (rest := np.flatnonzero(turns >= num_blocks)).size:  # one more image of some blocks, or of none
            first = num_blocks * block_size
            numbers[rest] = self._dealt(first + permute(along[rest] - first, self.num_unique - first, keys[rest]))
        return numbers

    @functools.cached_property
    def _blocks(self) -> tuple[int, int]:
        """Number of blocks, and images in each."""
        size = max(1, self.num_images // self.num_shards)
        return self.num_images // size, size

    def _dealt(self, ranks: I64) -> I64:
        """Return the images at `ranks` of the fixed order."""
        num_blocks, size = self._blocks
        rounds, columns = np.divmod(ranks, num_blocks)
        dealt = self._image(permute(columns, num_blocks, make_key("blocks")), rounds % size)
        return np.where(rounds < size, dealt, ranks)

    def _image(self, blocks: I64, rounds: I64) -> I64:
        """Return the image that each block gives in a round of the fixed order."""
        _, size = self._blocks
        return blocks * size + permute(rounds, size, _keys(make_key("subset"), blocks))

    def _along_lanes(self, slots: I64, keys: U64, block_size: int) -> I64:
        """Return the places (0..U-1) along the lanes, laid end to end, with `each` images of every block."""
        length = self.num_unique // self.num_lanes
        rounds, turns = np.divmod(slots, self.num_lanes)
        lanes = (turns + (random_bits(keys, rounds) >> _HALF).astype(np.int64)) % self.num_lanes
        start = (lanes * block_size // self.num_lanes - lanes * length) % block_size
        return np.where(rounds < length, lanes * length + (rounds + start) % length, slots)


def _keys(key: int | U64, numbers: I64) -> U64:
    """Derive a key for each number; number 0 keeps the key itself."""
    return np.uint64(key) ^ numbers.astype(np.uint64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Data set of the mixture."""

    dataset: ShardDataset
    order: SourceOrder
    """Order of its usable images."""
    positions_ahead: int
    """Distance, in positions, at which shards are fetched ahead; 0 for local ones."""

    def sample_numbers(self, slots: I64, epochs: I64) -> I64:
        """Return the sample numbers at `slots` (0..U-1) of `epochs`."""
        return self.dataset.usable(self.order.numbers(slots, epochs))


def open_sources(config: RunConfig, cache_dir: str | None, cache_gb: float) -> list[Source]:
    """Open the sources of a run, in the order of its configuration."""
    training = config.training
    datasets = [open_dataset(source.path, cache_dir=cache_dir, cache_gb=cache_gb) for source in training.data.sources]
    for source, dataset in zip(training.data.sources, datasets, strict=True):
        require_fingerprint(source, dataset.info)
    held_out = open_dataset(config.evaluation.validation.path, cache_dir=cache_dir, cache_gb=cache_gb)
    refuse_overlap(datasets, held_out)
    counts = unique_per_source(training.data, [dataset.info for dataset in datasets])
    sources = []
    for number, (source, dataset, num_unique) in enumerate(zip(training.data.sources, datasets, counts, strict=True)):
        info = dataset.info
        order = SourceOrder(
            num_images=info.num_usable,
            num_shards=info.num_shards,
            num_unique=num_unique,
            num_lanes=math.ceil(training.data.shuffle_shards * source.probability),
            key=make_key("epoch", training.seed, number),
        )
        ahead = math.ceil(_SHARDS_AHEAD * info.num_usable / info.num_shards / source.probability)
        sources.append(Source(dataset=dataset, order=order, positions_ahead=ahead if is_url(dataset.location) else 0))
    return sources


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
        require_usable(source.path, info, data.max_bad_fraction)
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


def refuse_overlap(pools: Iterable[ShardDataset], held_out: ShardDataset) -> None:
    """Raise DataError if an image of the whole training data, whatever subset a run uses, is held out, by checksums of
    files."""
    for pool in pools:
        if shared := list(shared_images(pool, held_out)):
            number, (samples, partners) = sum(len(samples) for samples, _ in shared), shared[0]
            raise DataError(
                f"{number} training images of {pool.path} are validation images of {held_out.path} too, first "
                f"{pool.describe(int(samples[0]))} = {held_out.describe(int(partners[0]))}; take them out of one side "
                "and index it again"
            )


def count_shared(pool: ShardDataset, held_out: ShardDataset) -> int:
    """Count the usable held-out images that a pool holds too, byte for byte."""
    checksums = held_out.index.checksum
    parts = [checksums[partners] for _, partners in shared_images(pool, held_out)]
    is_shared = np.isin(checksums, np.concatenate([checksums[:0], *parts]))
    is_shared[held_out.index.bad] = False
    return int(is_shared.sum())


def shared_images(pool: ShardDataset, held_out: ShardDataset) -> Iterator[tuple[I64, I64]]:
    """Yield the usable images of a pool that are held out too, and the held-out samples that are the same files; reads
    no image, and holds a block of the index in memory at a time."""
    order = np.argsort(held_out.index.checksum)
    wanted = held_out.index.checksum[order]
    table = np.zeros(1 << _TABLE_BITS, dtype=bool)
    table[_low_bits(wanted)] = True
    for first in range(0, len(pool) if len(wanted) else 0, BLOCK_ROWS):
        checksums = pool.index.checksum[first : first + BLOCK_ROWS]
        likely = np.flatnonzero(table[_low_bits(checksums)])
        nearest = np.minimum(np.searchsorted(wanted, checksums[likely]), len(wanted) - 1)
        same = wanted[nearest] == checksums[likely]
        if same.any():  # few blocks share an image, and searching many bad samples takes long
            same &= ~np.isin(first + likely, pool.index.bad)
        if same.any():
            yield first + likely[same], order[nearest[same]]


def _low_bits(checksums: npt.NDArray[np.uint64]) -> I64:
    return (checksums & np.uint64((1 << _TABLE_BITS) - 1)).astype(np.int64)
