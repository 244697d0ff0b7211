"""Bookkeeping of a training run: when a line is due and where it goes, and the state for checkpoints and rows."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from aimscale.aim.config import ModelConfig
from aimscale.aim.cost import mean_scored_tokens
from aimscale.harness.device.peak import Peak, utilisation
from aimscale.harness.distributed.group import Group
from aimscale.harness.log.loggers import Logger, line_scalars
from aimscale.harness.log.metrics import Metrics, TrainedStep
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.failures import DivergedError
from aimscale.harness.run.lock import check_writer
from aimscale.harness.run.schedule import Segment
from aimscale.harness.step.engine import StepOutcome

_log = logging.getLogger(__name__)

SHOWN = ("images_seen", "images_done", "step", "loss", "num_skipped_steps", "mfu_published", "mfu")
"""Columns of a line that `status.json` shows, too."""
MAX_SKIPPED_STEPS = 20
"""Maximum number of consecutive non-finite steps; with more, the run has diverged."""
RECENT_LINES = 10
"""Number of last lines over which the rate in `status.json` is taken, from which the time left follows."""
STATUS_INTERVAL_S = 5.0
"""Interval between lines that are shown in `status.json`, s, whose renaming burdens the server of a shared disk."""


class Recorder:
    """Recorder of every line, in `metrics.jsonl`, `status.json`, the loggers and the log."""

    def __init__(
        self,
        run: RunDir,
        config: RunConfig,
        group: Group,
        model_config: ModelConfig,
        peak: Peak,
        loggers: Sequence[Logger] = (),
    ) -> None:
        self._run, self._config, self._group, self.loggers = run, config, group, loggers
        self._model_config = model_config
        self._utilisation = functools.partial(utilisation, model_config, peak, world_size=group.world_size)
        self._batch_size = config.training.optimiser.batch_size
        self.metrics = Metrics(batch_size=self._batch_size)
        self._unread: list[tuple[TrainedStep, StepOutcome]] = []
        self._begin_interval()
        self._recent: collections.deque[tuple[float, int, float]] = collections.deque(maxlen=RECENT_LINES)
        """Time, images, and the longest wait for images of a rank, by line; s."""
        self._attempt, self._shown = run.read_status().attempt, float("-inf")

    def enter(self, segment: Segment) -> None:
        """Begin a segment, or resume it after a restart."""
        self._begin_interval()
        self.metrics.enter(segment)

    def _begin_interval(self) -> None:
        """Start the interval of the next line."""
        self._counted_until, self._wall_s, self._data_wait_s, self._forward_s = time.perf_counter(), 0.0, 0.0, 0.0
        self._num_images = self._num_targets = 0  # of all ranks

    def step(self, step: TrainedStep, outcome: StepOutcome) -> None:
        """Record a step; a line is written when it is due, for which all ranks wait.

        Args:
            outcome: the step's, with the loss sum of all ranks. It stays on the device until a line or a checkpoint
                needs it, so that the host gives the device the next step at once.

        Raises:
            DivergedError: too many non-finite steps in a row.
            LockLost: another process took the run over.
        """
        self.metrics.count(step)
        self._unread.append((step, outcome))
        self._num_images += self._batch_size
        self._num_targets += step.num_targets
        self._data_wait_s += step.data_wait_s
        self._forward_s += step.forward_s
        every = self._config.runtime.log_every_steps
        if step.images_seen // self._batch_size % every == 0 or step.images_seen == self.metrics.segment.stop:
            self._write_line()
            self._group.barrier()  # here and not in the next step's collectives, whose time is short
        skipped = self.metrics.consecutive_skipped
        if skipped > MAX_SKIPPED_STEPS:
            raise DivergedError(
                f"{skipped} steps in a row were not finite, up to image {step.images_seen}; "
                "lower optimiser.lr_peak or lengthen the warm-up"
            )

    def _read(self) -> None:
        """Read the losses and norms of the steps so far, all in one wait for the device."""
        losses = [outcome.loss_sum for _, outcome in self._unread]
        norms = [outcome.grad_norm.to(outcome.loss_sum).view(()) for _, outcome in self._unread]
        values = torch.stack([*losses, *norms]).tolist() if losses else []
        for (step, _), loss_sum, norm in zip(self._unread, values[: len(losses)], values[len(losses) :], strict=True):
            loss, grad_norm = (x if math.isfinite(x) else None for x in (loss_sum / step.num_targets, norm))
            self.metrics.add(dataclasses.replace(step, loss=loss, grad_norm=grad_norm))
        self._unread.clear()

    def count_time(self) -> float:
        """Add the time since the last call to the counters; returns the interval's time so far."""
        now = time.perf_counter()
        wall_s = now - self._counted_until
        self._counted_until = now
        self._wall_s += wall_s
        self.metrics.current.wall_s += wall_s
        self.metrics.current.device_s += wall_s * self._group.world_size
        return self._wall_s

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """Exclude the block's time from all lines and rows: it is no training."""
        self.count_time()
        try:
            yield
        finally:
            self._counted_until = time.perf_counter()

    def _write_line(self) -> None:
        """Write a line of the steps since the last, with the times of the ranks that took longest."""
        self._read()
        line = self.metrics.line()
        wall_s = self.count_time()
        waits_s, forwards_s = zip(*self._group.all_gather_object((self._data_wait_s, self._forward_s)), strict=True)
        num_images, num_targets = self._num_images, self._num_targets
        self._begin_interval()
        if not self._group.is_first:
            return
        images_per_s = num_images / wall_s
        line |= {
            "images_done": self.metrics.images_done,
            "images_per_s": images_per_s,
            "ms_per_step": 1000 * wall_s * self._batch_size / num_images,
            **self._utilisation(images_per_s=images_per_s, scored_tokens=num_targets / num_images),
            "data_wait": max(waits_s) / wall_s,
            "data_wait_rank": waits_s.index(max(waits_s)),
            "forward_ms": 1000 * max(forwards_s) * self._batch_size / num_images,
            "forward_rank": forwards_s.index(max(forwards_s)),
            "device_memory_gb": device_memory_bytes(self._group) / 1e9,
            "time": time.time(),
            "attempt": self._attempt,
        }
        append_line(self._run.metrics, line)
        self._recent.append((wall_s, num_images, max(waits_s)))
        recent_s, recent_images, recent_waits_s = map(sum, zip(*self._recent, strict=True))
        branch, is_last = line["branch"], line["images_seen"] == self.metrics.segment.stop
        if is_last or self._counted_until - self._shown > STATUS_INTERVAL_S:
            self._shown = self._counted_until
            self._run.write_status(
                durable=False,
                phase="train" if branch is None else "decay",
                heartbeat=line["time"],
                images_per_s=recent_images / recent_s,
                data_wait=recent_waits_s / recent_s,
                **{key: line[key] for key in SHOWN},
            )
        for logger in self.loggers:
            if self.metrics.images_done > logger.logged_until:  # else it is trained again
                is_cosine = self._config.training.schedule.kind == "cosine"
                logger.log_values(line["images_seen"], line_scalars(line, is_cosine=is_cosine))
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        part = "stable" if branch is None else f"decay to {branch}"
        _log.info(
            f"{line['images_seen']:>10} images  {part:<20} loss {loss}  {images_per_s:.0f} images/s  "
            f"MFU {100 * line['mfu']:.1f} % of the measured peak  lr {line['lr']:.2e}"
        )

    def progress(self) -> dict[str, Any]:
        """Return the state of the counters, for a checkpoint."""
        self.count_time()
        self._read()
        return self.metrics.state()

    def row_columns(self) -> dict[str, Any]:
        """Return the columns of the results row of a budget that ends here."""
        self.count_time()
        took = self.metrics.total
        images_per_s = took.num_images / took.wall_s
        scored = mean_scored_tokens(self._model_config, self._config.training.objective.prefix)
        return {
            "train_loss": self.metrics.train_loss,
            "wall_s": took.wall_s,
            "device_hours": took.device_s / 3600,
            "images_per_s": images_per_s,
            **self._utilisation(images_per_s=images_per_s, scored_tokens=scored),
            "num_skipped_steps": took.num_skipped_steps,
            "num_bad_samples": took.num_bad_samples,
            "num_loss_spikes": took.num_loss_spikes,
            "world_size": self._group.world_size,
        }


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append one JSON line, visible to readers at once; a line cut off by a kill stays a line of its own.

    Raises:
        LockLost: another process took the run over.
        ValueError: there is a NaN or an infinity in it.
    """
    check_writer(path)
    with path.open("a+b") as file:
        size = file.tell()
        file.seek(max(0, size - 1))
        begins_anew = size == 0 or file.read(1) == b"\n"
        file.write((("" if begins_anew else "\n") + json.dumps(line, allow_nan=False) + "\n").encode())


def device_memory_bytes(group: Group) -> int:
    """Return the peak memory of the device, or on a CPU of the process."""
    if group.device.type == "cuda":
        return torch.cuda.max_memory_allocated(group.device)
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
