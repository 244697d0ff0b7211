"""Submission to a real Slurm: arrays and scripts, each job once, and refusals in one sentence."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
from commands import say

from aimscale.aim.errors import UserError
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.slurm.jobs import live_jobs
from aimscale.sweeps.state.record import RunRecord

LAUNCHER = """
    from pathlib import Path
    from aimscale.sweeps.engine.slurm_worker import launch_slurm
    from aimscale.sweeps.state.planned_sweep import plan_sweep
    planned = plan_sweep({path!r}, Path({root!r}))
    print(sum(part.num_jobs for part in launch_slurm(planned, allow_dirty=True)))
"""


def test_two_launches_at_once_submit_each_job_once_in_split_arrays(fault: Any) -> None:
    case = fault(seeds=[0, 1, 2, 3, 4, 5], budgets=[32], step_s=0)
    program = textwrap.dedent(LAUNCHER).format(path=str(case.sweep.source), root=str(case.sweep.root))
    launchers = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(int(launcher.communicate()[0]) for launcher in launchers) == [0, 6]
    arrays = {each.info.job_id.split("_")[0] for each in live_jobs(case.sweep, slurm.jobs())}
    assert len(arrays) == 2, "MaxArraySize is 4"
    case.wait_state("finished")
    case.wait_empty_queue()
    assert case.ends() == [[0]] * 6
    assert not case.launch()
    (case.records[0].path / "status.json").unlink()  # a run that was lost starts again, alone
    assert [part.num_jobs for part in case.launch()] == [1]
    case.wait_empty_queue()


def test_one_job_at_a_time_over_arrays_of_two_shapes(fault: Any) -> None:
    two_ranks = [{"when": {"seed": 1}, "set": {"devices": 2}}]
    case = fault(seeds=[0, 1], budgets=[32], slurm={"max_jobs": 1, "setup": []}, override=two_ranks)
    earlier = case.runs[0].config
    earlier = earlier.model_copy(update={"training": earlier.training.model_copy(update={"seed": 7})})
    RunRecord.create(case.sweep.run_dir(earlier.run_id), earlier)
    told = say("launch", case.sweep.source, "--root", case.sweep.root, "--allow-dirty")
    assert told.count("submitted 1 jobs of") == 1, told
    assert [earlier.run_id in line for line in told.splitlines() if line.startswith("unplanned")] == [True]

    def over() -> bool:
        phases = [job.phase for job in slurm.jobs().values()]
        assert phases.count("running") <= 1
        return set(phases) <= {"ended"}

    for number in (1, 2):
        case.wait(over, "the end of a job")
        assert sum(part.num_jobs for part in case.launch()) == 2 - number
    assert [row["world_size"] for record in case.records for row in record.read_rows()] == [1, 2]


def test_a_node_on_which_a_run_failed_is_left_out_and_named(fault: Any) -> None:
    case = fault(slurm={"setup": []}, budgets=[32])
    record, run = case.records[0], case.runs[0]
    RunRecord.create(record.path, run.config)
    record.write_status(state="failed", reason="node node1 failed", reason_class="node")
    ended = {"exit_code": None, "saved": record.saved_progress(), "reason_class": "node"}
    record.append_attempt(attempt=1, ended=1.0, device_hours=0.0, reason="", failed_nodes=["node1"], **ended)
    told = say("launch", case.sweep.source, "--root", case.sweep.root, "--allow-dirty")
    assert "excluded  node1:" in told
    case.wait_state("finished")
    case.wait_empty_queue()
    job = told.partition(" runs as ")[2].split()[0]
    assert " NodeList=node2" in slurm.command("scontrol", "show", "job", job)


def test_a_run_of_two_nodes_is_evaluated_by_a_job_of_one_that_its_own_job_submits(fault: Any, labelled: Any) -> None:
    task = {"task": "colour", "train": str(labelled / "train"), "test": str(labelled / "test"), "kinds": ["knn"]}
    wide = [{"when": {"size": "rung-32"}, "set": {"devices": 2, "probes": [task]}}]
    case = fault(budgets=[32], slurm={"setup": []}, override=wide)
    assert (case.runs[0].devices, case.runs[0].evaluation_devices) == (2, 1)
    (part,) = case.launch()
    assert (part.shape.nodes, part.num_jobs) == (2, 1)
    record = case.records[0]
    case.wait(lambda: any(row.get("probes") for row in record.read_rows()), "a probe")
    case.wait_empty_queue()
    logs = [log.read_text() for log in sorted((case.sweep.directory / "slurm").glob("*.out"))]
    assert len(logs) == 2
    assert "of 1 devices: evaluation" in logs[0]
    assert all(log.splitlines()[-1] == "worker ends: nothing is left" for log in logs)
    assert [row["world_size"] for row in record.read_rows()] == [2]
    for of_stage, devices in ((record, 2), (record.evaluation, 1)):
        (ended,) = of_stage.read_attempts()
        assert ended["exit_code"] == 0
        spent_s = ended["device_hours"] * 3600
        assert spent_s == pytest.approx(devices * (ended["ended"] - ended["started"]), rel=0.05)
    assert case.launch() == []


def test_a_changed_request_reaches_jobs_that_wait(fault: Any) -> None:
    fields: dict[str, Any] = {"budgets": [32], "step_s": 0}
    (held,) = fault(slurm={"extra": {"begin": "now+1hour"}}, **fields).launch()
    assert slurm.jobs()[str(held.job_id)].phase == "pending"
    case = fault(slurm={"time_limit_min": 9}, **fields)
    (part,) = case.launch()
    case.wait_state("finished")
    case.wait_empty_queue()
    assert "TimeLimit=00:09:00" in slurm.command("scontrol", "show", "job", str(part.job_id))
    assert slurm.jobs()[str(held.job_id)].state == "CANCELLED"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"partition": "mian"}, "partition"),
        ({"extra": {"constraint": "gold"}}, "feature"),
        ({"extra": {"mem": "1000000G"}}, "[Mm]emory"),
    ],
)
def test_what_slurm_refuses_is_one_sentence(fault: Any, fields: dict[str, Any], words: str) -> None:
    case = fault(slurm=fields)
    with pytest.raises(UserError, match=words) as caught:
        case.launch()
    assert "\n" not in str(caught.value)
    assert not case.records[0].path.exists()
