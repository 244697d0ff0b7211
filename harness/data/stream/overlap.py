"""Held-out images can never enter training: refuse a pool that holds one, by the checksums in the indexes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from aimscale.harness.data.errors import DataError
from aimscale.harness.data.store.index import ShardDataset

_TABLE_BITS = 24  # of the checksums; almost all images are told from the held-out ones by one look at the table


def refuse_overlap(pools: Iterable[ShardDataset], held_out: ShardDataset) -> None:
    """Compare image files by checksum, byte for byte; reads no image, holds a block of the index in memory at a time.

    The whole data sets are compared, whatever subset a run uses, so that growing a run later cannot leak.

    Raises:
        DataError: names the first image that both sides hold, and how many there are.
    """
    wanted = held_out.checksum
    order = np.argsort(wanted)
    wanted = np.asarray(wanted)[order]
    table = np.zeros(1 << _TABLE_BITS, dtype=bool)
    table[_low_bits(wanted)] = True
    for pool in pools:
        num_shared, twins = 0, (0, 0)
        for first, checksums in pool.index.checksum.blocks():
            likely = np.flatnonzero(table[_low_bits(checksums)])
            nearest = np.minimum(np.searchsorted(wanted, checksums[likely]), len(wanted) - 1)
            same = wanted[nearest] == checksums[likely]
            samples, partners = first + likely[same], order[nearest[same]]
            decodes = ~np.isin(samples, pool.index.bad)
            if decodes.any() and not num_shared:
                twins = int(samples[decodes][0]), int(partners[decodes][0])
            num_shared += int(decodes.sum())
        if num_shared:
            raise DataError(
                f"{num_shared} training images of {pool.path} are validation images of {held_out.path} too, first "
                f"{pool.describe(twins[0])} = {held_out.describe(twins[1])}; take them out of one side and index it "
                "again"
            )


def count_shared(pools: Iterable[ShardDataset], held_out: ShardDataset) -> int:
    """Usable held-out images that some pool holds too, byte for byte; compared as by `refuse_overlap`."""
    checksums = np.delete(np.asarray(held_out.checksum), held_out.index.bad)
    wanted, place = np.unique(checksums, return_inverse=True)
    is_shared = np.zeros(len(wanted), dtype=bool)
    table = np.zeros(1 << _TABLE_BITS, dtype=bool)
    table[_low_bits(wanted)] = True
    for pool in pools if len(wanted) else ():
        for first, block in pool.index.checksum.blocks():
            likely = np.flatnonzero(table[_low_bits(block)])
            nearest = np.minimum(np.searchsorted(wanted, block[likely]), len(wanted) - 1)
            same = (wanted[nearest] == block[likely]) & ~np.isin(first + likely, pool.index.bad)
            is_shared[nearest[same]] = True
    return int(is_shared[place].sum())


def _low_bits(checksums: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    return (checksums & np.uint64((1 << _TABLE_BITS) - 1)).astype(np.int64)
