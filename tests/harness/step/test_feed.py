"""What goes wrong with one rank's images is known to all ranks at once, and counted over the whole run."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import after_steps, stop_after, train_in

import aimscale.harness.step.saving
from aimscale.harness.data import DataError
from aimscale.harness.data.store import processes
from aimscale.harness.data.stream.loader import RankRequest, next_step
from aimscale.harness.data.stream.stream import Batch, TrainStream
from aimscale.harness.distributed import job
from aimscale.harness.distributed.group import Group, PeerFailedError
from aimscale.harness.run import failures
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import EXIT_CRASHED, EXIT_PREEMPTED, SHARED, RunDir
from aimscale.harness.run.failures import run_worker
from aimscale.harness.train.run import train

Run = Callable[..., list[int]]
Spoil = Callable[..., Path]
Config = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take shares over few images; forks inherit it."""
    monkeypatch.setattr(aimscale.harness.data, "MIN_IMAGES", 40)


def take_steps(group: Group) -> None:
    """Ranks ask for a stop, a checkpoint and an end at different steps, and hear of them together."""
    given = {"num_tokens": 4, "max_bad_fraction": 0.5, "num_images": 8, "num_bad": 0}
    loaded = 0

    def batches() -> Generator[list[Batch]]:
        nonlocal loaded
        for loaded in range(1, 6):
            if loaded == 4 and group.rank == 1:
                raise DataError("shard 7 is gone")
            ones = torch.ones(loaded, dtype=torch.int64)
            yield [Batch(images=ones, prefix_lengths=ones, positions=ones)]

    source = batches()
    for number in (1, 2, 3):
        step = next_step(group, source, lambda: RankRequest(save=loaded == 2 and group.rank == 0), **given)
        assert (step.num_targets, step.must_save, step.must_stop) == (2 * 3 * number, number == 2, False)
    with pytest.raises(DataError, match="shard 7 is gone"):
        next_step(group, source, **given)
    assert next_step(group, iter([[]]), lambda: RankRequest(stop=group.rank == 1), **given).must_stop
    error = None if group.rank else ZeroDivisionError("a bug")
    with pytest.raises(PeerFailedError if group.rank else ZeroDivisionError, match="a bug"):
        next_step(group, iter([[]]), lambda: RankRequest(error=error), **given)


def test_ranks_agree_on_a_step(in_group: Callable[..., list[Any]]) -> None:
    in_group(take_steps, world_size=2)


def train_elsewhere(rank: int, path: Path, folders: Path, truncate_at: int | None) -> None:
    """Train in a folder of this rank's own; cut rank 1's shards off while it trains."""
    os.chdir(folders / str(rank))

    def act(images_done: int) -> None:
        if images_done == truncate_at and rank == 1:
            for shard in Path("train").glob("*.tar"):
                os.truncate(shard, 512)

    after_steps(act)
    train_in(rank, path)


@pytest.mark.parametrize(("truncate_at", "num_workers"), [(None, 0), (32, 1)])
def test_a_broken_shard_of_one_rank_ends_all_ranks_with_the_reason(
    tmp_path: Path, tiny_data: Path, tiny_config: Config, in_processes: Run, truncate_at: int | None, num_workers: int
) -> None:
    """Well before the timeout of a collective: the test's own is shorter."""
    for rank in (0, 1):
        shutil.copytree(tiny_data / "train", tmp_path / str(rank) / "train")
    if truncate_at is None:
        next((tmp_path / "1" / "train").glob("*.tar")).unlink()
    config = tiny_config(
        {"num_workers": num_workers},
        data={"sources": [{"path": "train"}]},
        budgets=[1024],
        schedule={"warmup_images": 8},
    )
    run = RunDir.create(tmp_path / "run", config)
    assert in_processes(train_elsewhere, run.path, tmp_path, truncate_at, world_size=2) == [2, 2]
    status = run.read_status()
    assert (status.state, status.reason_class) == ("failed", "data")
    assert ".tar" in str(status.reason)


def crash_on_one(rank: int, path: Path) -> None:
    """Train; rank 1 crashes in a step while the other still writes its part of a checkpoint."""
    write = aimscale.harness.step.saving._write_part

    def write_late(*args: Any) -> Any:
        time.sleep(1 - rank)
        return write(*args)

    def act(images_done: int) -> None:
        if images_done == 32 and rank == 1:
            raise ZeroDivisionError("a bug")

    aimscale.harness.step.saving._write_part = write_late
    after_steps(act)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    train_in(rank, path)


def test_a_crash_of_one_rank_is_told_and_keeps_the_checkpoint_under_way(
    tmp_path: Path, tiny_config: Config, in_processes: Run
) -> None:
    run = RunDir.create(tmp_path / "run", tiny_config())
    assert 0 not in in_processes(crash_on_one, run.path, world_size=2)
    status = run.read_status()
    assert (status.state, status.reason_class, status.reason) == ("failed", "code", "ZeroDivisionError: a bug")
    assert [path.name for path in run.checkpoints.iterdir()] == ["24"]


