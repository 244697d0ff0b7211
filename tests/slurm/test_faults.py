"""Faults on a real Slurm: each run ends with the result of an undisturbed run, or with a classified failure."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aimscale.sweeps.engine.launch import cancel
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.state.planned_sweep import PlannedSweep
from aimscale.sweeps.sweep_status import sweep_status

Losses = dict[str, list[tuple[int, float]]]

TWO_RANKS = [{"when": {"seed": 0}, "set": {"devices": 2}}]


def assert_as_undisturbed(fault: Any, undisturbed: Losses, rel: float = 1e-6) -> None:
    """Assert that all runs finish with the losses of undisturbed runs, and that the queue is empty."""
    fault.wait_state("finished")
    fault.wait_empty_queue()
    for run_id, rows in fault.losses().items():
        expected = undisturbed[run_id]
        assert [images for images, _ in rows] == [images for images, _ in expected]
        assert [loss for _, loss in rows] == pytest.approx([loss for _, loss in expected], rel=rel)


def warn(job_id: str) -> None:
    """Send the signal that Slurm sends before a time limit."""
    subprocess.run(["scancel", "--signal=USR2", "--batch", job_id], check=True)


def test_time_limit_saves_requeues_and_finishes(fault: Any, undisturbed: Losses) -> None:
    case = fault(step_s=8.0, slurm={"time_limit_min": 5})
    case.launch()
    assert_as_undisturbed(case, undisturbed)
    (ends,) = case.ends()
    assert ends[-1] == 0
    assert 75 in ends, "the first attempt's steps take four minutes"
    assert set(ends[:-1]) <= {75, -signal.SIGTERM}, "there is nothing to save before the imports are through"


def test_a_run_slower_than_planned_goes_on_in_a_longer_job(
    fault: Any, undisturbed: Losses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aimscale.sweeps.slurm.submit.time_limit_min", lambda *_: 5)  # what the plan says
    case = fault(step_s=11.0)  # four minutes: the warning comes after three
    (part,) = case.launch()
    case.wait(lambda: case.records[0].is_claimed() and case.job() != part.job_id, "another job")
    assert "TimeLimit=00:10:00" in slurm.command("scontrol", "show", "job", case.job())
    assert_as_undisturbed(case, undisturbed)
    assert slurm.jobs()[str(part.job_id)].state == "COMPLETED"


def test_one_job_of_an_array_is_requeued_and_never_the_others_nor_leaves_a_process(
    fault: Any, undisturbed: Losses
) -> None:
    case = fault(seeds=[0, 1], step_s=2.0, override=[{"when": {"seed": 0}, "set": {"runtime.num_workers": 2}}])
    (part,) = case.launch()
    assert part.num_jobs == 2
    case.wait_trained()
    name = case.job(0)
    number = subprocess.run(["squeue", "-h", "-j", name, "-o", "%A"], capture_output=True, text=True).stdout.strip()
    before = processes(number)
    assert len(before) > 4, "worker, trainer, server of loaders, and two loaders"
    warn(name)
    assert_as_undisturbed(case, undisturbed)
    assert case.ends() == [[75, 0], [0]]
    case.wait(lambda: not processes(number), "an end of all processes of the job")


def processes(number: str) -> list[Path]:
    """Return the processes with a job's id in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"SLURM_JOB_ID={number}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(folder)
    return found


def test_a_requeue_by_hand(fault: Any, undisturbed: Losses) -> None:
    case = fault()
    case.launch()
    case.wait_trained()
    subprocess.run(["scontrol", "requeue", case.job(0)], check=True)
    assert_as_undisturbed(case, undisturbed)
    assert case.ends() == [[75, 0]]


def test_a_lost_node_hands_the_run_to_another(fault: Any, undisturbed: Losses, cluster: Path) -> None:
    case = fault(step_s=3.0)
    case.launch()
    case.wait_trained()
    job_id = case.job()
    node = slurm.jobs()[job_id].reason
    os.kill(int((cluster / f"run/slurmd.{node}.pid").read_text()), signal.SIGKILL)
    try:
        case.wait(lambda: slurm.jobs()[job_id].reason not in (node, ""), "a second start of the job")
        assert_as_undisturbed(case, undisturbed)
    finally:
        subprocess.run(["slurmd", "-N", node], check=True)
    # The worker on the lost node may live on and finish; no attempt writes a step twice.
    lines = map(json.loads, case.records[0].metrics.read_text().splitlines())
    steps = [(line["attempt"], line["branch"], line["step"]) for line in lines]
    assert len(steps) == len(set(steps))


def test_scancel_of_one_job_leaves_its_run_to_the_others(fault: Any, undisturbed: Losses) -> None:
    case = fault(seeds=[0, 1])
    case.launch()
    case.wait_trained()
    name, other = case.job(0), case.job(1)
    subprocess.run(["scancel", name], check=True)
    assert_as_undisturbed(case, undisturbed)
    assert slurm.jobs()[name].state == "CANCELLED"
    assert (case.job(0), case.ends()) == (other, [[75, 0], [0]])
    assert not case.launch()


