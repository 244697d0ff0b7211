"""Two trainers on one run after a node was given up for lost: one of them writes, and the other ends on all ranks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import until
from trainers import before_call, rows, train_in, weights

import aimscale.harness.log.record
import aimscale.harness.step.saving
import aimscale.harness.train.run
from aimscale.harness.distributed import group
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import EXIT_CRASHED, RunDir
from aimscale.harness.run.lock import LockHeld, read_holder
from aimscale.harness.step.engine import Engine
from aimscale.harness.train.run import train

Run = Callable[..., list[int]]
Config = Callable[..., RunConfig]

PLACES: dict[str, tuple[Any, str]] = {
    "step": (aimscale.harness.log.record.Recorder, "step"),
    "save": (aimscale.harness.step.saving, "_write_part"),
    "publication of a save": (aimscale.harness.step.saving, "publish_dir"),
    "budget": (aimscale.harness.train.run, "save_weights"),
}


def train_on(host: str, path: Path, place: str | None = None, number: int = 1, *, action: Callable[[], None]) -> None:
    """Train as on another host; do `action` before the `number`-th call of a place. Exits as a trainer does."""
    socket.gethostname = lambda: host  # type: ignore[method-assign]
    if place is not None:
        before_call(*PLACES[place], number, action)
    train_in(0, path)


def stand_still() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def start(host: str, path: Path, **kwargs: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(
        target=train_on, args=(host, path), kwargs={"action": stand_still, **kwargs}
    )
    process.start()
    return process


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


def outcome(path: Path) -> dict[str, Any]:
    """What must be that of an undisturbed run, to the byte."""
    run = RunDir(path)
    return {
        "rows": rows(run),
        "weights": [weights(run, row["images_seen"]) for row in run.read_rows()],
        "files": sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()),
        "state": run.read_status().state,
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_config: Config) -> RunDir:
    """A run that nothing disturbed."""
    run = RunDir.create(tmp_path_factory.mktemp("undisturbed") / "whole", tiny_config())
    trainer = start("node-a", run.path)
    trainer.join()
    assert trainer.exitcode == 0
    return run


@pytest.mark.parametrize(
    "place",
    [place if place == "publication of a save" else pytest.param(place, marks=pytest.mark.slow) for place in PLACES],
)
def test_a_trainer_that_wakes_up_beside_its_successor_changes_nothing(
    tmp_path: Path, tiny_config: Config, whole: RunDir, place: str
) -> None:
    run = RunDir.create(tmp_path / "run", tiny_config())
    first = start("node-a", run.path, place=place, number=7 if place == "step" else 1)
    until(lambda: is_stopped(first.pid))
    run.lock.unlink()  # as a file server does that lost sight of the holder
    second = start("node-b", run.path)
    until(lambda: (holder := read_holder(run.lock)) and holder.pid == second.pid)
    while first.exitcode is None:  # its place may stop it again
        os.kill(first.pid, signal.SIGCONT)
        time.sleep(0.05)
    second.join()
    assert (first.exitcode, second.exitcode) == (EXIT_CRASHED, 0)
    assert outcome(run.path) == outcome(whole.path)


def test_a_requeued_job_does_not_drive_out_a_trainer_that_is_at_work(
    tmp_path: Path, tiny_config: Config, whole: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm lost the node and starts the job again elsewhere; the node's trainer never stopped."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run, go = RunDir.create(tmp_path / "run", tiny_config()), tmp_path / "go"
    first = start("node-a", run.path, place="step", action=lambda: until(go.exists), number=4)
    until(lambda: run.metrics.exists() and run.metrics.read_text())
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(LockHeld, match=f"process {first.pid} on"):
        train(run.path)
    go.touch()
    first.join()
    assert first.exitcode == 0
    assert outcome(run.path) == outcome(whole.path)


def wait_in_short_steps(rank: int, path: Path, what: str) -> None:
    """Train, on a host of its own, where ranks wait for each other for a second in a step."""
    group.STEP_TIMEOUT_S, group.STEP_FACTOR = 1.0, 0.0
    if what == "hang in a step" and rank == 1:  # until a launcher would end it
        before_call(Engine, "step", 3, lambda: until(lambda: RunDir(path).read_status().state == "failed"))
    if what == "stall of the disk" and rank == 0:
        before_call(aimscale.harness.log.record, "append_line", 1, lambda: time.sleep(3))
    train_on(f"node-{rank}", path, action=stand_still)


@pytest.mark.slow
def test_a_step_in_which_one_rank_hangs_ends_all(tmp_path: Path, tiny_config: Config, in_processes: Run) -> None:
    run = RunDir.create(tmp_path / "run", tiny_config())
    assert in_processes(wait_in_short_steps, run.path, "hang in a step", world_size=2) == [EXIT_CRASHED] * 2
    status = run.read_status()
    assert (status.state, status.reason_class, status.failed_on) == ("failed", "node", None)
    assert "stands still" in str(status.reason)


@pytest.mark.slow
def test_a_stall_of_the_first_ranks_disk_ends_nobody(tmp_path: Path, tiny_config: Config, in_processes: Run) -> None:
    # Nothing else makes ranks wait for each other.
    runtime = {"num_workers": 1, "checkpoint_every_images": None, "log_every_steps": 1}
    schedule = {"kind": "cosine", "warmup_images": 8}
    run = RunDir.create(tmp_path / "run", tiny_config(runtime, budgets=[24], schedule=schedule))
    assert in_processes(wait_in_short_steps, run.path, "stall of the disk", world_size=2) == [0, 0]
    assert run.read_status().state == "finished"
