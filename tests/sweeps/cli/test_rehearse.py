"""`aimscale plan SWEEP --rehearse`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.filesize import decimal

from aimscale.harness.rehearsal.step import rehearse
from aimscale.sweeps.cli.plan import plan
from aimscale.sweeps.planning.planner import plan as plan_runs
from aimscale.sweeps.planning.sweepfile import SweepError


@pytest.mark.fork
def test_a_plan_shows_rehearsed_memory_and_all_of_one_run(
    write_sweep: Any, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aimscale.sweeps.cli.plan.check", lambda *_: ())
    # Seeds are runs of their own with equal steps.
    validation = {"path": str(tmp_path), "every_images": 64}
    sweep = write_sweep(devices=4, sizes=["rung-32"], seeds=[0, 1], base={"validation": validation})
    runs = [run.run_id for run in plan_runs(sweep)]
    file, root = str(sweep.source), sweep.root
    rehearse.cache_clear()
    plan(file, root, rehearse=True, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert list(found["rehearsals"]) == runs
    assert rehearse.cache_info().misses == 1
    one = found["rehearsals"][runs[0]]
    assert [phase["phase"] for phase in one["phases"]] == ["forward", "backward", "update", "point"]
    params = found["runs"][0]["params_total"]
    assert one["phases"][-1]["held"]["optimiser"] == pytest.approx(12 * params / 4, rel=0.02), "shared by four ranks"
    assert one["checkpoint_bytes"] == pytest.approx(12 * params / 4, rel=0.02)
    assert {each["name"] for each in one["collectives"]} == {"allreduce", "allgather_base"}

    plan(file, root, rehearse=True, only=runs[0])
    text = capsys.readouterr().out
    assert any("rehearsed" in line and "memory" in line for line in text.splitlines())
    peaks = [max(sum(each["peak"].values()) for each in one["phases"][:3]), sum(one["phases"][-1]["peak"].values())]
    assert " | ".join(map(decimal, peaks)) in text, "of the step, and of the copy at a point of the curve"
    assert f"{runs[0]}: one step" in text
    assert "update: allgather_base" in text
    assert "checkpoint: the rank writes" in text
    with pytest.raises(SweepError, match="add --rehearse"):
        plan(file, root, only=runs[0])