def test_out_of_memory_is_named_bounded_and_curable(fault: Any, undisturbed: Losses) -> None:
    case = fault(fault="hog", slurm={"extra": {"mem": "1536M"}})
    for num in (1, 2):
        assert len(case.launch()) == 1
        case.wait_empty_queue()
        case.wait(lambda: not case.records[0].is_held(), "the end of the trainer")
        assert len(case.records[0].read_attempts()) == num - 1, "who could tell was killed with it"
    assert not case.launch()
    assert case.records[0].read_status().state == "failed"
    assert [ended["reason_class"] for ended in case.records[0].read_attempts()] == ["oom", "oom"]
    (case.records[0].path / "healthy").touch()
    assert len(case.launch(retry=True)) == 1
    assert_as_undisturbed(case, undisturbed)


def test_two_nodes_are_preempted_and_come_back(fault: Any, undisturbed: Losses) -> None:
    case = fault(slurm={"partition": "main"}, override=TWO_RANKS)
    (part,) = case.launch()
    assert (part.shape.nodes, part.num_jobs) == (2, 1)
    case.wait_trained()
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--cpus-per-task=2", "-o/dev/null", "--wrap=sleep 20"]
    urgent_id = subprocess.run(urgent, check=True, capture_output=True, text=True).stdout.strip()
    try:
        case.wait_state("finished")
    finally:
        subprocess.run(["scancel", "--quiet", urgent_id], check=True)
    assert_as_undisturbed(case, undisturbed, rel=1e-4)
    assert case.ends() == [[75, 0]]
    assert [row["world_size"] for row in case.records[0].read_rows()] == [2, 2]


def test_a_rank_that_hangs_on_another_node_ends_the_others_and_no_sound_node_is_blamed(
    fault: Any, undisturbed: Losses
) -> None:
    case = fault(fault="stop", step_s=0.2, override=TWO_RANKS)
    case.launch()
    assert_as_undisturbed(case, undisturbed, rel=1e-4)
    record = case.records[0]
    hung, *_ = record.read_attempts()
    assert hung["reason_class"] == "node"
    assert "another rank is gone or stands still" in hung["reason"]
    assert record.failed_nodes() == []  # the others cannot tell which of them stands still


def test_of_two_nodes_the_broken_one_is_blamed_and_not_that_of_the_worker(fault: Any) -> None:
    case = fault(fault="broken", override=TWO_RANKS)
    case.launch()
    case.wait(lambda: case.records[0].read_attempts(), "an attempt")
    case.wait_empty_queue()
    first, *_ = case.records[0].read_attempts()
    assert first["given_back"]
    assert case.records[0].failed_nodes() == ["node2"]
    assert "uncorrectable ECC error" in first["reason"]


def test_a_node_that_cannot_start_the_interpreter_is_left_out_by_the_next_launch(fault: Any, tmp_path: Path) -> None:
    """It fails each job within a moment, is free again, and would take all jobs of the sweep from the healthy one."""
    header = struct.pack("<HHIQQQIHHHHHH", 2, 0xB7, 1, *4 * [0], 64, 56, *4 * [0])  # of a program for another processor
    (tmp_path / "broken").write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + header)
    (tmp_path / "python").write_text(
        f'#!/bin/bash\n[ $SLURMD_NODENAME = node1 ] && exec {tmp_path}/broken "$@"\nexec {sys.executable} "$@"\n'
    )
    for name in ("broken", "python"):
        (tmp_path / name).chmod(0o755)
    case = fault(budgets=[32], step_s=0, slurm={"python": str(tmp_path / "python")})
    case.launch()
    case.wait_empty_queue()
    (said,) = sweep_status(PlannedSweep(case.sweep), slurm.jobs()).failed_jobs
    assert "xec format error" in said
    (part,) = case.launch()
    assert part.excluded == ("node1",)
    case.wait_state("finished")
    case.wait_empty_queue()
    assert " NodeList=node2" in slurm.command("scontrol", "show", "job", str(part.job_id))


def test_cancel_saves_and_does_not_come_back_until_it_is_retried(fault: Any, undisturbed: Losses) -> None:
    case = fault()
    case.launch()
    case.wait_trained()
    done, failed = cancel(PlannedSweep(case.sweep))
    assert (len(done), failed) == (1, [])
    case.wait_empty_queue()
    assert case.records[0].read_status().state == "preempted"
    assert case.ends() == [[75]]
    assert not case.launch()
    assert len(case.launch(retry=True)) == 1
    assert_as_undisturbed(case, undisturbed)


def test_workers_that_srun_starts_on_two_nodes_share_a_sweep_and_no_run_is_a_rank_of_two(
    fault: Any, undisturbed: Losses
) -> None:
    case = fault(seeds=[0, 1])
    words = [sys.executable, "-m", "aimscale", "launch", str(case.sweep.source), "--root", str(case.sweep.root)]
    step = ["srun", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--label"]
    said = subprocess.run([*step, *words, "--on=local", "--devices=1"], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    assert said.stdout.count(": started ") == said.stdout.count(": finished ") == 2, said.stdout
    assert [row["world_size"] for record in case.records for row in record.read_rows()] == [1] * 4
    assert case.losses() == undisturbed


def test_the_interpreter_may_be_a_command_that_enters_a_container(fault: Any, undisturbed: Losses) -> None:
    """As `apptainer exec` does: into a mount namespace of its own, then it becomes the interpreter."""
    case = fault(slurm={"python": f"unshare --mount {sys.executable}"})
    case.launch()
    case.wait_trained()
    warn(case.job())
    assert_as_undisturbed(case, undisturbed)
    assert case.ends() == [[75, 0]]
