"""TensorBoard and W&B hold every line, also across a kill, under the run's id."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import aimscale.harness.device.peak
import aimscale.harness.log.record
from aimscale.harness.log.loggers import open_loggers
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.train.attempt import train

Run = Callable[..., list[int]]
Config = Callable[..., RunConfig]


def points(run: RunDir) -> dict[str, set[tuple[int, float]]]:
    """Tag -> (step, value) of every event in the run's files."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    found: dict[str, set[tuple[int, float]]] = {}
    for file in sorted((run.path / "tensorboard").glob("events*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                number = round(float(tensor_util.make_ndarray(value.tensor)), 5)
                found.setdefault(value.tag, set()).add((event.step, number))
    return found


def train_and_die(rank: int, path: Path, num_images: int) -> None:
    """Train and die of SIGKILL once `num_images` are done (0: never)."""
    aimscale.harness.device.peak.GEMM_SIDE = {"cpu": 128, "cuda": 1024}
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    real = aimscale.harness.log.record.Recorder.step

    def step(self: aimscale.harness.log.record.Recorder, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        if self.metrics.images_done == num_images:
            os.kill(os.getpid(), signal.SIGKILL)

    aimscale.harness.log.record.Recorder.step = step  # type: ignore[method-assign]
    sys.exit(train(path))


def test_tensorboard_holds_the_last_lines_of_a_run_that_was_killed(
    tmp_path: Path, tiny_config: Config, in_processes: Run
) -> None:
    runtime = {"loggers": ["tensorboard"], "checkpoint_every_images": 24, "log_every_steps": 1}
    run = RunDir.create(tmp_path / "run", tiny_config(runtime))
    assert in_processes(train_and_die, run.path, 72) == [-signal.SIGKILL]
    assert in_processes(train_and_die, run.path, 0) == [0]
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert {line["attempt"] for line in lines} == {1, 2}
    places = [(line["branch"], line["images_seen"], line["loss"]) for line in lines]
    assert len(places) > len(set(places)), "what was trained twice was told twice, with the same numbers"
    assert len(set(places)) == len({place[:2] for place in places})
    again = [line for line in lines if line["attempt"] == 2]
    found = points(run)
    for tag, branch in (("trunk/loss", None), ("decay-64/loss", 64), ("decay-128/loss", 128)):
        assert found[tag] >= {(it["images_seen"], round(it["loss"], 5)) for it in again if it["branch"] == branch}


def test_wandb_is_told_of_the_sweep_and_goes_on_under_the_runs_id(
    tmp_path: Path, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorder in place of the service."""
    settings: list[dict[str, Any]] = []
    logged: list[dict[str, Any]] = []

    def init(**values: Any) -> SimpleNamespace:
        settings.append(values)
        return SimpleNamespace(log=logged.append, define_metric=lambda *_, **__: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))  # type: ignore[arg-type]
    config = tiny_config({"loggers": ["wandb"]})
    run = RunDir.create(tmp_path / "my-sweep" / "runs" / "run", config)
    (logger,) = open_loggers(run, config)
    logger.log({"images_seen": 16, "step": 2, "branch": 16, "loss": 0.2, "time": 1.0})
    assert logged == [{"decay-16/loss": 0.2, "images_seen": 16}]
    (said,) = settings
    assert (said["id"], said["resume"], said["group"]) == (config.run_id, "allow", "my-sweep")
    assert said["tags"] == [config.training.model.size, "D=64", "D=128"]
    assert said["config"]["columns"]["params_total"] > 0
