from __future__ import annotations

from typing import Any

from aimscale.sweeps.engine.devices import DevicePool, Machine
from aimscale.sweeps.plan.planner import plan


def test_no_device_serves_two_runs_at_once(write_sweep: Any) -> None:
    one, two, three = (plan(write_sweep(sizes=["rung-32"], devices=num))[0] for num in (1, 2, 3))
    machine = Machine(devices=2, gpus=("3", "5"))
    pool = DevicePool(machine)
    assert pool.acquire(one) == (0,)
    assert pool.acquire(two) is None
    assert [pool.acquire(one), pool.acquire(one)] == [(1,), None]
    for i in (0, 1):
        pool.release((i,))
    assert pool.acquire(three) == (0, 1), "the only machine executes it on what it has"
    assert pool.acquire(one) is None
    assert pool.environment((0, 1)) == {"CUDA_VISIBLE_DEVICES": "3,5", "AIMSCALE_HOST_SHARE": "1.000000"}
    assert pool.environment((1,)) == {"CUDA_VISIBLE_DEVICES": "5", "AIMSCALE_HOST_SHARE": "0.500000"}
    assert machine.can_run(three)
    assert not Machine(devices=2, allow_fewer_devices=False).can_run(three)
    assert [Machine(devices=1, nodes=2, allow_fewer_devices=False).can_run(run) for run in (one, two)] == [False, True]
