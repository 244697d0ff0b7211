"""Points during training: they change no bit of it, are written once, and are what a budget there would be."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainers import before_call, train_in

import aimscale.harness.validation
from aimscale.aim.cost import executed_flops_per_image, flops_per_image
from aimscale.aim.errors import UserError
from aimscale.harness.data.store.dataset_info import find_info
from aimscale.harness.run.config import RunConfig, build_model_config
from aimscale.harness.run.directory import EXIT_PREEMPTED, RunDir
from aimscale.harness.run.expected import FILE
from aimscale.harness.run.files import CHECKSUM, is_intact
from aimscale.harness.run.schedule import schedule_of, validation_distance

Run = Callable[..., list[int]]
Config = Callable[..., RunConfig]


def signalled(rank: int, path: Path, signum: int, number: int) -> None:
    """Train, and get a signal at a validation, by its number."""
    before_call(aimscale.harness.validation, "validate", number, lambda: os.kill(os.getpid(), signum))
    train_in(rank, path)


@pytest.fixture
def measured(tiny_data: Path, tiny_config: Config) -> Callable[..., RunConfig]:
    """A run of `tiny_config` that validates every 16 images."""

    def make(runtime: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
        validation = {"path": str(tiny_data / "validation"), "num_prefixes": 2, "centre_crop": 1.0, "every_images": 16}
        return tiny_config(runtime, **({"validation": validation} | changes))

    return make


def learnt(run: RunDir) -> list[tuple[Any, ...]]:
    keys = ("branch", "images_seen", "loss", "grad_norm", "lr")
    return [tuple(json.loads(line)[key] for key in keys) for line in run.metrics.read_text().splitlines()]


def curve(run: RunDir) -> list[dict[str, Any]]:
    """Its lines, each once, without times and their checksums."""
    lines = [json.loads(line) for line in run.curve.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("measured_s", CHECKSUM)} for line in lines]


def test_points_change_no_bit_and_a_stopped_or_killed_run_has_them_once(
    tmp_path: Path, measured: Config, in_processes: Run, tiny_config: Config
) -> None:
    whole, without, broken = (tmp_path / name for name in ("whole", "without", "broken"))
    RunDir.create(without, measured(validation=tiny_config().evaluation.validation.model_dump()))
    assert in_processes(train_in, without) == [0]
    assert not RunDir(without).curve.exists(), "16 validation images are worth no point of so short a run"
    RunDir.create(whole, measured({"num_workers": 1}))  # which loads ahead while a point is measured
    assert in_processes(train_in, whole) == [0]
    assert learnt(RunDir(whole)) == learnt(RunDir(without))
    lines = curve(RunDir(whole))
    assert [line["images_seen"] for line in lines] == [16, 32, 48, 64, 80, 96], "the trunk ends at 104"

    run = RunDir.create(broken, measured())
    for signum, at, end in (
        (signal.SIGTERM, 2, EXIT_PREEMPTED),  # at 32
        (signal.SIGKILL, 3, -signal.SIGKILL),  # at 64, after 32 again and 48
    ):
        assert in_processes(signalled, broken, signum, at) == [end]
    assert in_processes(train_in, broken) == [0]
    assert curve(run) == lines
    rows = [{k: row[k] for k in ("images_seen", "val_loss", "train_loss")} for row in run.read_rows()]
    assert rows == [{k: row[k] for k in rows[0]} for row in RunDir(whole).read_rows()]
    assert len(run.read_curve()) == len(lines)
    run.curve.write_text(run.curve.read_text().partition("\n")[0])
    with pytest.raises(UserError, match="damaged"):
        run.read_curve()
    assert is_intact(json.loads(next(run.checkpoints.glob("*/manifest.json")).read_text()) | {"branch": 1}) is False


@pytest.mark.parametrize(("stage", "world_size", "precision"), [(0, 2, "fp32"), (1, 1, "bf16"), (3, 2, "bf16")])
def test_a_point_says_what_a_budget_of_its_weights_says(
    tmp_path: Path, measured: Config, in_processes: Run, stage: int, world_size: int, precision: str
) -> None:
    """A decay to the peak rate is none, so the trunk at 64 images has the weights of that budget."""
    config = measured(
        {"zero_stage": stage, "micro_batch": 2},
        schedule={"warmup_images": 16, "lr_end": 1e-3},
        optimiser={"batch_size": 8, "precision": precision},
    )
    run = RunDir.create(tmp_path / "run", config)
    assert in_processes(train_in, run.path, world_size=world_size) == [0] * world_size
    (point,) = (line for line in curve(run) if line["images_seen"] == 64)
    row = run.read_rows()[0]
    names = ("images_seen", "val_loss", "val_loss_se", "val_num_images")
    assert {name: point[name] for name in names} == {name: row[name] for name in names}
    assert row["validation"].rpartition(".")[0] == point["validation"]
    assert point["lr"] == 1e-3


def test_automatic_points_take_three_percent_whatever_the_budgets(measured: Config, tiny_config: Config) -> None:
    config = tiny_config(budgets=[4000])
    model = build_model_config(config.training)
    validation = 16 * 2 * flops_per_image(model).forward
    trained = executed_flops_per_image(model, model.num_tokens / 2).train
    found = validation_distance(config, find_info)
    assert found
    assert found % 8 == 0
    assert found - 8 < validation / (0.03 * trained) <= found
    assert validation_distance(tiny_config(budgets=[4000, 8000]), find_info) == found
    assert validation_distance(tiny_config(budgets=[10**7]), find_info) == 80_000, "100 points at most"
    assert validation_distance(config, lambda path: None) is None
    assert validation_distance(measured(), find_info) == 16
    schedule = schedule_of(config)
    points = [position for position in range(0, schedule.last_point + 1, 8) if schedule.is_point(position, found)]
    assert len(points) == schedule.num_points(found) == 3200 // found


def test_the_forecast_is_logged_beside_what_is_measured(tmp_path: Path, measured: Config, in_processes: Run) -> None:
    run = RunDir.create(tmp_path / "run", measured({"loggers": ["tensorboard"], "micro_batch": 2}))
    point = {"loss": 0.5, "low": 0.45, "high": 0.55, "sd": 0.01, "noise": 0.005}
    points = [{"images_seen": 16 * number, **point} for number in range(1, 7)]
    budgets = [{"images_seen": budget, **point} for budget in run.load_config().evaluation.budgets]
    values = {"basis": "", "points": points, "budgets": budgets, "memory": 3.0, "alarm_sd": 4.0, "stop_sd": 3.0}
    (run.path / FILE).write_text(json.dumps(values))
    assert in_processes(train_in, run.path) == [0], "to end a run is the worker's business"
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [each.step for each in events.Scalars("train/val_loss_expected")] == [16, 32, 48, 64, 80, 96]
    assert events.Scalars("train/val_loss_expected")[0].value == 0.5
    assert events.Scalars("train/val_loss_expected_high")[0].value == pytest.approx(0.55)
    assert [each.step for each in events.Scalars("val/loss_expected_low")] == [each["images_seen"] for each in budgets]
