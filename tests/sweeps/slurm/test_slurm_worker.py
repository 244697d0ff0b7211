"""End of a Slurm job, with fake Slurm commands; with a real Slurm: tests/slurm."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aimscale.sweeps.engine import devices
from aimscale.sweeps.engine.slurm_worker import WorkerJob, WorkerJobError
from aimscale.sweeps.plan.planner import plan
from aimscale.sweeps.slurm.submit import JobShape
from aimscale.sweeps.state.record import RunRecord
from aimscale.sweeps.state.sweep_dir import prepare_directory

STAND_IN = str(Path(__file__).parents[1] / "stand_in.py")


@pytest.fixture
def worker_job(
    write_sweep: Any, program: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[WorkerJob, RunRecord]]:
    """Make a job on node1 of a cluster of two nodes, and the run that it executes."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    program("squeue", "echo '7|RUNNING|node1'")
    program("sinfo", "echo node1; echo node2")
    program("scontrol", f'echo "$@" >> {tmp_path}/told')
    program("srun", "exit 1")
    job = {"JOB_ID": "7", "JOB_NODELIST": "node1", "JOB_END_TIME": str(time.time() + 3600), "JOB_PARTITION": "main"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(devices, "TRAIN_COMMAND", (STAND_IN,))
    sweep = write_sweep(sizes=["rung-32"], slurm={"gpus": False})
    prepare_directory(sweep)
    (run,) = plan(sweep)
    record = RunRecord(sweep.run_dir(run.run_id))
    RunRecord.create(record.path, run.config)
    yield WorkerJob(directory=sweep.directory, shape=JobShape(nodes=1, devices=1)), record
    for number, handler in before.items():
        signal.signal(number, handler)


def told(tmp_path: Path) -> list[str]:
    """Return the commands that Slurm received."""
    path = tmp_path / "told"
    return path.read_text().splitlines() if path.exists() else []


def test_a_run_that_failed_on_this_node_goes_on_on_another_while_there_is_one(
    worker_job: tuple[WorkerJob, RunRecord], program: Callable[[str, str], None], tmp_path: Path
) -> None:
    execute, record = worker_job
    record.write_status(state="failed", reason="node node1 failed", reason_class="node")
    ended = {"exit_code": None, "saved": record.saved_progress(), "reason_class": "node"}
    record.append_attempt(attempt=1, ended=1.0, device_hours=0.0, reason="", failed_nodes=["node1"], **ended)
    assert execute() == "requeued"
    assert told(tmp_path) == ["requeue 7", "update JobId=7 ExcNodeList=node1"]
    assert not (record.path / "starts").exists()
    program("sinfo", "echo node1")
    assert execute() == "nothing is left"
    assert record.read_status().state == "finished"
    assert len(told(tmp_path)) == 2


def test_a_time_limit_in_which_nothing_could_save_fails_and_is_not_requeued_for_ever(
    worker_job: tuple[WorkerJob, RunRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute, record = worker_job
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 150))  # 120 s of them to save
    with pytest.raises(WorkerJobError, match="time_min"):
        execute()
    assert not told(tmp_path)
    assert not (record.path / "starts").exists()


def test_a_run_that_failed_for_good_fails_the_job(worker_job: tuple[WorkerJob, RunRecord], tmp_path: Path) -> None:
    execute, record = worker_job
    (record.path / "behaviour").write_text("crash")
    with pytest.raises(WorkerJobError, match=record.name):
        execute()
    assert len(record.read_attempts()) == 2
    assert not told(tmp_path)
