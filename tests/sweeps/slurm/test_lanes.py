"""The arrays of a sweep never run more jobs at a time than the sweep may. On a real Slurm: tests/slurm."""

from __future__ import annotations

import pytest

from aimscale.sweeps.slurm.lanes import turns


@pytest.mark.parametrize(
    ("most", "sizes", "limits", "lanes"),
    [
        (256, [3, 2], [3, 2], [0, 1]),
        (4, [10, 1], [3, 1], [0, 1]),
        (5, [10, 10], [3, 2], [0, 1]),
        (2, [4, 4, 4], [1, 1, 1], [0, 1, 0]),
        (7, [], [], []),
    ],
)
def test_a_sweeps_limit_is_shared_out_to_its_arrays(
    most: int, sizes: list[int], limits: list[int], lanes: list[int]
) -> None:
    found = turns(most, sizes)
    assert [turn.limit for turn in found] == limits
    assert [turn.lane for turn in found] == lanes
    assert sum({turn.lane: turn.limit for turn in found}.values()) <= most
