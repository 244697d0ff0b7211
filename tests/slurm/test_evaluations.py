"""Runs trained on a real Slurm by `aimscale launch --on slurm`, whose evaluations are jobs behind them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from aimscale.harness.probe.run import probe_run
from aimscale.harness.run.directory import RunDir
from aimscale.sweeps.engine.evaluations import unevaluated
from aimscale.sweeps.state.claims import EVALUATING, RunRecord


def test_evaluations_are_jobs_behind_training_and_a_requeue_changes_no_number(
    fault: Any, data: Path, labelled: Path
) -> None:
    task: dict[str, Any] = {"task": "colour", "train": str(labelled / "train"), "test": str(labelled / "test")}
    task |= {"kinds": ["knn", "lora"], "epochs": 40, "lrs": [3e-3]}
    base = {
        "model": {"image_size": 16, "patch_size": 4},
        "data": {"sources": [{"path": str(data / "train")}]},
        "optimiser": {"batch_size": 16},
        "validation": {"path": str(data / "validation")},
        "probes": [task],
    }
    case = fault(seeds=[0, 1], sizes=["w16-d2"], budgets=[160], base=base, slow_evaluations=True)
    command = [sys.executable, "-m", "aimscale", "launch", str(case.sweep.source), "--root", str(case.sweep.root)]
    command += ["--on", "slurm", "--allow-dirty"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.count("submitted") == 2, told
    jobs = [RunRecord(record.path / EVALUATING) for record in case.records]
    case.wait(lambda: jobs[0].is_held() and jobs[0].saved_progress()[1] > 0, "a part of the first evaluation")
    claim = jobs[0].read_claim()
    assert claim is not None
    assert {record.checked_status().state for record in case.records[:1]} == {"finished"}, "training is over"
    subprocess.run(["scontrol", "requeue", str(claim.job_id)], check=True)
    case.wait(lambda: all(job.checked_status().state == "finished" for job in jobs), "the end of the evaluations")
    case.wait_empty_queue()
    assert jobs[0].checked_status().attempt == 2
    assert [RunDir(record.path).read_status().attempt for record in case.records] == [1, 1], "nothing trained again"
    rows = [record.read_rows()[0] for record in case.records]
    assert all(row["val_loss"] for row in rows)
    shutil.rmtree(case.records[0].path / "probes")
    (undisturbed,) = [entries for _, entries in probe_run(case.records[0].path)]
    assert rows[0]["probes"] == undisturbed
    assert not unevaluated(case.sweep, case.runs)
