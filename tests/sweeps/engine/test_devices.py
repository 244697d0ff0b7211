from __future__ import annotations

from fractions import Fraction
from typing import Any

from aimscale.sweeps.engine.devices import Devices, sharing
from aimscale.sweeps.plan.device_fit import runs_on_a_device
from aimscale.sweeps.plan.planner import plan

HALF, THIRD, WHOLE = Fraction(1, 2), Fraction(1, 3), Fraction(1)


def test_runs_share_a_card_until_it_is_full_and_never_one_that_needs_several() -> None:
    cards = Devices(["3", "5"], slots=2)
    assert cards.take(1, HALF) == (0,)
    assert cards.take(2, WHOLE) is None
    assert cards.take(1, THIRD) == (0,)  # the fullest that still has room
    assert cards.take(1, HALF) == (1,)
    assert cards.take(1, WHOLE) is None
    cards.give_back((0,), HALF)
    cards.give_back((0,), THIRD)
    cards.give_back((1,), HALF)
    assert cards.take(2, THIRD) == (0, 1)
    assert cards.take(1, THIRD) is None
    assert cards.environment((0, 1), THIRD) == {"CUDA_VISIBLE_DEVICES": "3,5"}
    assert cards.environment((1,), HALF) == {"CUDA_VISIBLE_DEVICES": "5", "AIMSCALE_DEVICE_SHARE": "0.500000"}


def test_more_slots_than_cards_share_them_and_fewer_leave_some() -> None:
    assert Devices(["0", "1"], slots=5).share == THIRD
    assert Devices(["0", "1", "2"], slots=2).cards == ("0", "1")
    assert (Devices([], slots=3).num, Devices([], slots=3).environment((1,), WHOLE)) == (3, {})


def test_the_memory_estimate_says_how_many_runs_share_a_card(write_sweep: Any) -> None:
    """More of a small run than of a larger one, one of what fills a card or has several."""
    sweep = write_sweep(sizes=["rung-32", "rung-384", "aim-7B"], runs_per_device="auto")
    numbers = [runs_on_a_device(sweep, run) for run in plan(sweep)]
    assert numbers[0] == 8
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[-1] == 1
    small = plan(sweep)[0]
    assert runs_on_a_device(sweep.with_fields(cost={"memory_gb": 1}), small) < 8
    assert sharing(sweep)(small) == Fraction(1, 8)
    assert sharing(sweep.with_fields(runs_per_device=4))(small) == Fraction(1, 4)
