"""The images that two data sets share, compared by the checksums in their indexes: none held out may enter training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from aimscale.harness.data import DataError
from aimscale.harness.data.random_access import I64
from aimscale.harness.data.store.index import ShardDataset

_TABLE_BITS = 24  # of the checksums; one lookup in the table rules out almost all images

BLOCK_ROWS = 1 << 16
"""Rows of the index that are read at once."""


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
