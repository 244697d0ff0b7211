from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

import pytest

from aimscale import sweeps
from aimscale.analysis import read_table
from aimscale.sweeps.engine import launch as engine
from aimscale.sweeps.state.record import RunRecord


@pytest.fixture
def unchecked(launch: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Execute runs by stand-ins, and make no checks of data."""
    monkeypatch.setattr("aimscale.sweeps.api.raise_on_problems", lambda *_: None)
    monkeypatch.setattr(engine, "launch", functools.partial(launch, command=stand_in()))


def test_a_program_plans_launches_looks_and_collects(write_sweep: Any, unchecked: None, capsys: Any) -> None:
    file = write_sweep(sizes=["rung-32"], seeds=[0, 1], slurm={})
    planned = sweeps.plan(file.source, str(file.root))
    assert (len(planned.runs), len(planned.cards)) == (2, 2)
    assert repr(planned) == "PlannedSweep('tiny', 2 runs)"
    assert not file.root.exists(), "a plan writes nothing"
    result = sweeps.launch(planned, devices=1)
    assert (len(result.finished), result.failed) == (2, ())
    assert capsys.readouterr().out.count("finished ") == 2, "a line for each end"
    assert sweeps.status(planned).counts == {"finished": 2}
    rows = read_table(sweeps.collect(sweeps.load_sweep("tiny", str(file.root))).table)
    assert list(rows["images_seen"]) == [640, 1280] * 2
    assert not sweeps.launch(file.source, file.root).finished, "all are done"
    RunRecord(file.run_dir(result.finished[0])).write_status(state="preempted", reason="stopped")
    assert sweeps.status(file).counts == {"paused": 1, "finished": 1}
    assert len(sweeps.launch(file).finished) == 1


def test_a_plan_makes_the_checks_of_a_launch(write_sweep: Any) -> None:
    sweep = write_sweep(sizes=["rung-32"])
    with pytest.raises(sweeps.SweepError, match="data/train"):
        sweeps.plan(sweep)
    assert len(sweeps.plan(sweep, check=False).runs) == 1


def test_every_public_name_is_documented_and_loaded_when_used() -> None:
    assert {"collect", "launch", "load_sweep", "plan", "status"} <= set(dir(sweeps))
    for name in ("collect", "launch", "load_sweep", "plan", "status"):
        text = getattr(sweeps, name).__doc__
        assert all(part in text for part in ("Args:", "Returns:", "Raises:", "Example:")), name
    code = "import sys, aimscale.sweeps; sys.exit(bool({'torch', 'pandas', 'pydantic', 'rich'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
