from __future__ import annotations

from aimscale.sweeps.engine.devices import Devices


def test_runs_share_a_card_until_it_is_full_and_never_one_that_needs_several() -> None:
    cards = Devices(["3", "5"], slots=4)
    assert [cards.take(1), cards.take(1)] == [(0,), (0,)]  # the fullest that still has room
    assert cards.take(2) is None
    assert [cards.take(1), cards.take(1), cards.take(1)] == [(1,), (1,), None]
    for i in (0, 0, 1, 1):
        cards.give_back((i,))
    assert cards.take(2) == (0, 1)
    assert cards.take(1) is None
    assert cards.environment((0, 1)) == {"CUDA_VISIBLE_DEVICES": "3,5"}
    assert cards.environment((1,)) == {"CUDA_VISIBLE_DEVICES": "5", "AIMSCALE_DEVICE_SHARE": "0.500000"}
