"""Runs end to end: killed anywhere, stopped, moved to other ranks, not finite, and beside another process."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import gzip
import itertools
import json
import os
import re
import shutil
import signal
import sys
import time
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file
from trainers import before_call, evaluate_in, rows, stop_after, train_alone_in, train_in, weights

import aimscale.harness.cli.runs
import aimscale.harness.log.record
import aimscale.harness.step.engine
import aimscale.harness.step.saving
from aimscale.aim.cost import flops_per_image, param_count
from aimscale.harness.bench.clock import measure
from aimscale.harness.distributed import job
from aimscale.harness.run.config import RunConfig, build_model_config, load_run_config
from aimscale.harness.run.directory import EXIT_DIVERGED, EXIT_PREEMPTED, RunDir, RunDirError
from aimscale.harness.run.schedule import schedule_of
from aimscale.harness.train import run as trainer
from aimscale.harness.train.run import train

Run = Callable[..., list[int]]
Config = Callable[..., RunConfig]
Whole = Callable[..., RunDir]


LEARNT = ("loss", "loss_max", "grad_norm", "lr", "num_skipped_steps", "loss_spikes")


def lines(run: RunDir) -> dict[Any, dict[str, Any]]:
    """What was learnt by branch and images, as the last attempt says it; parts of lines that a kill left are none."""
    found = {}
    for text in run.metrics.read_text().splitlines():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            found[line["branch"], line["images_seen"]] = {key: line[key] for key in LEARNT}
    return found


def results(path: Path) -> dict[str, Any]:
    """What must be equal between runs: metric lines, rows without times, weights and losses."""
    run = RunDir(path)
    budgets = [row["images_seen"] for row in rows(run)]
    arrays = {}
    for budget in budgets:
        with np.load(run.validation_file(budget)) as stored:
            arrays[budget] = {name: stored[name].tobytes() for name in stored}
    return {
        "lines": lines(run),
        "rows": rows(run),
        "weights": {budget: weights(run, budget) for budget in budgets},
        "validation": arrays,
    }


def train_and_die(rank: int, path: Path, dies: Callable[[str, Any], bool]) -> None:
    """Train, and die of SIGKILL just before a change that makes something durable or visible where `dies` says so.

    `dies` is given the change and the path that it is made at (a descriptor for some); threads that save count, too.
    """

    def watch(change: str) -> None:
        real = getattr(os, change)

        def call(*args: Any, **kwargs: Any) -> Any:
            if dies(change, args[1] if change in ("replace", "rename") else args[0]):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(os, change, call)

    for change in ("fsync", "replace", "rename", "unlink", "rmdir", "truncate"):
        watch(change)
    train_in(rank, path)


def train_until_change(rank: int, path: Path, number: int) -> None:
    """Die at the `number`-th change of all."""
    before = iter(range(number))
    train_and_die(rank, path, lambda change, at: next(before, None) is None)


STAGES = {
    "rename */*", "rmdir */*", "replace status.json",
    "rename */removing-checkpoints-*",
    "replace */writing-checkpoints-*/part-00000-of-00001.json", "replace */writing-checkpoints-*/manifest.json",
    "rename checkpoints/*", "rmdir */removing-checkpoints-*",
    "replace */writing-checkpoints-*-decay-*/part-00000-of-00001.json",
    "replace */writing-checkpoints-*-decay-*/manifest.json", "rename checkpoints/*-decay-*",
    "rename */removing-checkpoints-*-decay-*", "rmdir */removing-checkpoints-*-decay-*",
    "replace budgets/*/model.safetensors", "replace budgets/*/digest.json",
    "replace results.json", "rmdir *",
    "rename evaluation/*/*", "rmdir evaluation/*/*", "replace evaluation/status.json", "replace validation/*.npz",
    "replace evaluation/results.json", "replace complete.json", "rmdir evaluation/*",
}  # fmt: skip
"""Changes in a run directory, from taking the lock of training to giving back that of evaluation."""


def train_until_new_stage(rank: int, path: Path, met: Path) -> None:
    """Die at the first change of a stage that the file `met` does not list yet, and list it."""

    def dies(change: str, at: Any) -> bool:
        if change not in ("replace", "rename", "rmdir") or path not in Path(at).parents:
            return False
        # One stage for all tokens, image numbers and digests.
        stage = re.sub(r"\.writer-\w+|\b\d[0-9a-f.-]*(?=-decay|\.npz|/|$)", "*", str(Path(at).relative_to(path)))
        if f"{change} {stage}" in met.read_text().splitlines():
            return False
        with met.open("a") as file:
            file.write(f"{change} {stage}\n")
        return True

    train_and_die(rank, path, dies)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_config: Config, in_processes: Run) -> Callable[..., RunDir]:
    """Undisturbed runs of one process, by their budgets, each trained once for all tests."""
    folder = tmp_path_factory.mktemp("whole")

    def run(*budgets: int) -> RunDir:
        path = folder / "-".join(map(str, budgets))
        if not path.exists():
            RunDir.create(path, tiny_config(budgets=list(budgets)))
            assert in_processes(train_in, path) == [0]
        return RunDir(path)

    return run


@pytest.mark.slow
def test_killed_anywhere_a_run_ends_like_an_uninterrupted_one(
    tmp_path: Path, tiny_config: Config, in_processes: Run, whole: Whole
) -> None:
    config = tiny_config()
    expected = results(whole(64, 128).path)
    assert [row["images_seen"] for row in expected["rows"]] == [64, 128]

    def start_until_finished(name: str, function: Callable[..., None], arguments: Iterable[Any]) -> int:
        broken, codes = RunDir.create(tmp_path / name, config), []
        for argument in arguments:
            codes += in_processes(function, broken.path, argument)
            if codes[-1] != -signal.SIGKILL:
                break
        assert codes[-1] == 0
        assert results(broken.path) == expected
        assert broken.read_status().state == "finished"
        return len(codes) - 1

    met = tmp_path / "met"
    met.touch()
    num_deaths = start_until_finished("by-stage", train_until_new_stage, itertools.repeat(met, 60))
    assert num_deaths == len(met.read_text().splitlines())
    assert set(met.read_text().splitlines()) == STAGES
    # Later changes of the same stages: the run dies again and again, each time a change later than the time before.
    assert start_until_finished("by-stride", train_until_change, itertools.count(29))


def measure_in(_rank: int, path: Path) -> None:
    """Measure the times of a run's steps, as a plan does."""
    with job.join_ranks(path.parent, "cpu") as ranks:
        measure(load_run_config(path / "config.yaml"), ranks, path.parent / "clock")


