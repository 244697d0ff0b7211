"""A rank's life as a job: ranks that come at different times, what ends them all, and what is recorded of it."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from trainers import free_port

from aimscale.aim.errors import UserError
from aimscale.harness.distributed import job as job_module
from aimscale.harness.distributed.group import LaunchError
from aimscale.harness.distributed.job import Job, execute_job
from aimscale.harness.run.directory import EXIT_CRASHED, EXIT_FINISHED, EXIT_USER_ERROR, SHARED, RunDir
from aimscale.harness.step.checkpoint import CheckpointError

Run = Callable[..., list[int]]


@pytest.fixture(autouse=True, scope="module")
def _short_times() -> Iterator[None]:
    """Let ranks wait for the word of a lost one for a second; forks inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_module, "FAILURE_NOTE_TIMEOUT_S", 1.0)
        yield


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    return run


def be_rank(rank: int, run: RunDir, action: Callable[[Job], None], port: int = 0, late: int | None = None) -> None:
    """Do `action` as a rank of a job, on a node of its own; keeps what it says of its end."""
    os.environ["SLURMD_NODENAME"] = f"node-{rank}"
    os.environ["MASTER_PORT"] = str(port or os.environ["MASTER_PORT"])
    sys.stderr = said(run, rank).open("w")
    time.sleep(3 if rank == late else 0)
    try:
        sys.exit(execute_job(run, "cpu", action))
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def said(run: RunDir, rank: int) -> Path:
    return run.path.with_name(f"said-{rank}")


def reduce_within(job: Job, seconds: float) -> None:
    with job.group.collective_timeout(seconds):
        job.group.sum_tensor(torch.ones(1))


def one_does(rank: int, action: Callable[[RunDir], None]) -> Callable[[Job], None]:
    """All ranks take a step; then one does something, while the others wait for it in the next step."""

    def work(job: Job) -> None:
        reduce_within(job, 60)
        if job.group.rank == rank:
            action(job.folder)
        reduce_within(job, 2)

    return work


def be_killed(run: RunDir) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stand_still(run: RunDir) -> None:
    """Stop, until a launcher's part is done: what is left once the run has failed is killed."""
    stopped = os.getpid()
    if os.fork() == 0:
        while run.read_status().state != "failed":
            time.sleep(0.1)
        os.kill(stopped, signal.SIGKILL)
        os._exit(0)
    os.kill(stopped, signal.SIGSTOP)


def fail(run: RunDir) -> None:
    raise ValueError("a bug")


@pytest.mark.slow
def test_ranks_may_come_early_or_late_after_a_holder_that_died_under_the_same_address(
    run: RunDir, in_processes: Run
) -> None:
    """And while they work, no rank opens a file of the run."""
    port = free_port()

    def look(job: Job) -> None:
        opened: list[str] = []
        sys.addaudithook(lambda name, told: opened.append(str(told[0])) if name == "open" else None)
        job.group.barrier()
        time.sleep(2)
        assert not [name for name in opened if str(run.path) in name]

    for late in (None, 0, 1):
        assert in_processes(be_rank, run, one_does(0, be_killed), port, world_size=2) == [-signal.SIGKILL, EXIT_CRASHED]
        assert not run.is_held()
        assert in_processes(be_rank, run, look, port, late, world_size=2) == [EXIT_FINISHED] * 2
        assert not list(run.path.glob(".writer-*"))


def test_all_ranks_are_turned_away_by_one_sentence(run: RunDir, in_processes: Run) -> None:
    def work(job: Job) -> None:
        raise AssertionError("the run is held by another process")

    with run.hold():
        assert in_processes(be_rank, run, work, world_size=2) == [EXIT_USER_ERROR] * 2
    assert said(run, 0).read_text() == said(run, 1).read_text()
    assert f"process {os.getpid()} on" in said(run, 0).read_text()
    assert run.read_status().state == "created"


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("action", "ending", "reason", "reason_class"),
    [
        (fail, EXIT_CRASHED, "ValueError: a bug", "code"),
        (be_killed, -signal.SIGKILL, "another rank is gone", "node"),
        (stand_still, -signal.SIGKILL, "stands still", "node"),
    ],
)
def test_what_befalls_one_rank_ends_all_and_a_failure_is_told_with_its_node(
    run: RunDir, in_processes: Run, victim: int, action: Callable[[RunDir], None], ending: int, reason: str,
    reason_class: str,
) -> None:  # fmt: skip
    codes = in_processes(be_rank, run, one_does(victim, action), world_size=2)
    assert (codes[victim], codes[1 - victim]) == (ending, EXIT_CRASHED)
    status = run.read_status()
    assert (status.state, status.reason_class) == ("failed", reason_class)
    assert reason in str(status.reason)
    assert status.failed_on == (f"node-{victim}" if action is fail else None), "no healthy node is blamed"
    last = said(run, 1 - victim).read_text().splitlines()[-1]
    assert last.startswith("rank" if action is fail else "another rank is gone or stands still")
    if action is fail:
        assert f"rank {victim} on node-{victim} failed: ValueError: a bug" in said(run, 1 - victim).read_text()


