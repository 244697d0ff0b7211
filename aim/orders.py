"""The orders in which an image's patches are read and predicted (paper, section 5.2, "Autoregression pattern").

An order is a tuple whose t-th entry is the raster index (row * grid + column) of the patch at sequence position t. The
paper names raster, spiral, checkerboard and a fixed random order without defining them. `outward_spiral` and
`checkerboard` are those of the authors' trainer; the random one, `hashed`, is ours.
"""

from __future__ import annotations

import hashlib

from aimscale.aim.config import PatchOrder


def patch_order(order: PatchOrder, grid: int) -> tuple[int, ...]:
    """Return the raster indices of the `grid` x `grid` patches in sequence order.

    - `raster`: row by row from the top left;
    - `outward_spiral`: from the centre outwards, the inward one reversed and transposed;
    - `inward_spiral`: clockwise from the top-left corner inwards;
    - `checkerboard`: the "black" cells, those with an even row + column, in raster order, then the "white" ones;
    - `hashed`: one fixed permutation for each grid, the same on every machine and in every run.
    """
    raster = range(grid * grid)
    if order == "raster":
        return tuple(raster)
    if order == "inward_spiral":
        return _inward_spiral(grid)
    if order == "outward_spiral":
        return tuple(index % grid * grid + index // grid for index in reversed(_inward_spiral(grid)))
    if order == "checkerboard":
        return tuple(sorted(raster, key=lambda index: (sum(divmod(index, grid)) % 2, index)))
    # A hash as the sort key, because random generators may change between library versions.
    return tuple(sorted(raster, key=lambda index: hashlib.sha256(f"{grid}/{index}".encode()).digest()))


def _inward_spiral(grid: int) -> tuple[int, ...]:
    rows = [[row * grid + column for column in range(grid)] for row in range(grid)]
    order: list[int] = []
    while rows:
        order += rows.pop(0)
        rows = [list(column) for column in zip(*rows, strict=True)][::-1]  # turn the rest anticlockwise
    return tuple(order)