def beside_many_objects(rank: int, path: Path, sizes: Path, work: Callable[[int, Path], None]) -> None:
    """Work with many objects that the engine made, as its imports do; note how many each collection looks through."""
    kept: list[list[int]] = []
    real = aimscale.harness.step.engine.Engine.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        kept.extend([number] for number in range(300_000))

    aimscale.harness.step.engine.Engine.__init__ = init  # type: ignore[method-assign]

    def collect() -> int:
        with sizes.open("a") as file:
            file.write(f"{len(gc.get_objects())}\n")
        return 0

    gc.collect = collect  # type: ignore[assignment]
    try:
        work(rank, path)
    finally:
        collect()


@pytest.mark.parametrize("work", [train_in, measure_in])
def test_collections_look_through_new_objects_alone(
    tmp_path: Path, tiny_config: Config, in_processes: Run, work: Callable[[int, Path], None]
) -> None:
    run = RunDir.create(tmp_path / "run", tiny_config())
    assert in_processes(beside_many_objects, run.path, tmp_path / "sizes", work) == [0]
    *while_training, at_the_end = map(int, (tmp_path / "sizes").read_text().split())
    assert while_training
    assert max(while_training) < 100_000 < at_the_end


def test_a_signal_saves_and_the_next_start_goes_on(
    tmp_path: Path, tiny_config: Config, in_processes: Run, whole: Whole
) -> None:
    stopped = RunDir.create(tmp_path / "stopped", tiny_config({"checkpoint_every_images": None}))
    # On the trunk, after the last step of the first decay but before its evaluation, on the trunk, in the second decay.
    for num_images, signum in ((32, signal.SIGTERM), (64, signal.SIGTERM), (72, signal.SIGUSR2), (136, signal.SIGTERM)):
        assert in_processes(stop_after, stopped.path, num_images, signum) == [EXIT_PREEMPTED]
        assert stopped.read_status().state == "preempted"
        assert not stopped.is_held()
    assert in_processes(train_in, stopped.path) == [0]
    assert results(stopped.path) == results(whole(64, 128).path)
    assert [path.name for path in stopped.checkpoints.iterdir()] == ["104"], "the end of its trunk"
    assert stopped.read_status().attempt == 5