@pytest.mark.parametrize(
    ("error", "failed_on"),
    [
        (LaunchError("no CUDA device"), "node-1"),
        (OSError(errno.ENOSPC, "No space left on device", "/proc/there"), "node-1"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), SHARED),
        (CheckpointError("damaged"), SHARED),
        (RuntimeError("NCCL error: unhandled system error"), None),
    ],
    ids=str,
)
def test_what_failed_is_named_by_whoever_tells_it_first(
    run: RunDir, in_processes: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, failed_on: str | None
) -> None:
    """Rank 1 fails; rank 0, on a sound node, raises the same and is the first to tell."""
    monkeypatch.setattr(job_module, "FAILURE_NOTE_TIMEOUT_S", 30.0)

    def work(job: Job) -> None:
        def fail() -> None:
            if job.group.rank == 1:
                raise error

        try:
            job.group.run_on_all_ranks(fail)
        except Exception:
            time.sleep(job.group.rank)
            raise

    assert 0 not in in_processes(be_rank, run, work, world_size=2)
    status = run.read_status()
    assert (status.state, status.failed_on) == ("failed", failed_on)


def test_an_error_of_the_first_rank_is_named_by_its_node_on_all(run: RunDir, in_processes: Run) -> None:
    def work(job: Job) -> None:
        def fail() -> None:
            raise LaunchError("no CUDA device")

        try:
            job.group.broadcast_from_rank0(fail)
        except LaunchError:
            time.sleep(1 - job.group.rank)
            raise

    assert 0 not in in_processes(be_rank, run, work, world_size=2)
    assert run.read_status().failed_on == "node-0"


def test_a_rank_that_dies_while_they_meet_is_told_in_a_sentence(
    run: RunDir, in_processes: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunDir, "hold", be_killed)  # called by the first rank alone
    assert in_processes(be_rank, run, reduce_within, world_size=2) == [-signal.SIGKILL, EXIT_CRASHED]
    assert said(run, 1).read_text().startswith("another rank is gone or stands still, and its own entry in logs/")


def test_a_rank_that_is_long_in_coming_outside_of_a_step_is_waited_for(run: RunDir, in_processes: Run) -> None:
    def work(job: Job) -> None:
        reduce_within(job, 2)
        time.sleep(4 * job.group.rank)
        job.group.barrier()
        reduce_within(job, 2)
        time.sleep(4 * (1 - job.group.rank))
        job.group.sum_tensor(torch.ones(1))
        report_progress = job.progress_callback()
        report_progress()
        time.sleep(4 * job.group.rank)
        report_progress()

    assert in_processes(be_rank, run, work, world_size=2) == [EXIT_FINISHED] * 2


@pytest.mark.slow
def test_a_run_that_was_taken_over_ends_on_all_ranks_and_keeps_the_other_holders_status(
    run: RunDir, in_processes: Run
) -> None:
    def work(job: Job) -> None:
        job.group.barrier()
        if job.group.rank == 0:
            run.lock.unlink()  # as a file server does that lost sight of the holder
            if os.fork() == 0:
                with run.hold():
                    time.sleep(20)
                os._exit(0)
            time.sleep(2)
        report_progress = job.progress_callback()
        while True:
            report_progress()

    assert in_processes(be_rank, run, work, world_size=2) == [EXIT_CRASHED] * 2
    assert run.read_status().state == "running"


def test_a_number_at_which_torch_would_stand_still_is_refused(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "many")
    with pytest.raises(LaunchError, match="TORCH_FR_BUFFER_SIZE"):
        execute_job(run, "cpu", lambda job: None)
