from __future__ import annotations

from typing import Any

from aimscale.sweeps.engine.devices import Devices, Machine
from aimscale.sweeps.plan.planner import plan


def test_runs_share_a_device_until_it_is_full_and_never_one_that_needs_several(write_sweep: Any) -> None:
    one, two, three = (plan(write_sweep(sizes=["rung-32"], devices=num))[0] for num in (1, 2, 3))
    machine = Machine(devices=2, gpus=("3", "5"), per_device=2)
    devices = Devices(machine)
    assert [devices.take(one), devices.take(one)] == [(0,), (0,)]  # the fullest that still has room
    assert devices.take(two) is None
    assert [devices.take(one), devices.take(one), devices.take(one)] == [(1,), (1,), None]
    for i in (0, 0, 1, 1):
        devices.give_back((i,))
    assert devices.take(three) == (0, 1), "the only machine executes it on what it has"
    assert devices.take(one) is None
    assert devices.environment((0, 1)) == {"CUDA_VISIBLE_DEVICES": "3,5", "AIMSCALE_HOST_SHARE": "1.000000"}
    shares = {"AIMSCALE_DEVICE_SHARE": "0.500000", "AIMSCALE_HOST_SHARE": "0.250000"}
    assert devices.environment((1,)) == {"CUDA_VISIBLE_DEVICES": "5", **shares}
    assert machine.serves(three)
    assert not Machine(devices=2, is_only=False).serves(three)
    assert [Machine(devices=1, nodes=2, is_only=False).serves(run) for run in (one, two)] == [False, True]
