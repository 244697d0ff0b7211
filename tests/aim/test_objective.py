from pathlib import Path

import pytest

from aimscale.aim.config import ModelConfigError
from aimscale.aim.orders import patch_order


def test_random_order_never_changes() -> None:
    # Trained models depend on it: a new value here means that none of them can be used any more.
    assert patch_order("hashed", 4) == (4, 2, 11, 5, 6, 9, 0, 13, 15, 3, 10, 14, 12, 8, 1, 7)


@pytest.mark.parametrize("order", ["raster", "outward_spiral", "inward_spiral", "checkerboard", "hashed"])
@pytest.mark.parametrize("grid", [2, 5, 16])
def test_order_is_a_permutation(order: str, grid: int) -> None:
    assert sorted(patch_order(order, grid)) == list(range(grid * grid))


def test_the_published_random_order_is_read_from_a_file_of_the_authors_trainer_that_is_never_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ModelConfigError, match=r"l3m/helpers/vision/ar_patterns.py .* not installed"):
        patch_order("fixed_random", 2)
    file = tmp_path / "l3m" / "helpers" / "vision" / "ar_patterns.py"  # it cannot be installed from a registry
    file.parent.mkdir(parents=True)
    for folder in file.parents[:3]:
        (folder / "__init__.py").write_text("raise ImportError('slow, and not needed')")
    lists = "{4: torch.tensor([2, 0,\n  3, 1]), 9: torch.tensor([0, 0, 0])}"
    file.write_text(
        f"import absent\n__all__ = ['FIXED_RANDOM_PATTERNS']\n# fmt: off\nFIXED_RANDOM_PATTERNS = {lists}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert patch_order("fixed_random", 2) == (2, 0, 3, 1)
    for grid in (3, 4):  # no permutation, and none at all
        with pytest.raises(ModelConfigError, match=f"of {grid**2} patches is not in {file}"):
            patch_order("fixed_random", grid)
