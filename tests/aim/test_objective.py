import pytest

from aimscale.aim.model import patch_order


def test_random_order_never_changes() -> None:
    # Trained models depend on it: a new value here means that none of them can be used any more.
    assert patch_order("hashed", 4) == (4, 2, 11, 5, 6, 9, 0, 13, 15, 3, 10, 14, 12, 8, 1, 7)


@pytest.mark.parametrize("order", ["raster", "outward_spiral", "inward_spiral", "checkerboard", "hashed"])
@pytest.mark.parametrize("grid", [2, 5, 16])
def test_order_is_a_permutation(order: str, grid: int) -> None:
    assert sorted(patch_order(order, grid)) == list(range(grid * grid))
