from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aimscale.sweeps.engine import looks, worker
from aimscale.sweeps.engine.devices import DevicePool, Machine, refuse_other_machine
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.sweepfile import SweepError


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


def test_a_device_is_not_free_because_its_holder_cannot_be_named(
    write_sweep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder's file goes with it, between the look at its lock and the look into it."""
    (run,) = plan(write_sweep(sizes=["rung-32"], devices=1))
    holder, other = (DevicePool(Machine(devices=1, gpus=("7",), is_shared=True)) for _ in range(2))
    assert holder.acquire(run) == (0,)
    monkeypatch.setattr(Path, "read_text", lambda *_: (_ for _ in ()).throw(FileNotFoundError))
    assert other.acquire(run) is None


def test_a_launch_that_waits_for_devices_of_another_says_so(
    write_sweep: Any, launch: Any, stand_in: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looks, "RESCAN_S", 0.1)
    monkeypatch.setattr(worker, "WAIT_TOLD_S", 0.5)
    sweep = write_sweep(sizes=["rung-32"])
    num_cores = len(os.sched_getaffinity(0))
    other = DevicePool(Machine(devices=num_cores, is_shared=True))
    taken = other.acquire(replace(plan(sweep)[0], devices=num_cores))
    assert taken is not None
    timer = threading.Timer(1.0, other.release, [taken])
    timer.start()
    assert len(launch(sweep, devices=1, command=stand_in()).finished) == 1
    said = capsys.readouterr().out
    who = f"waiting: other launches of this user (process {os.getpid()}) use all devices of this machine"
    assert 2 <= said.count(who) <= 3
    assert "waiting" not in said[said.rindex("started") :]


def test_a_sweep_of_gpus_is_not_launched_where_none_is_nor_a_run_on_more_than_there_are(
    write_sweep: Any, launch: Any, stand_in: Any
) -> None:
    """Runs planned on 128 H100s "ran" on two cores, at the GPUs' speed, for 298 days."""
    gpus = write_sweep(sizes=["rung-32"], cost={"device": "H100"})
    with pytest.raises(SweepError, match="no GPU is visible here"):
        launch(gpus, devices=1, command=stand_in())
    assert not gpus.directory.exists()
    on_cpu = write_sweep(sizes=["rung-32"], cost={"device": "H100"}, base={"runtime": {"device": "cpu"}})
    assert launch(on_cpu, devices=1, command=stand_in()).finished
    many, node = write_sweep(sizes=["rung-32"], devices=16), Machine(devices=8, gpus=tuple("01234567"))
    with pytest.raises(SweepError, match="16 devices, and this machine has 8"):
        refuse_other_machine(many, plan(many), node, is_said=False)
    refuse_other_machine(many, plan(many), node, is_said=True)
