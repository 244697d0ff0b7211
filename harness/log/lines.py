"""The lines of a run: `metrics.jsonl` holds what was learnt and is reproducible to the byte, `speed.jsonl` how fast."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from aimscale.harness.log.loggers import open_loggers
from aimscale.harness.log.terminal import Terminal
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.fence import check_fence
from aimscale.harness.run.files import written_aside


class JsonLines:
    """An append-only file of JSON lines that can be cut back to what a checkpoint knew."""

    def __init__(self, path: Path, keep_bytes: int | None = None) -> None:
        """Open for appending, after cutting to `keep_bytes` (None keeps all whole lines).

        The file is replaced by a copy: a process that had it before appends to a file without a name.
        """
        old = path.read_bytes() if path.exists() else b""
        size = old.rfind(b"\n") + 1 if keep_bytes is None else keep_bytes
        assert len(old) >= size, f"{path} is shorter than its checkpoint knew"
        with written_aside(path) as aside:
            aside.write_bytes(old[:size])
        self._path, self._file = path, path.open("ab")

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; visible to readers at once.

        Raises:
            LeaseLost: another process took the run over.
        """
        check_fence(self._path)
        self._file.write((json.dumps(line, allow_nan=False) + "\n").encode())
        self._file.flush()

    def sync(self) -> int:
        """Make all lines durable; returns the file's size in bytes."""
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


SMOOTHED_S = 30.0
"""`status.json` gives the rate of about so many seconds: forecasts hang on it, and that of a few short steps jumps."""


class LineWriter:
    """Takes every line to where it is read: both files, the heartbeat, the loggers and the terminal; on rank 0."""

    def __init__(self, run: RunDir, config: RunConfig, terminal: Terminal, metrics_bytes: int) -> None:
        """Cut `metrics.jsonl` to `metrics_bytes`, what the point that the run goes on from knew of it."""
        self._run, self._terminal = run, terminal
        self._metrics, self._speed = JsonLines(run.metrics, metrics_bytes), JsonLines(run.speed)
        self._loggers = open_loggers(run, config)
        self._seconds = self._images = 0.0

    def write(self, line: dict[str, Any], speed: dict[str, Any], *, images_done: int, wall_s: float) -> None:
        """Write one line of `metrics.jsonl` and what is said of its speed over `wall_s` seconds."""
        speed = {**{key: line[key] for key in ("images_seen", "step", "branch")}, "time": time.time(), **speed}
        branch = line["branch"]
        self._metrics.write(line)
        self._speed.write(speed)
        self._run.write_status(
            durable=False,
            phase="train" if branch is None else "decay",
            images_done=images_done,
            heartbeat=speed["time"],
            **{key: line[key] for key in ("images_seen", "step", "loss", "num_skipped_steps")},
            images_per_s=self._smoothed(speed["images_per_s"], wall_s),
            **{key: speed[key] for key in ("mfu_published", "mfu")},
        )
        for logger in self._loggers:
            logger.log(line | speed)
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        self._terminal.step(
            "trunk" if branch is None else f"decay to {branch}",
            f"loss {loss}  {speed['images_per_s']:.0f} images/s",
            f"MFU {100 * speed['mfu']:.1f} % of the measured peak  lr {line['lr']:.2e}",
            images_seen=line["images_seen"],
            images_done=images_done,
        )

    def _smoothed(self, images_per_s: float, wall_s: float) -> float:
        """The rate of this line and those before it, which count less the longer ago they are."""
        kept = math.exp(-wall_s / SMOOTHED_S)
        self._seconds = kept * self._seconds + wall_s
        self._images = kept * self._images + wall_s * images_per_s
        return self._images / self._seconds

    def sync(self) -> int:
        """Make the lines durable; returns the size of `metrics.jsonl` in bytes."""
        return self._metrics.sync()

    def close(self) -> None:
        """Write what the loggers have buffered."""
        for logger in self._loggers:
            logger.close()
