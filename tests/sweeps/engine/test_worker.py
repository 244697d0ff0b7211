from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from aimscale.sweeps.engine import local_queue
from aimscale.sweeps.engine.start import work
from aimscale.sweeps.plan.planner import plan
from aimscale.sweeps.state.claims import RunRecord


def test_three_workers_and_a_launch_execute_each_run_once(write_sweep: Any, start: Any) -> None:
    sweep = write_sweep(sizes=["rung-32"], seeds=list(range(8)))
    all_of_them = [start(verb) for verb in ("work", "work", "work", "launch")]
    lines = [each.communicate(timeout=240)[0].splitlines()[-1] for each in all_of_them]
    assert sum(int(line.split()[-1]) for line in lines) == 8, lines
    assert {line.split()[0] for line in lines} == {"done"}
    records = [RunRecord(sweep.run_dir(run.run_id)) for run in plan(sweep)]
    assert [len((record.path / "starts").read_text().split()) for record in records] == [1] * 8
    assert [len(record.read_rows()) for record in records] == [2] * 8


def test_a_worker_whose_time_is_up_saves_and_another_goes_on(
    write_sweep: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an hour, two minutes are left for saving; the clock jumps there once both runs are at work."""
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1])
    records = [RunRecord(sweep.run_dir(run.run_id)) for run in plan(sweep)]
    jumps = iter([3600 - 150, 3600 - 90])

    def later() -> float:
        at_work = all((record.path / "starts").exists() for record in records)
        return time.time() + (next(jumps, 3600 - 90) if at_work else 0)

    monkeypatch.setattr(local_queue, "time", SimpleNamespace(time=later, sleep=time.sleep))
    did = work(sweep, hours=1, devices=2, command=stand_in("wait"), check=lambda runs: None)
    assert (did.interrupted, did.stopped_by) == (True, None)
    assert next(jumps, None) is None, "not before that"
    assert [record.checked_status().state for record in records] == ["preempted", "preempted"]
    monkeypatch.undo()
    did = work(sweep, devices=1, command=stand_in(), check=lambda runs: None)
    assert (did.interrupted, sorted(did.finished)) == (False, sorted(record.path.name for record in records))
