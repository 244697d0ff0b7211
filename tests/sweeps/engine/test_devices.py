from __future__ import annotations

import os
import threading
from dataclasses import replace
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


def test_a_launch_that_waits_for_devices_of_another_says_so(
    write_sweep: Any, launch: Any, stand_in: Any, capsys: Any
) -> None:
    sweep = write_sweep(sizes=["rung-32"])
    num_cores = len(os.sched_getaffinity(0))
    other = DevicePool(Machine(devices=num_cores, is_shared=True))
    taken = other.acquire(replace(plan(sweep)[0], devices=num_cores))
    assert taken is not None
    timer = threading.Timer(1.0, other.release, [taken])
    timer.start()
    assert len(launch(sweep, devices=1, command=stand_in()).finished) == 1
    said = capsys.readouterr().out
    assert said.count("waiting for devices, which other launches on this machine use") == 1
    assert "waiting" not in said[said.index("started") :]
