"""The orders in which an image's patches are read and predicted (paper, section 5.2, "Autoregression pattern").

An order is a tuple whose t-th entry is the raster index (row * grid + column) of the patch at sequence position t. The
paper names the four patterns without defining them; the definitions of the last three are ours.
"""

from __future__ import annotations

import hashlib

from aimscale.aim.config import PatchOrder


def patch_order(order: PatchOrder, grid: int) -> tuple[int, ...]:
    """Raster indices of the `grid` x `grid` patches in sequence order.

    - `raster`: row by row from the top left;
    - `spiral`: clockwise from the top-left corner inwards;
    - `checkerboard`: the "black" cells, those with an even row + column, in raster order, then the "white" ones;
    - `random`: one fixed permutation for each grid, the same on every machine and in every run.
    """
    raster = range(grid * grid)
    if order == "raster":
        return tuple(raster)
    if order == "spiral":
        return _spiral(grid)
    if order == "checkerboard":
        return tuple(sorted(raster, key=lambda index: (sum(divmod(index, grid)) % 2, index)))
    # A hash as the sort key, because random generators may change between library versions.
    return tuple(sorted(raster, key=lambda index: hashlib.sha256(f"{grid}/{index}".encode()).digest()))


def _spiral(grid: int) -> tuple[int, ...]:
    rows = [[row * grid + column for column in range(grid)] for row in range(grid)]
    order: list[int] = []
    while rows:
        order += rows.pop(0)
        rows = [list(column) for column in zip(*rows, strict=True)][::-1]  # turn the rest anticlockwise
    return tuple(order)