def test_the_clock_saves_too_and_a_killed_run_goes_on_from_there(
    tmp_path: Path, tiny_config: Config, in_processes: Run, whole: Whole
) -> None:
    # A loader process changes no bit.
    runtime = {"checkpoint_every_images": None, "checkpoint_every_min": 1e-9, "num_workers": 1}
    config = tiny_config(runtime, budgets=[64])
    killed = RunDir.create(tmp_path / "killed", config)
    assert in_processes(stop_after, killed.path, 32, signal.SIGKILL) == [-signal.SIGKILL]
    saved = {path.name for path in killed.checkpoints.iterdir()}
    assert saved
    assert saved <= {"8", "16", "24"}
    assert in_processes(train_in, killed.path) == [0]
    assert results(killed.path) == results(whole(64).path)


def test_a_longer_budget_goes_on_from_the_end_of_a_finished_runs_trunk(
    tmp_path: Path, tiny_config: Config, in_processes: Run, whole: Whole
) -> None:
    longer = RunDir.create(tmp_path / "longer", tiny_config(budgets=[64, 128]))
    assert in_processes(train_in, longer.path) == [0]
    RunDir.create(longer.path, tiny_config(budgets=[128, 256]))
    assert in_processes(stop_after, longer.path, 64 + 104 + 64, signal.SIGTERM) == [EXIT_PREEMPTED]
    assert in_processes(train_in, longer.path) == [0]
    assert results(longer.path) == results(whole(64, 128, 256).path), "as if it had been asked for from the start"
    assert [path.name for path in longer.checkpoints.iterdir()] == ["208"]


def test_a_budget_that_no_saved_point_leads_to_is_refused_and_nothing_is_lost(
    tmp_path: Path, tiny_config: Config, whole: Whole
) -> None:
    run = RunDir(shutil.copytree(whole(64, 128).path, tmp_path / "run"))
    before = results(run.path)
    for budgets, words in (([64, 96, 128], "96"), ([128, 256], "256")):
        RunDir.create(run.path, tiny_config(budgets=budgets))
        if budgets[-1] == 256:
            shutil.rmtree(run.checkpoints)
        with pytest.raises(RunDirError, match=words):
            train(run.path)
        assert results(run.path) == before
        assert run.read_status().state == "finished"


def test_a_damaged_checkpoint_gives_way_to_an_earlier_one_or_says_so(
    tmp_path: Path, tiny_config: Config, in_processes: Run, whole: Whole
) -> None:
    def damage(path: Path) -> None:
        part = next(path.glob("part-*.safetensors"))
        content = bytearray(part.read_bytes())
        content[-1] ^= 1
        part.write_bytes(content)

    config = tiny_config({"checkpoint_every_images": None}, budgets=[128])
    broken = RunDir.create(tmp_path / "broken", config)
    assert in_processes(stop_after, broken.path, 104, signal.SIGTERM) == [EXIT_PREEMPTED]
    assert sorted(path.name for path in broken.checkpoints.iterdir()) == ["104", "104-decay-128"]
    os.truncate(next(broken.checkpoint_dir(104, 128).glob("part-*.safetensors")), 1000)
    assert in_processes(stop_after, broken.path, 112, signal.SIGTERM) == [EXIT_PREEMPTED]
    damage(broken.checkpoint_dir(112, 128))
    damage(broken.checkpoint_dir(104))
    assert in_processes(train_in, broken.path) == [2]
    assert "112-decay-128 is damaged" in str(broken.read_status().reason)
    damage(broken.checkpoint_dir(104))  # twice flipped is whole again
    assert in_processes(train_in, broken.path) == [0]
    assert results(broken.path) == results(whole(128).path)


