"""Ranks that come at different times, and what ends them all; no work is done."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from trainers import free_port

from aimscale.aim.errors import UserError
from aimscale.harness.device import ranks
from aimscale.harness.device.job import Job, execute_job
from aimscale.harness.run.directory import EXIT_CRASHED, EXIT_FINISHED, EXIT_USER_ERROR, RunDir

Run = Callable[..., list[int]]


@pytest.fixture(autouse=True, scope="module")
def _scaled_times() -> Iterator[None]:
    """Minutes become seconds; forks inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, seconds in (("BEAT_S", 0.2), ("SILENCE_S", 5.0), ("GRACE_S", 1.0), ("STEP_S", 4.0)):
            patch.setattr(ranks, name, seconds)
        yield


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


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


def hang() -> None:
    time.sleep(600)


def one_does(rank: int, action: Callable[[], Any]) -> Callable[[Job], None]:
    """All ranks are at work; then one does something, and the others wait for ever."""

    def work(job: Job) -> None:
        with job.watch.step():
            job.group.wait()
        if job.group.rank == rank:
            action()
        hang()

    return work


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stand_still() -> None:
    """Until a launcher's part is done: what is left once the run has failed is killed."""
    stopped, run = os.getpid(), Path(os.environ["RUN"])
    if os.fork() == 0:
        while RunDir(run).read_status().state != "failed":
            time.sleep(0.1)
        time.sleep(4)
        os.kill(stopped, signal.SIGKILL)
        os._exit(0)
    os.kill(stopped, signal.SIGSTOP)


def fail() -> None:
    raise ValueError("a bug")


def test_ranks_may_come_early_or_late_after_a_holder_that_died_under_the_same_address(
    run: RunDir, in_processes: Run
) -> None:
    """And while they work, no rank opens a file of the run."""
    port = free_port()

    def look(job: Job) -> None:
        opened: list[str] = []
        sys.addaudithook(lambda name, told: opened.append(str(told[0])) if name == "open" else None)
        with job.watch.step():
            job.group.wait()
        time.sleep(2)
        assert not [name for name in opened if str(run.path) in name]

    for late in (None, 0, 1):
        assert in_processes(be_rank, run, one_does(0, be_killed), port, world_size=2) == [-signal.SIGKILL, EXIT_CRASHED]
        assert not run.is_held()
        assert in_processes(be_rank, run, look, port, late, world_size=2) == [EXIT_FINISHED] * 2
        assert not list(run.path.glob(".writer-*"))


def test_all_ranks_are_turned_away_by_one_sentence(run: RunDir, in_processes: Run) -> None:
    with run.hold():
        assert in_processes(be_rank, run, fail, world_size=2) == [EXIT_USER_ERROR] * 2
    assert said(run, 0).read_text() == said(run, 1).read_text()
    assert f"process {os.getpid()} on" in said(run, 0).read_text()
    assert run.read_status().state == "created"


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("action", "ending", "reason", "reason_class"),
    [
        (fail, EXIT_CRASHED, "ValueError: a bug", "code"),
        (be_killed, -signal.SIGKILL, "died", "node"),
        (stand_still, -signal.SIGKILL, "was not heard of", "node"),
    ],
)
def test_what_befalls_one_rank_ends_all_and_is_told_with_its_node(
    run: RunDir, in_processes: Run, victim: int, action: Callable[[], None], ending: int, reason: str, reason_class: str
) -> None:
    os.environ["RUN"] = str(run.path)
    codes = in_processes(be_rank, run, one_does(victim, action), world_size=2)
    assert (codes[victim], codes[1 - victim]) == (ending, EXIT_CRASHED)
    status = run.read_status()
    assert (status.state, status.reason_class, status.failed_on) == ("failed", reason_class, f"node-{victim}")
    assert reason in str(status.reason)
    told = said(run, 1 - victim).read_text()
    assert f"rank {victim} on node-{victim}" in told
    assert reason in told


def test_a_step_that_lasts_ends_all_ranks_and_a_long_wait_outside_one_does_not(run: RunDir, in_processes: Run) -> None:
    def work(job: Job) -> None:
        with job.watch.step():
            job.group.wait()
        time.sleep(6)
        assert run.read_status().state == "running"
        with job.watch.step():
            hang()

    assert in_processes(be_rank, run, work, world_size=2) == [EXIT_CRASHED] * 2
    status = run.read_status()
    assert (status.state, status.reason_class) == ("failed", "node")
    assert "in one step" in str(status.reason)


def test_a_run_that_was_taken_over_ends_on_all_ranks_and_keeps_the_other_holders_status(
    run: RunDir, in_processes: Run
) -> None:
    def work(job: Job) -> None:
        job.group.wait()
        if job.group.rank == 0:
            run.lock.unlink()  # as a file server does that lost sight of the holder
            if os.fork() == 0:
                with run.hold():
                    time.sleep(20)
                os._exit(0)
        hang()

    assert in_processes(be_rank, run, work, world_size=2) == [EXIT_CRASHED] * 2
    assert run.read_status().state == "running"
