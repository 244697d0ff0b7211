"""TensorBoard and Weights & Biases beside `metrics.jsonl`, under the run's id across restarts.

A run that is taken up again has cut its `metrics.jsonl` back to its checkpoint. Loggers follow that file: at every
start they are brought to exactly the lines that it holds, so no point is lost with a buffer that a kill took, and none
is there twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from aimscale.harness.run.config import ConfigError, RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.files import remove_dir
from aimscale.harness.run.row import configured_columns

NOT_PLOTTED = ("images_seen", "step", "branch", "time")


class Logger(Protocol):
    """Where numbers go; `images_seen` is the x axis. A branch's numbers go under its own prefix."""

    def log(self, line: dict[str, Any]) -> None:
        """Record a line of `metrics.jsonl` joined with its line of `speed.jsonl`."""

    def close(self) -> None:
        """Write what is buffered."""


class TensorBoardLogger:
    """Event files in `tensorboard/` of the run directory, written anew at every start."""

    def __init__(self, run: RunDir, past: Sequence[dict[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.path / "tensorboard"
        remove_dir(folder)
        self._writer = SummaryWriter(str(folder))
        for line in past:
            self.log(line)

    def log(self, line: dict[str, Any]) -> None:
        """Record a line."""
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line["images_seen"], walltime=line.get("time"))

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class WandbLogger:
    """Weights & Biases; WANDB_MODE=offline keeps everything in `wandb/` of the run directory.

    W&B's own step is the number of the line in `metrics.jsonl`. A run that is resumed online says how many lines it
    has; offline, what an earlier start wrote and was not synchronised yet gives way to a new record of all lines.
    Runs are grouped by sweep and tagged with their size and budgets; the columns of their rows that are known before
    training (parameters, FLOPs per image) are in the configuration too, to be plotted against.
    """

    def __init__(self, run: RunDir, config: RunConfig, past: Sequence[dict[str, Any]]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("runtime.loggers names wandb, which is not installed; pip install wandb") from error
        for folder in (run.path / "wandb").glob(f"offline-run-*-{config.run_id}"):
            if not any(folder.glob("*.synced")):
                remove_dir(folder)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "aimscale"),
            id=config.run_id,
            name=config.run_id,
            resume="allow",
            dir=str(run.path),
            group=run.path.parent.parent.name if run.path.parent.name == "runs" else None,
            tags=[config.training.model.size, *(f"D={budget}" for budget in config.evaluation.budgets)],
            config=config.model_dump(mode="json") | {"columns": configured_columns(config)},
        )
        # Branches go back in images_seen, which W&B's own step may not.
        self._run.define_metric("images_seen")
        self._run.define_metric("*", step_metric="images_seen")
        self._num_known = int(self._run.step)
        self._num_lines = 0
        for line in past:
            self.log(line)

    def log(self, line: dict[str, Any]) -> None:
        """Record a line, unless W&B has it."""
        if self._num_lines >= self._num_known:
            self._run.log({**scalars(line), "images_seen": line["images_seen"]}, step=self._num_lines)
        self._num_lines += 1

    def close(self) -> None:
        """Write what is buffered."""
        self._run.finish()


def open_loggers(run: RunDir, config: RunConfig) -> list[Logger]:
    """The loggers of `runtime.loggers`, brought to the lines that `metrics.jsonl` holds now.

    Raises:
        ConfigError: a logger's package is not installed.
    """
    names = dict.fromkeys(config.runtime.loggers)
    past = past_lines(run) if names else []
    return [TensorBoardLogger(run, past) if name == "tensorboard" else WandbLogger(run, config, past) for name in names]


def past_lines(run: RunDir) -> list[dict[str, Any]]:
    """Every line of `metrics.jsonl` with what `speed.jsonl`, where steps taken twice are twice, says of it last."""
    speed = {(line["images_seen"], line["branch"]): line for line in _read_lines(run.speed)}
    return [line | speed.get((line["images_seen"], line["branch"]), {}) for line in _read_lines(run.metrics)]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a file; a kill may have left a part of one at the end."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line, named by the part of the walk they belong to: `trunk/loss`, `decay-4096/loss`.

    Those of blocks are called `trunk/grad_norm/trunk.blocks.0`.
    """
    blocks = {f"{key}/{name}": value for name, its in line.get("blocks", {}).items() for key, value in its.items()}
    part = "trunk" if line["branch"] is None else f"decay-{line['branch']}"
    return {
        f"{part}/{key}": float(value)
        for key, value in (line | blocks).items()
        if key not in NOT_PLOTTED and isinstance(value, int | float)
    }