def train_and_lose_a_rank(rank: int, path: Path, victim: int, number: int, place: str) -> None:
    """Train on several ranks of which one dies of SIGKILL at its `number`-th call of a place."""
    owner, name = {
        "step": (aimscale.harness.log.record.Recorder, "step"),
        "part": (aimscale.harness.step.saving, "_write_part"),
    }[place]
    if rank == victim:
        before_call(owner, name, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
    train_in(rank, path)


@pytest.mark.slow
def test_when_a_rank_is_killed_the_others_end_and_what_was_published_is_kept(
    tmp_path: Path, tiny_config: Config, in_processes: Run
) -> None:
    config = tiny_config({"zero_stage": 1})
    whole, broken = (RunDir.create(tmp_path / name, config) for name in ("whole", "broken"))
    assert in_processes(train_in, whole.path, world_size=2) == [0, 0]
    saved = []
    # Far sooner than a collective's own time limit, which is longer than that of a test.
    for victim, number, place in ((1, 2, "part"), (0, 2, "step"), (1, 9, "step")):
        codes = in_processes(train_and_lose_a_rank, broken.path, victim, number, place, world_size=2)
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] == 1, "ended, and not as if it were finished"
        status = broken.read_status()
        assert (status.state, status.reason_class) == ("failed", "node"), status
        assert status.reason
        assert not broken.is_held()
        saved.append({path.name for path in broken.checkpoints.glob("[0-9]*")})
    assert saved[:2] == [{"24"}, {"24"}]
    assert in_processes(train_in, broken.path, world_size=2) == [0, 0]
    assert results(broken.path) == results(whole.path)


@pytest.mark.slow
def test_a_run_moves_to_other_ranks_and_stages_by_itself(
    tmp_path: Path, tiny_config: Config, in_processes: Run, whole: Whole
) -> None:
    moved = RunDir.create(tmp_path / "moved", tiny_config({"zero_stage": 2, "micro_batch": 2}))
    assert in_processes(stop_after, moved.path, 40, signal.SIGTERM, world_size=2) == [EXIT_PREEMPTED] * 2
    for stage, num_images, world_size in ((1, 96, 1), (3, 136, 2)):
        moved.config.write_text(tiny_config({"zero_stage": stage, "micro_batch": 4}).to_yaml())
        codes = in_processes(stop_after, moved.path, num_images, signal.SIGTERM, world_size=world_size)
        assert codes == [EXIT_PREEMPTED] * world_size
    moved.config.write_text(tiny_config().to_yaml())
    assert in_processes(train_in, moved.path) == [0]
    ours, theirs = lines(moved), lines(whole(64, 128))
    assert ours.keys() == theirs.keys()
    for place, line in ours.items():
        assert line["loss"] == pytest.approx(theirs[place]["loss"], rel=1e-5)


def test_a_branch_equals_a_run_that_had_only_that_budget(whole: Whole) -> None:
    several = whole(64, 128)
    for budget, row in zip((64, 128), several.read_rows(), strict=True):
        alone = whole(budget)
        (only,) = alone.read_rows()
        assert weights(several, budget) == weights(alone, budget)
        assert (row["val_loss"], row["train_loss"]) == (only["val_loss"], only["train_loss"])
        with np.load(several.validation_file(budget)) as ours, np.load(alone.validation_file(budget)) as theirs:
            assert np.array_equal(ours["loss_sum"], theirs["loss_sum"])


