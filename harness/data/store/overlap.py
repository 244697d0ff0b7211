"""The images that two data sets share, compared by the checksums in their indexes: none held out may enter training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from aimscale.harness.data import DataError
from aimscale.harness.data.store.columns import BLOCK_ROWS
from aimscale.harness.data.store.index import ShardDataset
from aimscale.harness.run.files import cache_folder

_TABLE_BITS = 24  # of the checksums; one lookup in the table rules out almost all images

SharedImages = tuple[ShardDataset, npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Pool, some of its samples, and the held-out samples that are the same files."""


def refuse_overlap(pools: Iterable[ShardDataset], held_out: ShardDataset) -> None:
    """Raise DataError if a training image is held out, comparing image files by checksum.

    The whole data sets are compared, whatever subset a run uses, so that a later extension of the run cannot leak. Two
    that share nothing are remembered on this machine, by their fingerprints: the ranks of a run need not compare what
    its plan has compared.

    Raises:
        DataError: names the first image that both sides hold, and how many there are.
    """
    for pool in pools:
        known = cache_folder() / "disjoint" / f"{pool.fingerprint}-{held_out.fingerprint}"
        if known.exists():
            continue
        if found := list(shared_images([pool], held_out)):
            _, samples, partners = found[0]
            raise DataError(
                f"{sum(len(some) for _, some, _ in found)} training images of {pool.path} are validation images of "
                f"{held_out.path} too, first {pool.describe(int(samples[0]))} = {held_out.describe(int(partners[0]))}; "
                "take them out of one side and index it again"
            )
        try:
            known.parent.mkdir(parents=True, exist_ok=True)
            known.touch()
        except OSError:
            pass  # compared again next time


def count_shared(pools: Sequence[ShardDataset], held_out: ShardDataset) -> int:
    """Count the usable held-out images that some pool holds too, byte for byte."""
    is_shared = np.zeros(len(held_out), dtype=bool)
    checksums = held_out.index.checksum
    found = [checksums[partners] for _, _, partners in shared_images(pools, held_out)]
    if found:
        is_shared = np.isin(checksums, np.concatenate(found))
        is_shared[held_out.index.bad] = False
    return int(is_shared.sum())


def shared_images(pools: Iterable[ShardDataset], held_out: ShardDataset) -> Iterator[SharedImages]:
    """Yield the usable pool images that are held out too; reads no image, and holds a block of the index in memory at a
    time."""
    order = np.argsort(held_out.index.checksum)
    wanted = held_out.index.checksum[order]
    table = np.zeros(1 << _TABLE_BITS, dtype=bool)
    table[_low_bits(wanted)] = True
    for pool in pools if len(wanted) else ():
        for first in range(0, len(pool), BLOCK_ROWS):
            checksums = pool.index.checksum[first : first + BLOCK_ROWS]
            likely = np.flatnonzero(table[_low_bits(checksums)])
            nearest = np.minimum(np.searchsorted(wanted, checksums[likely]), len(wanted) - 1)
            same = wanted[nearest] == checksums[likely]
            if same.any():  # few blocks share an image, and searching many bad samples takes long
                same &= ~np.isin(first + likely, pool.index.bad)
            if same.any():
                yield pool, first + likely[same], order[nearest[same]]


def _low_bits(checksums: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    return (checksums & np.uint64((1 << _TABLE_BITS) - 1)).astype(np.int64)
