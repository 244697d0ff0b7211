from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aimscale.sweeps.engine import local_queue
from aimscale.sweeps.engine.start import work
from aimscale.sweeps.plan.planner import plan
from aimscale.sweeps.state.claims import RunRecord

STAND_IN = Path(__file__).parents[1] / "stand_in.py"
PROGRAM = """
    import sys
    from pathlib import Path
    from aimscale.sweeps.engine.start import launch, work
    command = lambda run_dir, devices: [sys.executable, {stand_in!r}, str(run_dir), {behaviour!r}]
    if {verb!r} == "work":
        did = work({path!r}, Path({root!r}), devices=1, command=command, check=lambda runs: None)
        print("worked", len(did.finished))
    else:
        did = launch({path!r}, Path({root!r}), slots=1, command=command, check=lambda runs: None)
        print("launched", len(did.finished))
"""


def start(tmp_path: Path, verb: str, behaviour: str = "finish") -> subprocess.Popen[str]:
    """A worker, or a local launch, of one slot."""
    program = textwrap.dedent(PROGRAM).format(
        stand_in=str(STAND_IN),
        behaviour=behaviour,
        verb=verb,
        path=str(tmp_path / "sweep.yaml"),
        root=str(tmp_path / "root"),
    )
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


def test_three_workers_and_a_launch_execute_each_run_once(write_sweep: Any, tmp_path: Path) -> None:
    sweep = write_sweep(sizes=["rung-32"], seeds=list(range(8)))
    all_of_them = [start(tmp_path, verb) for verb in ("work", "work", "work", "launch")]
    lines = [each.communicate(timeout=240)[0].splitlines()[-1] for each in all_of_them]
    assert sum(int(line.split()[-1]) for line in lines) == 8, lines
    assert [line.rsplit(" ", 1)[0] for line in lines] == ["worked"] * 3 + ["launched"]
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
