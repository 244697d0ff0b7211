"""End of a Slurm job, with fake Slurm commands; with a real Slurm: tests/slurm."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aimscale.harness.run.lock import Lock
from aimscale.sweeps.engine import active_run, looks, queue, slurm_worker, worker
from aimscale.sweeps.engine.launch import prepare_launch
from aimscale.sweeps.engine.slurm_worker import WorkerJobError, execute_job
from aimscale.sweeps.planning.aim_run import AimRun
from aimscale.sweeps.planning.costs import cost_cards
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.sweepfile import load_sweep
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.slurm.jobs import JobArray, JobShape, record_array, submitted_arrays
from aimscale.sweeps.state.attempts import may_retry
from aimscale.sweeps.state.planned_sweep import plan_sweep
from aimscale.sweeps.state.record import RunRecord, prepare_directory

STAND_IN = str(Path(__file__).parents[1] / "stand_in.py")


@pytest.fixture
def worker_job(
    write_sweep: Any, program: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Callable[[], str], RunRecord]:
    """Make a job on node1 of a cluster of two nodes, and the run that it executes."""
    program("squeue", f'case "$*" in *%x*) cat {tmp_path}/excluded;; *) echo "7|RUNNING|node1";; esac')
    (tmp_path / "excluded").write_text("(null)")
    program("sinfo", "echo node1; echo node2")
    program("scontrol", f'echo "$@" >> {tmp_path}/told')
    program("srun", "exit 1")
    job = {"JOB_ID": "7", "JOB_NODELIST": "node1", "JOB_END_TIME": str(time.time() + 3600), "JOB_PARTITION": "main"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(AimRun, "command", lambda run, run_dirs: [STAND_IN, *map(str, run_dirs)])
    sweep = write_sweep(sizes=["rung-32"], slurm={"gpus": False})
    prepare_directory(sweep)
    (run,) = plan(sweep)
    record = RunRecord(sweep.run_dir(run.run_id))
    RunRecord.create(record.path, run.config)
    return lambda: execute_job(sweep.directory, JobShape(nodes=1, devices=1)), record


def told(tmp_path: Path) -> list[str]:
    """Return the commands that Slurm received."""
    path = tmp_path / "told"
    return path.read_text().splitlines() if path.exists() else []


def test_a_run_that_failed_on_this_node_goes_on_on_another_while_there_is_one(
    worker_job: tuple[Callable[[], str], RunRecord], program: Callable[[str, str], None], tmp_path: Path
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
    worker_job: tuple[Callable[[], str], RunRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute, record = worker_job
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 150))  # 120 s of them to save
    with pytest.raises(WorkerJobError, match="time_limit_min"):
        execute()
    assert not told(tmp_path)
    assert not (record.path / "starts").exists()


def test_a_run_slower_than_planned_gets_a_longer_job_instead_of_the_same_limit_again(
    worker_job: tuple[Callable[[], str], RunRecord],
    program: Callable[[str, str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    execute, record = worker_job
    (tmp_path / "script").write_text("#SBATCH --array=0-7%8\n#SBATCH --output=/slurm/%A_%a.out\n")
    program("scontrol", f'case "$1" in write) cat {tmp_path}/script;; *) echo "$@" >> {tmp_path}/told;; esac')
    program("sbatch", f'echo "$@" "$(cat)" "$SLURM_ARRAY_JOB_ID" >> {tmp_path}/told; echo 12')
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(time.time() - 3600))
    sweep = load_sweep(record.path.parents[1], record.path.parents[2])
    array = JobArray(job_id="7", number=1, shape=JobShape(nodes=1, devices=1), launch="a", script="b", request="c")
    slurm.submissions_file(sweep).parent.mkdir()
    record_array(sweep, array)
    (record.path / "behaviour").write_text("wait")
    (card,) = cost_cards(sweep, plan(sweep))
    record.write_status(images_per_s=card.images_executed / (3 * 3600))

    def later() -> float:
        return time.time() + (3500 if (record.path / "starts").exists() else 0)

    monkeypatch.setattr(worker, "time", SimpleNamespace(time=later, sleep=time.sleep, monotonic=time.monotonic))
    assert execute() == "submitted anew, with more time, as 12"
    words = " ".join(told(tmp_path)).split()
    assert words[:1] == ["--parsable"]
    assert 350 < int(words[1].removeprefix("--time=")) < 375, "twice three hours"
    assert words[2:] == ["#SBATCH", "--output=/slurm/%j.out"]
    assert [(each.job_id, each.launch) for each in submitted_arrays(sweep)] == [("7", "a"), ("12", "a")]


def test_a_run_that_failed_before_its_first_step_is_given_to_another_node_uncounted(
    worker_job: tuple[Callable[[], str], RunRecord], program: Callable[[str, str], None], tmp_path: Path
) -> None:
    """A broken node ends each run at once; it must not use up the attempts of any."""
    execute, record = worker_job
    (record.path / "behaviour").write_text("crash")
    assert execute() == "requeued"
    assert told(tmp_path) == ["requeue 7", "update JobId=7 ExcNodeList=node1"]
    assert record.failed_nodes() == ["node1"]
    assert may_retry(record.read_attempts(), "code")
    program("sinfo", "echo node1")
    assert execute() == f"failed: {record.name}"
    assert len(record.read_attempts()) == 3, "no other node is left; it is tried twice here"
    assert len(told(tmp_path)) == 2


def test_of_several_nodes_the_one_that_failed_first_is_excluded(
    write_sweep: Any,
    worker_job: tuple[Callable[[], str], RunRecord],
    program: Callable[[str, str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Node2 cannot start the program; the worker, which node1 executes, tries two runs."""
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1, 2], base={"devices": 2}, slurm={"gpus": False})
    prepare_directory(sweep)
    records = [RunRecord(sweep.run_dir(run.run_id)) for run in plan(sweep)]
    words = ("no GPU", "srun: error: node2: task 1: Exited with exit code 1", "srun: error: node1: task 0: Terminated")
    fails = "; ".join(['case "$*" in *sleep*) exit 1;; esac', *(f"echo '{each}'" for each in words), "exit 143"])
    program("srun", fails)
    program("sinfo", "echo node1; echo node2; echo node3")
    program("scontrol", f'case "$*" in *hostnames*) echo node1; echo node2;; *) echo "$@" >> {tmp_path}/told;; esac')
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    assert execute_job(sweep.directory, JobShape(nodes=2, devices=1)) == "requeued"
    assert told(tmp_path) == ["requeue 7", "update JobId=7 ExcNodeList=node2"]
    assert [record.failed_nodes() for record in records] == [["node2"], ["node2"], []]
    assert all(may_retry(record.read_attempts(), "code") for record in records)
    assert {record.read_status().reason for record in records[:2]} == {"no GPU"}


