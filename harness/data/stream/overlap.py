"""Held-out images can never enter training: refuse a pool that holds one, by the checksums in the indexes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from aimscale.harness.data.errors import DataError
from aimscale.harness.data.store.index import ShardDataset


def refuse_overlap(pools: Iterable[ShardDataset], held_out: ShardDataset) -> None:
    """Compare image files by checksum, byte for byte; reads no image and takes seconds for 10^8 of them.

    The whole data sets are compared, whatever subset a run uses, so that growing a run later cannot leak.

    Raises:
        DataError: names the first image that both sides hold, and how many there are.
    """
    wanted = held_out.checksum
    order = np.argsort(wanted)
    wanted = wanted[order]
    for pool in pools:
        checksum = pool.checksum
        nearest = np.minimum(np.searchsorted(wanted, checksum), len(wanted) - 1)
        shared = np.flatnonzero((wanted[nearest] == checksum) & pool.ok)
        if shared.size:
            twin = held_out.describe(int(order[nearest[shared[0]]]))
            raise DataError(
                f"{shared.size} training images of {pool.path} are validation images of {held_out.path} too, first "
                f"{pool.describe(int(shared[0]))} = {twin}; take them out of one side and index it again"
            )