def hang_in_a_save(rank: int, path: Path) -> None:
    """Train as a launcher starts it; the disk of the last rank hangs in the second checkpoint."""
    write = aimscale.harness.step.saving._write_part

    def hang(file: Path, *args: Any) -> Any:
        if rank == int(os.environ["WORLD_SIZE"]) - 1 and "48" in file.parent.name:
            threading.Event().wait()
        return write(file, *args)

    aimscale.harness.step.saving._write_part = hang
    aimscale.harness.step.saving.LAST_SAVE_TIMEOUT_S = 1.0
    aimscale.harness.distributed.group.PHASE_TIMEOUT_S = 3.0
    failures.EXIT_TIMEOUT_S = job.EXIT_TIMEOUT_S = 5.0
    sys.argv = ["train", str(path)]
    run_worker(train, "train")


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_disk_that_hangs_in_a_save_ends_the_run_with_a_sentence(
    tmp_path: Path, tiny_config: Config, in_processes: Run, world_size: int
) -> None:
    run = RunDir.create(tmp_path / "run", tiny_config(budgets=[128]))
    assert 0 not in in_processes(hang_in_a_save, run.path, world_size=world_size)
    status = run.read_status()
    assert (status.state, status.reason_class, status.failed_on) == ("failed", "node", SHARED)
    assert re.fullmatch(r"checkpoint \S+/48 was not written within 3 s; .*", str(status.reason))
    assert [path.name for path in run.checkpoints.iterdir()] == ["24"]


def test_undecodable_samples_are_counted_once_over_ranks_branches_and_restarts(
    tmp_path: Path, spoil: Spoil, tiny_data: Path, tiny_config: Config, in_processes: Run
) -> None:
    path = spoil(tiny_data / "train", tmp_path / "spoilt", range(6))
    config = tiny_config(data={"sources": [{"path": str(path)}], "max_bad_fraction": 0.5})
    stream = TrainStream(config)
    expected = {budget: len(stream.batch(range(budget)).bad_samples) for budget in (64, 128)}
    assert expected[128] >= 2 * 6, "two epochs"
    run = RunDir.create(tmp_path / "run", config)
    for num_images in (24, 72):
        assert in_processes(stop_after, run.path, num_images, world_size=2) == [EXIT_PREEMPTED] * 2
        run.metrics.write_bytes(bytes(64))  # as a machine that crashed leaves it: nobody relies on it
    assert in_processes(train_in, run.path) == [0]
    assert {row["images_seen"]: row["num_bad_samples"] for row in run.read_rows()} == expected


@pytest.mark.slow
def test_too_many_undecodable_samples_stop_a_run_wherever_it_was_restarted(
    tmp_path: Path, spoil: Spoil, tiny_data: Path, tiny_config: Config, in_processes: Run
) -> None:
    path = spoil(tiny_data / "train", tmp_path / "spoilt", range(0, 64, 5))
    config = tiny_config(data={"sources": [{"path": str(path)}], "max_bad_fraction": 0.2}, budgets=[128])
    reasons = []
    for name, stops, world_size in (("whole", (), 1), ("broken", (8,), 2)):
        run = RunDir.create(tmp_path / name, config)
        for num_images in stops:
            stopped = in_processes(stop_after, run.path, num_images, world_size=world_size)
            assert stopped == [EXIT_PREEMPTED] * world_size
        assert in_processes(train_in, run.path, world_size=world_size) == [2] * world_size
        assert run.read_status().reason_class == "data"
        reasons.append(str(run.read_status().reason))
    assert reasons[0] == reasons[1]
    assert "max_bad_fraction (0.2)" in reasons[0]
    number, total = (int(word) for word in reasons[0].split() if word.isdigit())
    assert number > 0.2 * max(total, 40)


def signal_the_group(rank: int, path: Path) -> None:
    """Train in a process group of its own, every process of which gets a signal, as Slurm does it."""
    os.setpgrp()

    def act(images_done: int) -> None:
        if images_done == 24:
            os.killpg(0, signal.SIGUSR2)

    after_steps(act)
    train_in(rank, path)


def lose_a_worker(rank: int, path: Path, signum: int) -> None:
    """Train, and signal a loader process of the last rank: the system kills one when memory is short."""

    def act(images_done: int) -> None:
        if images_done == 24 and rank == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(multiprocessing.active_children()[0].pid or 0, signum)

    after_steps(act)
    train_in(rank, path)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("signum", "reason_class", "sentence"),
    [
        (signal.SIGKILL, "oom", r"loader process \d+ ended \(exit code -9\), .*num_workers.*"),
        (signal.SIGSTOP, "node", r"process \d+ on .* was stopped by a signal .*"),
    ],
)
def test_a_loader_process_that_dies_or_stands_still_ends_the_run_with_a_sentence(
    tmp_path: Path, tiny_config: Config, in_processes: Run, monkeypatch: pytest.MonkeyPatch, world_size: int,
    signum: int, reason_class: str, sentence: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(processes, "POLL_S", 0.2)
    monkeypatch.setattr(processes, "STOPPED_S", 1.0)
    run = RunDir.create(tmp_path / "run", tiny_config({"num_workers": 2}, budgets=[1200]))
    assert in_processes(lose_a_worker, run.path, signum, world_size=world_size) == [EXIT_CRASHED] * world_size
    status = run.read_status()
    assert (status.state, status.reason_class) == ("failed", reason_class)
    assert re.fullmatch(sentence, str(status.reason))


def test_a_signal_to_every_process_of_a_step_leaves_the_workers_alone(
    tmp_path: Path, tiny_config: Config, in_processes: Run
) -> None:
    run = RunDir.create(tmp_path / "run", tiny_config({"num_workers": 1, "checkpoint_every_images": None}))
    assert in_processes(signal_the_group, run.path) == [EXIT_PREEMPTED]
    assert run.read_status().state == "preempted"
    run.config.write_text(tiny_config().to_yaml())
    assert in_processes(train_in, run.path) == [0]
    assert [row["images_seen"] for row in run.read_rows()] == [64, 128]