def test_a_node_without_the_gpus_that_were_asked_for_takes_no_run(
    worker_job: tuple[Callable[[], str], RunRecord],
    program: Callable[[str, str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    execute, record = worker_job
    file = record.path.parents[1] / "sweep.yaml"
    file.write_text(file.read_text().replace("gpus: false", "gpus: true"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    program("sinfo", "echo node1; echo node2; echo node3")
    (tmp_path / "excluded").write_text("node3")
    assert execute() == "requeued"
    assert told(tmp_path) == ["requeue 7", "update JobId=7 ExcNodeList=node3,node1"]
    program("sinfo", "echo node1; echo node3")
    with pytest.raises(WorkerJobError, match="0 GPUs"):
        execute()
    assert not (record.path / "starts").exists()


def test_a_failure_late_in_a_job_is_tried_again_by_the_next(
    worker_job: tuple[Callable[[], str], RunRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute, record = worker_job
    (record.path / "behaviour").write_text("crash later")
    record_end = active_run.record_end

    def later(*args: Any, **options: Any) -> str:
        monkeypatch.setattr(queue, "MIN_START_TIME_S", 3600)
        return record_end(*args, **options)

    monkeypatch.setattr(active_run, "record_end", later)
    assert execute() == "requeued"
    assert len(record.read_attempts()) == 1


def test_runs_that_are_added_while_a_job_works_are_executed_by_it(
    worker_job: tuple[Callable[[], str], RunRecord], write_sweep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute, record = worker_job
    run_worker = slurm_worker.run_worker

    def add(*args: Any) -> Any:
        result = run_worker(*args)
        prepare_directory(write_sweep(sizes=["rung-32"], seeds=[0, 1], slurm={"gpus": False}))
        return result

    monkeypatch.setattr(slurm_worker, "run_worker", add)
    assert execute() == "nothing is left"
    assert len(list(record.path.parent.glob("*/results.json"))) == 2


def test_a_job_that_was_started_again_waits_for_the_process_of_its_first_start(
    worker_job: tuple[Callable[[], str], RunRecord], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It lives on where a node lost its slurmd, and Slurm ends it when the node is back, perhaps after this start."""
    execute, record = worker_job
    monkeypatch.setattr(looks, "RESCAN_S", 0.2)
    first = Lock(record.claim)
    assert first.take(job_id="7", devices=1, nodes="node2")
    record.write_status(state="running", heartbeat=time.time(), host="node2")
    release = threading.Timer(2.0, first.release)
    release.start()
    assert execute() == "nothing is left"
    release.join()
    assert record.read_status().state == "finished"
    assert "executed by an earlier start of this job on node2" in capsys.readouterr().out


def test_a_launch_submits_nothing_for_a_run_whose_last_attempt_it_records_as_lost(
    worker_job: tuple[Callable[[], str], RunRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, record = worker_job
    monkeypatch.setattr("aimscale.sweeps.engine.launch.raise_on_problems", lambda *_: None)
    monkeypatch.setattr(slurm, "job_states", lambda _: {"7": "OUT_OF_MEMORY"})
    for num_attempts, is_startable in ((1, True), (2, False)):
        lock = Lock(record.claim)
        lock.take(job_id="7", devices=1, nodes="node1")
        lock.release()
        record.write_status(state="running", heartbeat=time.time() - 3600)
        planned = plan_sweep(record.path.parents[1], record.path.parents[2])
        prepare_launch(planned, retry=False)
        assert len(record.read_attempts()) == num_attempts
        assert bool(planned.startable()) == is_startable
    prepare_launch(planned, retry=True)
    assert planned.startable()
