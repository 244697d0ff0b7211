"""The orders in which an image's patches are read and predicted (paper, section 5.2, "Autoregression pattern").

An order is a tuple whose t-th entry is the raster index (row * grid + column) of the patch at sequence position t. The
paper names raster, spiral, checkerboard and a fixed random order without defining them. `outward_spiral` and
`checkerboard` are those of the authors' trainer. Its random order, `fixed_random`, is a published list of numbers, read
from the source file of that trainer where it is installed, since the list is theirs; `hashed` is ours.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from pathlib import Path

from aimscale.aim.config import ModelConfigError, PatchOrder

_TRAINER, _LISTS_FILE = "l3m", "helpers/vision/ar_patterns.py"  # package, and a file in it
_TRAINER_SOURCE = "git+https://github.com/apple/ml-l3m"


def patch_order(order: PatchOrder, grid: int) -> tuple[int, ...]:
    """Return the raster indices of the `grid` x `grid` patches in sequence order.

    - `raster`: row by row from the top left;
    - `outward_spiral`: from the centre outwards, the inward one reversed and transposed;
    - `inward_spiral`: clockwise from the top-left corner inwards;
    - `checkerboard`: the "black" cells, those with an even row + column, in raster order, then the "white" ones;
    - `fixed_random`: the authors' list for this grid;
    - `hashed`: one fixed permutation for each grid, the same on every machine and in every run.

    Raises:
        ModelConfigError: `fixed_random` without the authors' trainer, or with a grid that it has no list for.
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
    if order == "fixed_random":
        return _published_random_order(grid)
    # A hash as the sort key, because random generators may change between library versions.
    return tuple(sorted(raster, key=lambda index: hashlib.sha256(f"{grid}/{index}".encode()).digest()))


def _inward_spiral(grid: int) -> tuple[int, ...]:
    rows = [[row * grid + column for column in range(grid)] for row in range(grid)]
    order: list[int] = []
    while rows:
        order += rows.pop(0)
        rows = [list(column) for column in zip(*rows, strict=True)][::-1]  # turn the rest anticlockwise
    return tuple(order)


def _published_random_order(grid: int) -> tuple[int, ...]:
    spec = importlib.util.find_spec(_TRAINER)
    files = [Path(folder, _LISTS_FILE) for folder in (spec and spec.submodule_search_locations) or ()]
    file = next((file for file in files if file.is_file()), None)
    order = _published_lists(file).get(grid**2) if file else None
    if order is None or sorted(order) != list(range(grid**2)):
        where = file or f"{_TRAINER}/{_LISTS_FILE} of the authors' trainer, which is not installed ({_TRAINER_SOURCE})"
        why = f"patch_order fixed_random of {grid**2} patches is not in {where}"
        raise ModelConfigError(f"{why}; use hashed, a fixed order of ours")
    return tuple(order)


def _published_lists(file: Path) -> dict[int, list[int]]:
    """Read lists, by their length, from a file without executing it: `FIXED_RANDOM_PATTERNS = {4: torch.tensor([...]),
    ...}`.

    Importing the trainer takes 20 s, and packages that nothing here needs.
    """
    lists: dict[int, list[int]] = {}
    for statement in ast.parse(file.read_text()).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="FIXED_RANDOM_PATTERNS")], value=ast.Dict(keys=keys, values=values)):
                for key, value in zip(keys, values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(value, ast.Call) and value.args:
                        lists[ast.literal_eval(key)] = ast.literal_eval(value.args[0])
    return lists
