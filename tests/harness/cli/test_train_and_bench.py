"""`aimscale train` and `aimscale bench train` from the command line."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import aimscale.harness.bench.train
import aimscale.harness.device.execution
import aimscale.harness.train.run
from aimscale.aim.config import model_config
from aimscale.aim.cost import param_count
from aimscale.harness.cli import bench as cli_bench
from aimscale.harness.data.stream.stream import Batch
from aimscale.harness.run.config import ConfigError, RunConfig, load_run_config
from aimscale.harness.run.directory import RunDir, RunDirError
from aimscale.harness.step.engine import Engine, StepOutcome
from aimscale.sweeps.cli.main import load_verb

Run = Callable[..., list[int]]
Config = Callable[..., RunConfig]


def invoke(rank: int, app: object, arguments: list[str], out: Path) -> None:
    """Run a verb; writes its output, and after it what it logs, to `out`."""
    del os.environ["RANK"], os.environ["WORLD_SIZE"]
    logged, logger = io.StringIO(), logging.getLogger("aimscale")
    logger.addHandler(logging.StreamHandler(logged))
    logger.setLevel(logging.INFO)
    result = CliRunner().invoke(app, arguments)  # type: ignore[arg-type]
    out.write_text(result.stdout + logged.getvalue())
    assert result.exit_code == 0, result.exception


def test_train_from_a_configuration_and_again_from_its_directory(
    tmp_path: Path, tiny_config: Config, in_processes: Run
) -> None:
    config = tiny_config(budgets=[64])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    out, run = tmp_path / "output", RunDir(tmp_path / "run")
    arguments = [str(tmp_path / "config.yaml"), "--out", str(run.path)]
    assert in_processes(invoke, load_verb("train"), arguments, out) == [0]
    named = load_run_config(run.config).run_id  # with the fingerprints of its data, which the configuration did not say
    assert named != config.run_id
    assert f"{named}: 0 of 64 images done, ZeRO 0, micro-batch 8, 1 rank(s)" in out.read_text()
    assert f"next: aimscale evaluate {run.path}" in out.read_text()
    assert run.read_status().state == "finished"
    assert in_processes(invoke, load_verb("train"), [str(run.path)], out) == [0]
    assert in_processes(invoke, load_verb("evaluate"), [str(run.path)], out) == [0]
    (row,) = run.read_rows()
    assert f"budget 64: validation loss {row['val_loss']:.4f} +- " in out.read_text()
    (tmp_path / "other.yaml").write_text(tiny_config(budgets=[64], seed=1).to_yaml())
    refused = CliRunner().invoke(load_verb("train"), [str(tmp_path / "other.yaml"), "--out", str(run.path)])
    assert isinstance(refused.exception, RunDirError)


def test_train_refuses_what_is_no_run(tmp_path: Path) -> None:
    assert isinstance(CliRunner().invoke(load_verb("train"), [str(tmp_path)]).exception, ConfigError)
    assert isinstance(CliRunner().invoke(load_verb("train"), [str(tmp_path / "no.yaml")]).exception, ConfigError)
    assert list(tmp_path.iterdir()) == []


def invoke_in_little_memory(rank: int, arguments: list[str], out: Path, sizes: Path) -> None:
    """As on a device that holds two images, of 16 tokens each, at a time; writes down the sizes of micro-batches."""
    aimscale.harness.device.execution.MAX_MICRO_BATCH_TOKENS = 32
    step, seen = Engine.step, set()

    def watched(self: Engine, micro_batches: list[Batch], **words: Any) -> StepOutcome:
        seen.update(len(batch) for batch in micro_batches)
        return step(self, micro_batches, **words)

    Engine.step = watched  # type: ignore[method-assign]
    invoke(rank, cli_bench.app, arguments, out)
    sizes.write_text(json.dumps(sorted(seen)))


def test_bench_train_steps_as_the_run_does(tmp_path: Path, tiny_config: Config, in_processes: Run) -> None:
    """In micro-batches that the memory holds, not a batch at once."""
    (tmp_path / "config.yaml").write_text(tiny_config().to_yaml())
    arguments = ["train", str(tmp_path / "config.yaml"), "--steps", "2"]
    out, sizes = tmp_path / "bench.json", tmp_path / "sizes.json"
    assert in_processes(invoke_in_little_memory, arguments, out, sizes) == [0]
    assert json.loads(sizes.read_text()) == [2]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bench_train_measures_what_it_names(precision: str, tmp_path: Path, in_processes: Run) -> None:
    out = tmp_path / "bench.json"
    settings = ["model.image_size=16", "model.head_width=16", "model.head_depth=3", "runtime.micro_batch=4"]
    arguments = ["train", "--size", "w16-d2", "--batch", "8", "--precision", precision, "--steps", "3"]
    arguments += [word for setting in settings for word in ("--set", setting)]
    assert in_processes(invoke, cli_bench.app, arguments, out) == [0]
    measured = json.loads(out.read_text())
    assert (measured["micro_batch"], measured["zero_stage"]) == (4, 0 if precision == "fp32" else 1)
    assert measured["images_per_s"] == pytest.approx(8000 / measured["ms_per_step"])
    assert measured["mfu"] > 0
    assert measured["mfu_published"] is None, "a CPU has no nominal peak"
    assert measured["params"] == param_count(model_config("w16-d2", image_size=16, patch_size=4, head_width=16,
                                                          head_depth=3)).total  # fmt: skip
    assert measured["memory_bytes"] > 1e8


@pytest.mark.parametrize(
    "setting", ["model.depth_of_head=3", "runtime.zero_stage", "data.sources=1", "runtime.device=tpu"]
)
def test_bench_train_refuses_fields_that_a_run_has_not(setting: str) -> None:
    refused = CliRunner().invoke(cli_bench.app, ["train", "--set", setting])
    assert isinstance(refused.exception, ConfigError)
    assert setting.partition("=")[0].split(".")[-1] in str(refused.exception)
