"""Each fault on a real Slurm ends as it should: the result of an undisturbed run, or a classified failure."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from aimscale.sweeps.engine.start import left_alone

from aimscale.sweeps.engine.stop import cancel, retry
from aimscale.sweeps.slurm import commands as slurm

Losses = dict[str, list[tuple[int, float]]]


TWO_RANKS = [{"when": {"seed": 0}, "set": {"devices": 2}}]


def assert_as_undisturbed(fault: Any, undisturbed: Losses, rel: float = 1e-6) -> None:
    """All runs finished with the losses of runs without a fault, and nothing is left in the queue."""
    fault.wait_state("finished")
    fault.wait_empty_queue()
    for run_id, rows in fault.losses().items():
        expected = undisturbed[run_id]
        assert [images for images, _ in rows] == [images for images, _ in expected]
        assert [loss for _, loss in rows] == pytest.approx([loss for _, loss in expected], rel=rel)


def job(fault: Any, index: int = 0) -> str:
    claim = fault.records[index].read_claim()
    if claim is None:  # the work is over, and its job gave it back
        return str(fault.records[index].checked_status().job_id)
    assert claim.job_id is not None
    return str(claim.job_id)


def kinds(fault: Any) -> list[str | None]:
    return [ended["reason_class"] for ended in fault.records[0].read_attempts() if "exit_code" in ended]


def test_time_limit_saves_requeues_and_finishes(fault: Any, undisturbed: Losses) -> None:
    case = fault(step_s=5.0, slurm={"time_min": 1, "signal_delay_s": 15})
    case.launch()
    assert_as_undisturbed(case, undisturbed)
    *limited, last = [ended["exit_code"] for ended in case.records[0].read_attempts()]
    assert last == 0
    assert 75 in limited, "the first attempt's steps take two minutes"
    assert set(limited) <= {75, -signal.SIGUSR2}, "there is nothing to save before the imports are through"


def test_a_step_with_loader_processes_saves_requeues_and_leaves_none(fault: Any, undisturbed: Losses) -> None:
    case = fault(override=[{"when": {"size": "rung-32"}, "set": {"runtime.num_workers": 2}}])
    case.launch()
    case.wait_trained()
    number = job(case)
    assert len(loaders(number)) == 2
    subprocess.run(["scontrol", "requeue", number], check=True)
    assert_as_undisturbed(case, undisturbed)
    assert [ended["exit_code"] for ended in case.records[0].read_attempts()] == [75, 0]
    case.wait(lambda: not processes(number), "an end of all processes of the job")


def processes(number: str) -> list[Path]:
    """Processes that have a job's name in their environment, the leader first."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"SLURM_JOB_ID={number}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(folder)
    return found


def loaders(number: str) -> list[Path]:
    """Those of them that a server without threads has started."""
    servers = {
        folder.name
        for folder in processes(number)
        if b"multiprocessing.forkserver" in (folder / "cmdline").read_bytes()
    }
    parents = {folder: (folder / "stat").read_text().rpartition(")")[2].split()[1] for folder in processes(number)}
    return [folder for folder, parent in parents.items() if parent in servers]


def test_one_element_of_an_array_is_requeued_and_never_the_others(fault: Any, undisturbed: Losses) -> None:
    case = fault(seeds=[0, 1])
    case.launch()
    case.wait_trained(0)
    case.wait_trained(1)
    slurm.cancel([job(case, 0)], signal="USR2")
    assert_as_undisturbed(case, undisturbed)
    ends = [[ended["exit_code"] for ended in record.read_attempts()] for record in case.records]
    assert ends == [[75, 0], [0]]


def test_one_job_executes_two_runs_saves_both_and_goes_on_with_both(fault: Any, undisturbed: Losses) -> None:
    case = fault(seeds=[0, 1], runs_per_device=2)
    (part,) = case.launch().submitted
    assert (len(part.run_ids), part.num_jobs) == (2, 1)
    case.wait_trained(0)
    case.wait_trained(1)
    assert job(case, 0) == job(case, 1)
    slurm.cancel([job(case, 0)], signal="USR2")
    assert_as_undisturbed(case, undisturbed)
    ends = [[ended["exit_code"] for ended in record.read_attempts()] for record in case.records]
    assert ends == [[75, 0], [75, 0]]


