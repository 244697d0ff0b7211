"""Held-out images can never enter training: find those that a pool holds too, by the checksums in the indexes.

What two contents share never changes, so how many images it is is found once and kept in the user's cache.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from aimscale.harness.data import DataError
from aimscale.harness.data.store.index import ShardDataset
from aimscale.harness.run.files import cache_folder, write_text

_TABLE_BITS = 24  # of the checksums; almost all images are told from the held-out ones by one look at the table

Twins = tuple[ShardDataset, npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""A pool, some of its samples, and the held-out samples that are the same files."""


def refuse_overlap(pools: Iterable[ShardDataset], held_out: ShardDataset) -> None:
    """Compare image files by checksum, byte for byte.

    The whole data sets are compared, whatever subset a run uses, so that growing a run later cannot leak.

    Raises:
        DataError: names the first image that both sides hold, and how many there are.
    """
    pools = list(pools)
    if count_shared(pools, held_out):
        found = list(twins(pools, held_out))
        pool, samples, partners = found[0]
        number = sum(len(some) for which, some, _ in found if which is pool)
        raise DataError(
            f"{number} training images of {pool.path} are validation images of {held_out.path} too, first "
            f"{pool.describe(int(samples[0]))} = {held_out.describe(int(partners[0]))}; take them out of one side and "
            "index it again"
        )


def count_shared(pools: Sequence[ShardDataset], held_out: ShardDataset) -> int:
    """Usable held-out images that some pool holds too, byte for byte; the same contents are compared once."""
    contents = " ".join([*sorted(pool.fingerprint for pool in pools), held_out.fingerprint])
    known = cache_folder() / "shared-images" / hashlib.sha256(contents.encode()).hexdigest()[:16]
    with contextlib.suppress(OSError, ValueError):
        return int(known.read_text())
    is_shared = np.zeros(len(held_out), dtype=bool)
    checksums = np.asarray(held_out.checksum)
    found = [checksums[partners] for _, _, partners in twins(pools, held_out)]
    if found:
        is_shared = np.isin(checksums, np.concatenate(found))
        is_shared[held_out.index.bad] = False
    number = int(is_shared.sum())
    with contextlib.suppress(OSError):  # a home that cannot be written costs another look
        write_text(known, f"{number}\n", durable=False)
    return number


def twins(pools: Iterable[ShardDataset], held_out: ShardDataset) -> Iterator[Twins]:
    """Usable pool images that are held out too; reads no image, holds a block of the index in memory at a time."""
    order = np.argsort(held_out.checksum)
    wanted = np.asarray(held_out.checksum)[order]
    table = np.zeros(1 << _TABLE_BITS, dtype=bool)
    table[_low_bits(wanted)] = True
    for pool in pools if len(wanted) else ():
        for first, checksums in pool.index.checksum.blocks():
            likely = np.flatnonzero(table[_low_bits(checksums)])
            nearest = np.minimum(np.searchsorted(wanted, checksums[likely]), len(wanted) - 1)
            same = wanted[nearest] == checksums[likely]
            if same.any():  # few blocks hold a twin, and looking among many bad samples takes long
                same &= ~np.isin(first + likely, pool.index.bad)
            if same.any():
                yield pool, first + likely[same], order[nearest[same]]


def _low_bits(checksums: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    return (checksums & np.uint64((1 << _TABLE_BITS) - 1)).astype(np.int64)