def train_with_slow_writes(rank: int, path: Path) -> None:
    """Train, and die where a budget's weights are begun before the checkpoint that its decay left is published."""
    run, real_write, real_save = RunDir(path), aimscale.harness.step.saving._write_part, trainer.save_weights
    trunk = schedule_of(run.load_config()).branch_point(64)

    def write(*args: Any) -> Any:
        time.sleep(1)
        return real_write(*args)

    def save(*args: Any) -> int:
        assert run.checkpoint_dir(trunk).exists()
        return real_save(*args)

    aimscale.harness.step.saving._write_part, trainer.save_weights = write, save
    train_in(rank, path)


def test_weights_of_a_budget_come_after_the_checkpoint_that_the_walk_returns_to(
    tmp_path: Path, tiny_config: Config, in_processes: Run
) -> None:
    """Else a run that is killed between the two has a budget, and nothing that leads to the next."""
    run = RunDir.create(tmp_path / "run", tiny_config(budgets=[64]))
    assert in_processes(train_with_slow_writes, run.path) == [0]


def test_steps_have_the_schedules_rates_to_the_digit(whole: Whole, tiny_config: Config) -> None:
    """Rates of the step after passed all tests, which compared runs with each other."""
    config = tiny_config(budgets=[64, 128])
    schedule, batch = schedule_of(config), config.training.optimiser.batch_size
    told = lines(whole(64, 128))
    assert {branch for branch, _ in told} >= {64, 128}
    for (branch, images_seen), line in told.items():
        assert line["lr"] == schedule.lr(images_seen - batch, branch), (branch, images_seen)


def train_with_bad_steps(rank: int, path: Path, bad: set[int]) -> None:
    """Train with the losses of some steps (by their image position) made infinite."""
    real = aimscale.harness.step.engine.Engine.step

    def step(self: aimscale.harness.step.engine.Engine, micro_batches: Any, **kwargs: Any) -> Any:
        first = micro_batches[0]
        if int(first.positions[0]) in bad:
            images = first.images_on("cpu").clone()
            images[0, 0, -1, -1] = torch.inf
            micro_batches = [dataclasses.replace(first, images=images), *micro_batches[1:]]
        return real(self, micro_batches, **kwargs)

    aimscale.harness.step.engine.Engine.step = step  # type: ignore[method-assign]
    aimscale.harness.log.record.MAX_SKIPPED_STEPS = 2
    train_in(rank, path)


def test_bad_steps_are_skipped_counted_and_stop_a_run_when_too_many(
    tmp_path: Path, tiny_config: Config, in_processes: Run, whole: Whole
) -> None:
    skipping, lost = (RunDir.create(tmp_path / name, tiny_config(budgets=[64])) for name in ("skipping", "lost"))
    assert in_processes(train_with_bad_steps, skipping.path, {16, 24}) == [0]
    (row,) = skipping.read_rows()
    assert row["num_skipped_steps"] == 2
    ours, usual = list(lines(skipping).values()), list(lines(whole(64)).values())
    assert [line["num_skipped_steps"] for line in ours][:2] == [1, 2]
    assert [line["lr"] for line in ours] == [line["lr"] for line in usual], "the schedule does not drift"
    assert in_processes(train_with_bad_steps, lost.path, set(range(16, 64))) == [EXIT_DIVERGED]
    status = lost.read_status()
    assert (status.state, status.reason_class) == ("diverged", "nan")
    assert "3 steps in a row were not finite, up to image 40" in str(status.reason)


def train_in_little_memory(rank: int, path: Path, most: int, victim: int, num_good: int = 0) -> None:
    """Train where one rank's allocator refuses what a pass over more than `most` images takes, after so many passes.

    No GPU is here: what it refuses is far more than any machine has, so that the error is the allocator's own.
    """
    real, earlier = aimscale.harness.step.engine.AIM.forward, iter(range(num_good))

    def forward(self: Any, images: torch.Tensor, given: torch.Tensor) -> Any:
        if rank == victim and len(images) > most and next(earlier, None) is None:
            torch.empty(len(images) << 50, dtype=torch.uint8)
        return real(self, images, given)

    aimscale.harness.step.engine.AIM.forward = forward  # type: ignore[method-assign]
    train_in(rank, path)


