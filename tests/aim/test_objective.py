import sys
import types

import pytest
import torch

from aimscale.aim.config import ModelConfigError
from aimscale.aim.orders import patch_order


def test_random_order_never_changes() -> None:
    # Trained models depend on it: a new value here means that none of them can be used any more.
    assert patch_order("hashed", 4) == (4, 2, 11, 5, 6, 9, 0, 13, 15, 3, 10, 14, 12, 8, 1, 7)


@pytest.mark.parametrize("order", ["raster", "outward_spiral", "inward_spiral", "checkerboard", "hashed"])
@pytest.mark.parametrize("grid", [2, 5, 16])
def test_order_is_a_permutation(order: str, grid: int) -> None:
    assert sorted(patch_order(order, grid)) == list(range(grid * grid))


def test_the_published_random_order_is_read_from_the_authors_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelConfigError, match="fixed_random of 4 patches"):
        patch_order("fixed_random", 2)
    trainer = types.ModuleType("l3m.helpers.vision.ar_patterns")  # a stand-in: it cannot be installed from a registry
    trainer.FIXED_RANDOM_PATTERNS = {4: torch.tensor([2, 0, 3, 1])}  # type: ignore[attr-defined]
    for name in ("l3m", "l3m.helpers", "l3m.helpers.vision", trainer.__name__):
        monkeypatch.setitem(sys.modules, name, trainer)
    assert patch_order("fixed_random", 2) == (2, 0, 3, 1)
    with pytest.raises(ModelConfigError, match="fixed_random of 9 patches"):
        patch_order("fixed_random", 3)
