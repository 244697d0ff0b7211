"""Probe jobs on a real Slurm: an array, a requeue in the middle, two ranks on two nodes, each task probed once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aimscale.aim.model import AIM
from aimscale.aim.weights import write_weights
from aimscale.harness.probe.job import ProbeRequest
from aimscale.harness.probe.run import probe_run
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.row import model_of
from aimscale.sweeps.engine.probes import probing_jobs
from aimscale.sweeps.engine.start import left_alone
from aimscale.sweeps.slurm.submit import launch_slurm
from aimscale.sweeps.state.probe_record import ProbeRecord
from aimscale.sweeps.state.sweep_dir import prepare


@pytest.fixture
def trained(fault: Any, labelled: Path) -> Callable[..., Any]:
    """A sweep on the cluster whose runs have one finished budget of random weights."""

    def make(**task: Any) -> Any:
        own = {"task": "colour", "train": str(labelled / "train"), "test": str(labelled / "test"), **task}
        case = fault(
            slow_evaluations=True,
            seeds=[0, 1],
            sizes=["w16-d2"],
            budgets=[160],
            base={
                "model": {"image_size": 16, "patch_size": 4},
                "data": {"sources": [{"path": str(labelled / "train")}]},
                "optimiser": {"batch_size": 16},
                "validation": {"path": str(labelled / "test")},
                "probes": [own],
            },
        )
        prepare(case.sweep)
        for run in case.runs:
            record = RunDir.create(case.sweep.run_dir(run.run_id), run.config)
            record.write_status(state="finished")
            torch.manual_seed(run.config.training.seed)
            write_weights(AIM(model_of(run.config.training)).state_dict(), record.model_file(160))
            record.record_row({"run_id": run.run_id, "images_seen": 160, "val_loss": 0.5, "probes": []})
        return case

    return make


def submit(case: Any, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "aimscale", "probe", str(case.sweep.source), "--root", str(case.sweep.root)]
    return subprocess.Popen(
        [*command, "--on", "slurm", "--allow-dirty", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(case: Any) -> bool:
    return all(ProbeRecord.of(record.path).checked_status().state == "finished" for record in case.records)


def test_two_submissions_at_once_and_a_requeue_give_the_numbers_of_an_undisturbed_probe(trained: Any) -> None:
    case = trained(kinds=["knn", "lora"], epochs=40, lrs=[3e-3])
    outputs = [submission.communicate(timeout=400)[0] for submission in [submit(case), submit(case)]]
    assert sorted("submitted" in output for output in outputs) == [False, True], outputs
    assert any("left alone: 2 queued" in output or "running" in output for output in outputs), outputs
    first = ProbeRecord.of(case.records[0].path)
    case.wait(lambda: first.saved_progress()[1] > 0, "a first step of LoRA")
    job = first.read_claim()
    assert job is not None
    subprocess.run(["scontrol", "requeue", str(job.job_id)], check=True)
    case.wait(lambda: finished(case), "the end of the probes")
    case.wait_empty_queue()
    assert first.checked_status().attempt == 2
    assert [ended["exit_code"] for ended in first.read_attempts()][-1] == 0
    rows = [record.read_rows()[0]["probes"] for record in case.records]
    assert [[entry["kind"] for entry in row] for row in rows] == [["knn", "lora"]] * 2
    (undisturbed,) = [entries for _, entries in probe_run(case.records[0].path, since=None)]
    assert rows[0] == undisturbed
    assert {RunDir(record.path).read_status().state for record in case.records} == {"finished"}
    requests = {run.run_id: ProbeRequest(tasks=run.config.evaluation.probes) for run in case.runs}
    work = probing_jobs(case.sweep, {run.run_id: case.sweep.run_dir(run.run_id) for run in case.runs}, requests)
    again = launch_slurm(case.sweep, case.runs, allow_dirty=True, kind=work)
    assert not again.submitted
    assert left_alone(again.left) == ["left alone: 2 finished"]


def test_ranks_on_two_nodes_share_a_probe(trained: Any) -> None:
    case = trained(kinds=["linear"], epochs=4)
    output = submit(case, "--devices", "2", "--run", case.runs[0].run_id).communicate(timeout=400)[0]
    assert "submitted probes of 1 runs of 2 x 1 (nodes x tasks)" in output
    record = case.records[0]
    case.wait(lambda: ProbeRecord.of(record.path).checked_status().state == "finished", "the end of the probe")
    case.wait_empty_queue()
    document = json.loads(next(record.probes_dir(160).glob("colour-*.json")).read_text())
    assert document["world_size"] == 2
    (alone,) = [entries for _, entries in probe_run(record.path, since=None)]
    assert [entry["top1"] for entry in document["probes"]] == pytest.approx([entry["top1"] for entry in alone], abs=0.1)
    assert not ProbeRecord.of(case.records[1].path).path.exists()