@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_memory_that_runs_out_in_the_first_step_halves_the_micro_batch_once(
    tmp_path: Path, tiny_config: Config, in_processes: Run, world_size: int, stage: int
) -> None:
    def run_of(name: str, **runtime: int) -> RunDir:
        return RunDir.create(tmp_path / name, tiny_config({"zero_stage": stage, **runtime}, budgets=[64]))

    whole = 8 // world_size  # images of a rank
    short, lower = run_of("short"), run_of("lower", micro_batch=whole // 2)
    start = functools.partial(in_processes, train_in_little_memory, world_size=world_size)
    assert start(short.path, whole // 2, world_size - 1) == [1] * world_size  # where another waits in a collective, too
    status = short.read_status()
    assert (status.state, status.reason_class) == ("failed", "oom")
    assert status.too_large is not None
    assert status.too_large["micro_batch"] == whole
    for run in (short, lower):
        assert start(run.path, whole // 2, world_size - 1) == [0] * world_size
    assert [each["micro_batch"] for each in short.read_starts()] == [whole, whole // 2]
    assert results(short.path) == results(lower.path)
    if world_size == 1:  # a second time it is said what to do
        short = run_of("hopeless")
        assert [start(short.path, 0, 0) for _ in range(2)] == [[1], [1]]
        assert [each["micro_batch"] for each in short.read_starts()] == [whole, whole // 2]
        assert (short.read_status().state, short.read_status().reason_class) == ("failed", "oom")
        assert "runtime.micro_batch" in str(short.read_status().reason)


def test_memory_that_runs_out_later_halves_the_micro_batch_until_a_checkpoint_is_saved(
    tmp_path: Path, tiny_config: Config, in_processes: Run
) -> None:
    config = tiny_config({"checkpoint_every_images": 24}, budgets=[64])
    early, late = (RunDir.create(tmp_path / name, config) for name in ("early", "late"))
    for run, num_good in ((early, 2), (late, 3)):
        assert in_processes(train_in_little_memory, run.path, 4, 0, num_good) == [1]
        assert (run.read_status().state, run.read_status().reason_class) == ("failed", "oom")
    executed = early.read_status().too_large
    assert executed is not None
    assert executed["micro_batch"] == 8
    assert late.read_status().too_large is None, "it goes on from its checkpoint"
    assert in_processes(train_in_little_memory, early.path, 4, 0, 0) == [0]
    assert [each["micro_batch"] for each in early.read_starts()] == [8, 4]


def test_cosine_in_bf16_on_two_ranks_writes_a_full_row(
    tmp_path: Path, tiny_data: Path, tiny_config: Config, in_processes: Run
) -> None:
    task = {"task": "two", "train": str(tiny_data / "two"), "test": str(tiny_data / "other"), "epochs": 1}
    config = tiny_config(
        {"loggers": ["tensorboard"]},
        probes=[{**task, "kinds": ["linear"]}],
        budgets=[64],
        schedule={"kind": "cosine", "warmup_images": 16},
        optimiser={"batch_size": 8, "precision": "bf16"},
    )
    run = RunDir.create(tmp_path / "run", config)
    assert in_processes(train_alone_in, run.path, world_size=2) == [0, 0]
    assert in_processes(evaluate_in, run.path, world_size=2) == [0, 0]
    (row,) = run.read_rows()
    expected = {"zero_stage": 2, "world_size": 2, "unique_images": 64, "epochs": 1.0, "val_num_images": 16}
    assert {key: row[key] for key in expected} == expected
    model = build_model_config(config.training)
    assert row["flops_train"] == flops_per_image(model).train * 64
    assert row["flops_6nd"] == 6 * param_count(model).total * 64 * 16
    assert [(probe["task"], probe["kind"], probe["n"]) for probe in row["probes"]] == [("two", "linear", 24)]
    assert json.loads(next(run.probes_dir(64).glob("two-*.json")).read_text())["world_size"] == 2  # shared by the ranks
    assert len(list((run.path / "tensorboard").glob("events*"))) == 2, "one of each program"
    assert 0 < row["val_loss"] < 5
    assert 0 < row["val_loss_se"] < 1
    assert all(tensor.dtype == torch.float32 for tensor in load_file(run.model_file(64)).values())


def test_traces_of_some_steps_are_written_and_change_nothing(
    tmp_path: Path, tiny_config: Config, in_processes: Run, whole: Whole
) -> None:
    run = RunDir.create(tmp_path / "run", tiny_config({"profile": 2}, budgets=[64]))
    assert in_processes(train_in, run.path) == [0]
    with gzip.open(run.path / "profile" / "rank-0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert {each["name"] for each in events if each["name"].startswith("ProfilerStep")} == {
        "ProfilerStep#6",
        "ProfilerStep#7",
    }
    assert results(run.path) == results(whole(64).path)


def train_with_room(rank: int, path: Path, room: int) -> None:
    """Train where so many bytes of shared memory are free; keep the size of what this rank shares with its workers."""
    share = torch.Tensor.share_memory_

    def share_and_note(tensor: torch.Tensor) -> torch.Tensor:
        path.with_name(f"ring-{rank}").write_text(str(tensor.nbytes))
        return share(tensor)

    torch.Tensor.share_memory_ = share_and_note  # type: ignore[method-assign]
    os.statvfs = lambda _: types.SimpleNamespace(f_bavail=room, f_frsize=1)  # type: ignore[assignment, return-value]
    train_in(rank, path)


@pytest.mark.slow
def test_ranks_of_a_node_share_its_shared_memory(tmp_path: Path, tiny_config: Config, in_processes: Run) -> None:
    """Else the last ones die of SIGBUS, without a word."""
    config = tiny_config({"num_workers": 1}, budgets=[16], schedule={"warmup_images": 8})
    run = RunDir.create(tmp_path / "run", config)
    assert in_processes(train_with_room, run.path, 1 << 30, world_size=2) == [0, 0]
    room = sum(int((tmp_path / f"ring-{rank}").read_text()) for rank in range(2))
    for short, ends in ((1, [2, 2]), (0, [0, 0])):
        run = RunDir.create(tmp_path / f"short-{short}", config)
        assert in_processes(train_with_room, run.path, room - short, world_size=2) == ends
    assert "/dev/shm" in str(RunDir(tmp_path / "short-1").read_status().reason)


def fail_on_a_device_that_hangs(rank: int, path: Path) -> None:
    job.EXIT_TIMEOUT_S = 2.0
    aimscale.harness.step.engine.Engine.step = lambda *_, **__: [][0]  # type: ignore[method-assign]
    aimscale.harness.step.engine.Engine.close = lambda _: time.sleep(3600)  # type: ignore[method-assign]
    train_in(rank, path)


def test_a_failure_is_told_and_ends_its_rank_where_the_device_hangs(
    tmp_path: Path, tiny_config: Config, in_processes: Run
) -> None:
    run = RunDir.create(tmp_path / "run", tiny_config(budgets=[16], schedule={"warmup_images": 8}))
    assert in_processes(fail_on_a_device_that_hangs, run.path, world_size=2) == [1, 1]
    assert run.read_status().reason == "IndexError: list index out of range"


def make_and_train(rank: int, config: Path, out: Path) -> None:
    """Start a run by hand, as torchrun does on every rank; the first is late."""
    time.sleep(3 * (1 - rank))
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        aimscale.harness.cli.runs.train(config, out)
    except typer.Exit as end:
        sys.exit(end.exit_code)


def test_ranks_that_come_before_the_first_has_made_the_directory_train(
    tmp_path: Path, tiny_config: Config, in_processes: Run
) -> None:
    (tmp_path / "config.yaml").write_text(tiny_config(budgets=[16], schedule={"warmup_images": 8}).to_yaml())
    assert in_processes(make_and_train, tmp_path / "config.yaml", tmp_path / "run", world_size=2) == [0, 0]
    assert [row["images_seen"] for row in RunDir(tmp_path / "run").read_rows()] == [16]
