import sys
import types

import pytest
import torch

from aimscale.aim.config import ModelConfigError
from aimscale.aim.objective import normalise_patches, patchify, prefix_causal_mask, scored_positions, unpatchify
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


def test_mask_and_scored_positions_by_their_definition() -> None:
    num_tokens, prefix_len = 6, torch.tensor([1, 3, 5])
    mask = prefix_causal_mask(prefix_len, num_tokens)
    expected_scored = []
    for image, prefix in enumerate(prefix_len.tolist()):
        for query in range(num_tokens):
            for key in range(num_tokens):
                assert mask[image, 0, query, key] == (key < prefix or key <= query)
        expected_scored += [image * num_tokens + target - 1 for target in range(num_tokens) if target >= prefix]
    assert scored_positions(prefix_len, num_tokens).tolist() == expected_scored


def test_patch_values_run_over_row_column_channel() -> None:
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).view(2, 3, 8, 8)
    patches = patchify(images, 4)
    assert patches.shape == (2, 4, 48)
    for row, column, channel in ((0, 0, 0), (1, 2, 1), (3, 3, 2)):
        value = patches[1, 2, (row * 4 + column) * 3 + channel]
        assert value == images[1, channel, 4 + row, column]
    assert torch.equal(unpatchify(patches, 4, 3), images)


def test_normalised_patch_has_mean_0_and_unbiased_variance_1_and_a_flat_one_is_0() -> None:
    patches = torch.randn(5, 48) * 3 + 2
    patches[0] = 0.25
    normalised = normalise_patches(patches)
    torch.testing.assert_close(normalised.mean(1), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(normalised[1:].var(1, unbiased=True), torch.ones(4))
    assert normalised[0].abs().max() == 0
