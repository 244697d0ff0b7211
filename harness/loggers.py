"""TensorBoard and Weights & Biases beside `metrics.jsonl`, under the run's id across restarts."""

from __future__ import annotations

import os
from typing import Any, Protocol

from harness.config import ConfigError, RunConfig
from harness.rundir import RunDir


class Logger(Protocol):
    """Where numbers go; `images_seen` is the x axis. A branch's numbers go under its own prefix."""

    def log(self, values: dict[str, float], images_seen: int) -> None:
        """Record some numbers."""

    def close(self) -> None:
        """Write what is buffered."""


class TensorBoardLogger:
    """Event files in `tensorboard/` of the run directory."""

    def __init__(self, run: RunDir) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps taken again after a restart have the same values, so their points lie on each other.
        self._writer = SummaryWriter(str(run.path / "tensorboard"))

    def log(self, values: dict[str, float], images_seen: int) -> None:
        """Record some numbers."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, images_seen)

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class WandbLogger:
    """Weights & Biases; WANDB_MODE=offline keeps everything in `wandb/` of the run directory."""

    def __init__(self, run: RunDir, config: RunConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("runtime.loggers names wandb, which is not installed; pip install wandb") from error
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "aimscale"),
            id=config.run_id,
            name=config.run_id,
            resume="allow",
            dir=str(run.path),
            config=config.model_dump(mode="json"),
        )

    def log(self, values: dict[str, float], images_seen: int) -> None:
        """Record some numbers."""
        # Branches go back in images_seen, which W&B's own step may not.
        self._run.log({**values, "images_seen": images_seen})

    def close(self) -> None:
        """Write what is buffered."""
        self._run.finish()


def open_loggers(run: RunDir, config: RunConfig) -> list[Logger]:
    """The loggers of `runtime.loggers`.

    Raises:
        ConfigError: a logger's package is not installed.
    """
    names = dict.fromkeys(config.runtime.loggers)
    return [TensorBoardLogger(run) if name == "tensorboard" else WandbLogger(run, config) for name in names]


def scalars(line: dict[str, Any], branch: int | None) -> dict[str, float]:
    """The numbers of a line, named by the part of the walk they belong to: `trunk/loss`, `decay-4096/loss`."""
    part = "trunk" if branch is None else f"decay-{branch}"
    skipped = ("images_seen", "step", "branch", "time")
    return {
        f"{part}/{key}": float(value)
        for key, value in line.items()
        if key not in skipped and isinstance(value, int | float)
    }
