"""Two trainers on one run after a node was given up for lost: one of them writes, and the other ends on all ranks."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import aimscale.harness.device.ranks
import aimscale.harness.log.record
import aimscale.harness.step.saving
import aimscale.harness.train.evaluate
import aimscale.harness.train.loop
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import EXIT_CRASHED, RunDir
from aimscale.harness.run.lock import LockHeld, read_holder
from aimscale.harness.train.attempt import train

Run = Callable[..., list[int]]
Config = Callable[..., RunConfig]

PLACES: dict[str, tuple[Any, str]] = {
    "step": (aimscale.harness.log.record.Recorder, "step"),
    "save": (aimscale.harness.step.saving, "_write_part"),
    "publication of a save": (aimscale.harness.step.saving, "publish_dir"),
    "budget": (aimscale.harness.train.loop, "save_weights"),
    "validation": (aimscale.harness.train.evaluate, "validate"),
}


@pytest.fixture(autouse=True, scope="module")
def _scaled_times() -> Iterator[None]:
    """Minutes become seconds; forks inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, seconds in (("BEAT_S", 0.2), ("SILENCE_S", 6.0), ("GRACE_S", 1.0), ("STEP_S", 12.0)):
            patch.setattr(aimscale.harness.device.ranks, name, seconds)
        yield


def train_on(host: str, path: Path, place: str | None = None, number: int = 1, *, action: Callable[[], None]) -> None:
    """Train as on another host; do `action` before the `number`-th call of a place. Exits as a trainer does."""
    socket.gethostname = lambda: host  # type: ignore[method-assign]
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if place is not None:
        owner, name = PLACES[place]
        real, calls = getattr(owner, name), iter(range(1, number))

        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls, None) is None:
                action()
            return real(*args, **kwargs)

        setattr(owner, name, call)
    sys.exit(train(path))


def stand_still() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def start(host: str, path: Path, **kwargs: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(
        target=train_on, args=(host, path), kwargs={"action": stand_still, **kwargs}
    )
    process.start()
    return process


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


def outcome(path: Path) -> dict[str, Any]:
    """What must be that of an undisturbed run, to the byte."""
    run = RunDir(path)
    timing = {"wall_s", "device_hours", "images_per_s", "mfu", "finished_at", "git_commit"}
    return {
        "rows": [{k: v for k, v in row.items() if k not in timing} for row in run.read_rows()],
        "weights": {
            (row["images_seen"], name): tensor.numpy().tobytes()
            for row in run.read_rows()
            for name, tensor in load_file(run.model_file(row["images_seen"])).items()
        },
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


def train_with_a_victim(rank: int, path: Path, victim: int, place: str, action: Callable[[], None]) -> None:
    """Each rank on a host of its own; the victim does `action` at a place that all ranks come to."""
    os.setpgrp()
    (path / f"pid-{rank}").write_text(str(os.getpid()))
    number = 3 if place == "step" else 1
    chosen = {"place": place, "number": number} if rank == victim else {}
    train_on(f"node-{rank}", path, action=action, **chosen)


def hang() -> None:
    while True:
        time.sleep(1)


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "place", "action"), [(0, "save", stand_still), (1, "step", hang)])
def test_a_rank_that_stands_still_ends_the_others(
    tmp_path: Path, tiny_config: Config, in_processes: Run, victim: int, place: str, action: Callable[[], None]
) -> None:
    """No backend's notice is needed: gloo would wait for the stopped rank for half an hour."""
    run = RunDir.create(tmp_path / "run", tiny_config())
    reaper = multiprocessing.get_context("fork").Process(target=end_victim, args=(run.path, victim))
    reaper.start()
    codes = in_processes(train_with_a_victim, run.path, victim, place, action, world_size=2)
    reaper.join()
    assert codes[1 - victim] == EXIT_CRASHED
    status = run.read_status()
    assert (status.state, status.reason_class) == ("failed", "node")
    seen = f"rank {victim} on node-{victim} was not heard of" if action is stand_still else "has been in one step"
    assert seen in str(status.reason)
    if action is stand_still:  # where all ranks are heard of, nobody can tell which of them holds up the step
        assert status.failed_on == f"node-{victim}"


def end_victim(path: Path, victim: int) -> None:
    """A launcher's part: kill what is left once the other rank has ended."""
    files = [path / f"pid-{rank}" for rank in (0, 1)]
    until(lambda: all(file.exists() and file.read_text() for file in files))
    pids = [int(file.read_text()) for file in files]
    until(lambda: not is_alive(pids[1 - victim]))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pids[victim], signal.SIGKILL)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
