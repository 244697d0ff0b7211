from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aimscale.sweeps.engine.packed_job import PackedJob
from aimscale.sweeps.plan.planner import plan
from aimscale.sweeps.slurm.job import JobError
from aimscale.sweeps.state.claims import RunRecord, claim_run, own_claim
from aimscale.sweeps.state.sweep_dir import prepare

STAND_IN = str(Path(__file__).parents[1] / "stand_in.py")


@pytest.fixture
def queued(write_sweep: Any, monkeypatch: pytest.MonkeyPatch) -> list[RunRecord]:
    """Four runs that wait in one Slurm job, which this process now is."""
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1, 2, 3])
    prepare(sweep)
    records = [RunRecord(sweep.run_dir(run.run_id)) for run in plan(sweep)]
    for run, record in zip(plan(sweep), records, strict=True):
        claim_run(record, run, own_claim("slurm", 1, "9"))
    return records


def test_one_slurm_job_executes_several_runs_as_a_queue(queued: list[RunRecord], capsys: Any) -> None:
    """Each with its own directory, log, attempt and failure; one that was cancelled meanwhile is left alone."""
    queued[1].drop_claim()
    (queued[3].path / "behaviour").write_text("crash")
    job = PackedJob([record.path for record in queued], 2, 1, (STAND_IN,))
    with pytest.raises(JobError, match=queued[3].path.name):
        job()
    assert [record.checked_status().state for record in queued] == ["finished", "queued", "finished", "failed"]
    assert [[ended["where"] for ended in record.read_attempts()] for record in queued] == [
        ["slurm 9"],
        [],
        ["slurm 9"],
        ["slurm 9", "slurm 9"],
    ]
    assert not any(record.claim.exists() for record in queued)
    started = [line for line in capsys.readouterr().out.splitlines() if line.startswith("started")]
    assert len(started) == 3
    assert queued[0].last_log() is not None


def test_damaged_runs_of_a_job_are_named_and_the_others_executed(queued: list[RunRecord], capsys: Any) -> None:
    for record, name in zip(queued, ("config.yaml", "lease.json", "launch.json"), strict=False):
        (record.path / name).write_text("[")
    job = PackedJob([record.path for record in queued], 2, 1, (STAND_IN,))
    assert job() == "1 runs finished"
    assert [record.checked_status().state for record in queued] == ["queued", "queued", "queued", "finished"]
    said = capsys.readouterr().out
    assert f"skipped {queued[0].path.name}: " in said
    assert all(f"left {record.path.name}: {record.path}" in said for record in queued[1:3])


def test_a_job_that_slurm_restarted_leaves_runs_of_its_later_self_alone(
    queued: list[RunRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert PackedJob([record.path for record in queued[:2]], 2, 1, (STAND_IN,))() == "2 runs finished"
    claim_run_again = own_claim("slurm", 1, "9")
    for record in queued[2:]:
        record.write_claim(type(claim_run_again)(**{**vars(claim_run_again), "restarts": 2}))
    assert PackedJob([record.path for record in queued[2:]], 2, 1, (STAND_IN,))() == "0 runs finished"
