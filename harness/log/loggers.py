"""TensorBoard and Weights & Biases beside `metrics.jsonl`, under the run's id across restarts.

What is trained again after an interruption is logged again: the same values at the same images.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Any

from aimscale.harness.run.config import ConfigError, RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.row import configured_columns

NOT_PLOTTED = ("images_seen", "step", "branch", "time", "attempt")


def refuse_missing(config: RunConfig) -> None:
    """Raise ConfigError where a logger is asked for that is not installed."""
    if "wandb" in config.runtime.loggers and "wandb" not in sys.modules and find_spec("wandb") is None:
        raise ConfigError("runtime.loggers names wandb, which is not installed; pip install wandb")


class TensorBoardLogger:
    """Event files in `tensorboard/` of the run directory, a new one at every start."""

    def __init__(self, run: RunDir) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.path / "tensorboard"))

    def log(self, line: dict[str, Any]) -> None:
        """Record a line."""
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line["images_seen"], walltime=line["time"])

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class WandbLogger:
    """Weights & Biases; WANDB_MODE=offline keeps everything in `wandb/` of the run directory.

    Runs are grouped by sweep and tagged with their size and budgets; the columns of their rows that are known before
    training (parameters, FLOPs per image) are in the configuration too, to be plotted against.
    """

    def __init__(self, run: RunDir, config: RunConfig) -> None:
        refuse_missing(config)
        import wandb

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

    def log(self, line: dict[str, Any]) -> None:
        """Record a line."""
        self._run.log({**scalars(line), "images_seen": line["images_seen"]})

    def close(self) -> None:
        """Write what is buffered."""
        self._run.finish()


Logger = TensorBoardLogger | WandbLogger
"""Where lines of `metrics.jsonl` go, too, by `images_seen`."""


def open_loggers(run: RunDir, config: RunConfig) -> list[Logger]:
    """The loggers of `runtime.loggers`.

    Raises:
        ConfigError: a logger's package is not installed.
    """
    names = dict.fromkeys(config.runtime.loggers)
    return [TensorBoardLogger(run) if name == "tensorboard" else WandbLogger(run, config) for name in names]


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line, named by the part of the walk they belong to: `trunk/loss`, `decay-4096/loss`."""
    part = "trunk" if line["branch"] is None else f"decay-{line['branch']}"
    return {
        f"{part}/{key}": float(value)
        for key, value in line.items()
        if key not in NOT_PLOTTED and isinstance(value, int | float)
    }