def test_a_lost_node_hands_the_run_to_another(fault: Any, undisturbed: Losses, cluster: Path) -> None:
    case = fault(step_s=3.0)
    case.launch()
    case.wait_trained()
    node = slurm.jobs()[job(case)].reason
    os.kill(int((cluster / f"run/slurmd.{node}.pid").read_text()), signal.SIGKILL)
    try:
        case.wait(lambda: case.records[0].read_claim().restarts == 1, "a second incarnation of the job")
        assert_as_undisturbed(case, undisturbed)
    finally:
        subprocess.run(["slurmd", "-N", node], check=True)
    # The trainer on the lost node may live on and finish; its successor waits, and no attempt writes a step twice.
    lines = map(json.loads, case.records[0].metrics.read_text().splitlines())
    steps = [(line["attempt"], line["branch"], line["step"]) for line in lines]
    assert len(steps) == len(set(steps))


def test_scancel_of_one_element_leaves_the_other_and_resumes_later(fault: Any, undisturbed: Losses) -> None:
    case = fault(seeds=[0, 1])
    case.launch()
    case.wait_trained(0)
    case.wait_trained(1)
    subprocess.run(["scancel", job(case, 0)], check=True)
    case.wait_state("finished", "preempted")
    assert sorted(line.state for line in case.status()) == ["finished", "preempted"]
    case.wait_empty_queue()
    again = case.launch()
    assert [part.run_ids for part in again.submitted] == [(case.runs[0].run_id,)]
    assert left_alone(again.left) == ["left alone: 1 finished"]
    assert_as_undisturbed(case, undisturbed)


def test_out_of_memory_is_named_bounded_and_curable(fault: Any, undisturbed: Losses) -> None:
    case = fault(fault="hog", slurm={"extra": {"mem": "1536M"}})
    case.launch()
    case.wait_state("dead", "failed")
    assert case.status()[0].status.reason_class == "oom"
    case.launch()
    case.wait_state("dead", "failed")
    case.wait_empty_queue()
    assert not case.launch().submitted
    assert case.records[0].checked_status().state == "failed"
    assert kinds(case) == ["oom", "oom"]
    (case.records[0].path / "healthy").touch()
    assert retry(case.sweep, [case.runs[0].run_id]) == ([case.runs[0].run_id], [])
    case.launch()
    assert_as_undisturbed(case, undisturbed)


def test_a_crash_in_user_code_is_tried_once_more_and_then_left(fault: Any, undisturbed: Losses) -> None:
    case = fault(fault="crash")
    case.launch()
    case.wait_state("failed")
    status = case.records[0].checked_status()
    assert (status.reason_class, status.reason) == ("code", "RuntimeError: the user's own code is wrong")
    assert "user's own code" in case.records[0].last_log().read_text()
    case.wait_empty_queue()
    assert slurm.jobs()[job(case)].state == "FAILED"
    again = case.launch()
    assert not again.submitted
    assert "`aimscale retry`" in left_alone(again.left)[0]


def test_two_nodes_are_preempted_and_come_back_on_one(fault: Any, undisturbed: Losses) -> None:
    case = fault(slurm={"extra": {"nodes": "1-2"}, "partition": "main"}, override=TWO_RANKS)
    case.launch()
    case.wait_trained()
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--cpus-per-task=2", "-o/dev/null", "--wrap=sleep 60"]
    urgent_id = subprocess.run(urgent, check=True, capture_output=True, text=True).stdout.strip()
    try:
        case.wait_state("finished")
    finally:
        slurm.cancel([urgent_id])
    assert_as_undisturbed(case, undisturbed, rel=1e-4)
    rows = case.records[0].read_rows()
    assert [row["world_size"] for row in rows][-1] == 1
    log = (case.records[0].log_file(1)).read_text()
    assert "2 rank(s)" in log


def test_a_rank_that_hangs_on_another_node_ends_the_others_and_its_node_is_named(
    fault: Any, undisturbed: Losses
) -> None:
    """Its watcher lives, its process stands still: nothing but the other rank's watch can notice."""
    case = fault(fault="stop", step_s=0.2, override=TWO_RANKS)
    case.launch()
    assert_as_undisturbed(case, undisturbed, rel=1e-4)
    record = case.records[0]
    hung, *_ = record.read_attempts()
    assert hung["reason_class"] == "node"
    assert "rank 1 on node2 was not heard of for" in hung["reason"]
    assert record.failed_nodes() == ["node2"]
    assert "was not heard of" in record.log_file(1).read_text()


def test_cancel_saves_and_does_not_come_back(fault: Any) -> None:
    case = fault()
    case.launch()
    case.wait_trained()
    done, failed = cancel(case.sweep, [case.runs[0].run_id])
    assert (len(done), failed) == (1, [])
    case.wait_state("preempted")
    case.wait_empty_queue()
    assert case.records[0].checked_status().state == "preempted"
