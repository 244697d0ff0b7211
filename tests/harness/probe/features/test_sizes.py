"""Which averages of blocks are tried."""

from __future__ import annotations

from aimscale.harness.probe.features.tasks import block_sets


def test_block_sets_hold_the_fixed_one_singles_and_the_published_best() -> None:
    sets, last = block_sets(24)
    assert last == (18, 19, 20, 21, 22, 23)
    assert (12, 13, 14, 15, 16, 17) in sets
    assert {(block,) for block in range(24)} <= set(sets)
    assert block_sets(2) == ([(0,), (1,)], (1,))
