"""Bookkeeping of a training run: counts and measurements so far, the lines made of them, and the state of both.

Checkpoints hold the steps that are in no line yet, so that an interrupted run logs what an uninterrupted one does.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from aimscale.aim.cost import mean_scored_tokens
from aimscale.harness.device.memory import peak_memory_bytes
from aimscale.harness.device.speed import Peak, utilisation
from aimscale.harness.distributed.group import Group
from aimscale.harness.log.loggers import Logger, line_scalars
from aimscale.harness.run.config import RunConfig, build_model_config
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.failures import DivergedError
from aimscale.harness.run.files import append_line
from aimscale.harness.run.schedule import Segment

_log = logging.getLogger(__name__)

SPIKE_WINDOW = 100
"""Number of preceding losses that a loss is compared with ..."""
SPIKE_SIGMAS = 6.0
"""... and number of standard deviations above their mean from which it is a spike (half of the window suffices)."""
TAIL_FRACTION = 0.05
"""Last share of a budget, over which its `train_loss` is averaged."""
_NOWHERE = Segment(start=0, stop=0, branch=None)
SHOWN = ("images_seen", "images_done", "step", "loss", "num_skipped_steps", "mfu_published", "mfu")
"""Columns of a line that `status.json` shows, too."""
MAX_SKIPPED_STEPS = 20
"""Maximum number of consecutive non-finite steps; with more, the run has diverged."""
RECENT_LINES = 10
"""Number of last lines over which the rate in `status.json` is taken, from which the time left follows."""
STATUS_INTERVAL_S = 5.0
"""Interval between lines that are shown in `status.json`, s, whose renaming burdens the server of a shared disk."""


@dataclasses.dataclass(kw_only=True)
class Totals:
    """Cost and incidents of a stretch of training."""

    wall_s: float = 0.0
    """Wall time of steps and checkpoints."""
    device_s: float = 0.0
    """The same times the number of devices."""
    num_images: int = 0
    num_skipped_steps: int = 0
    """Non-finite steps."""
    num_bad_samples: int = 0
    """Undecodable samples, replaced."""
    num_loss_spikes: int = 0
    """Losses far above those before them."""

    def __add__(self, other: Totals) -> Totals:
        ours, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return Totals(**{key: ours[key] + theirs[key] for key in ours})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedStep:
    """Step that was taken."""

    images_seen: int
    """Images seen after the step."""
    lr: float
    num_targets: int
    was_applied: bool
    """Whether it updated the weights."""
    loss: float | None = None
    """Mean over its targets; null if not finite."""
    grad_norm: float | None = None
    """Norm before clipping; null if not finite."""
    is_spike: bool = False
    """Whether the loss stands out from those before it."""
    num_bad_samples: int = 0
    """Undecodable samples of all ranks."""
    data_wait_s: float = 0.0
    """Time in which this rank waited for its images, s."""
    forward_s: float = 0.0
    """Time of this rank's forward passes, s."""


@dataclasses.dataclass(kw_only=True)
class Metrics:
    """Collector of steps that turns them into lines; checkpoints hold all of its fields."""

    batch_size: int
    segment: Segment = _NOWHERE
    """Segment that the run is on."""
    images_done: int = 0
    """Images trained on, decay branches included."""
    consecutive_skipped: int = 0
    """Non-finite steps since the last finite one."""
    trunk: Totals = dataclasses.field(default_factory=Totals)
    """Totals of the trunk so far."""
    branch: Totals = dataclasses.field(default_factory=Totals)
    """Totals of the branch that the run is on."""
    steps: list[TrainedStep] = dataclasses.field(default_factory=list)
    """Steps that are in no line yet."""
    recent: list[float] = dataclasses.field(default_factory=list)
    """Last `SPIKE_WINDOW` losses."""
    tail_sum: float = 0.0
    """Sum of the losses over the budget's tail ..."""
    tail_count: int = 0
    """... and their number."""

    @property
    def current(self) -> Totals:
        """Totals of the trunk or the branch, wherever the run is."""
        return self.trunk if self.segment.branch is None else self.branch

    @property
    def total(self) -> Totals:
        """Totals of the way from the start of the trunk to here."""
        return self.trunk if self.segment.branch is None else self.trunk + self.branch

    @property
    def train_loss(self) -> float | None:
        """Mean loss over the budget's tail."""
        return self.tail_sum / self.tail_count if self.tail_count else None

    def enter(self, segment: Segment) -> None:
        """Begin a segment, or resume it after a restart; a branch's counts begin with it."""
        self.segment = segment
        if not segment.resumes:
            self.tail_sum, self.tail_count = 0.0, 0
            self.recent.clear()  # losses at another learning rate
            if segment.branch is not None:
                self.branch = Totals()

    def count(self, step: TrainedStep) -> None:
        """Count a step, whose loss may not be known yet."""
        self.images_done += self.batch_size
        self.current.num_images += self.batch_size
        self.current.num_skipped_steps += not step.was_applied
        self.current.num_bad_samples += step.num_bad_samples
        self.consecutive_skipped = 0 if step.was_applied else self.consecutive_skipped + 1

    def add(self, step: TrainedStep) -> None:
        """Add a counted step to the next line."""
        if (loss := step.loss) is not None:
            if len(self.recent) >= SPIKE_WINDOW // 2:
                most = np.mean(self.recent) + SPIKE_SIGMAS * np.std(self.recent)
                step = dataclasses.replace(step, is_spike=bool(loss > most))
            self.current.num_loss_spikes += step.is_spike
            self.recent = [*self.recent, loss][-SPIKE_WINDOW:]
            branch = self.segment.branch
            if branch is not None and step.images_seen > (1 - TAIL_FRACTION) * branch:
                self.tail_sum, self.tail_count = self.tail_sum + loss, self.tail_count + 1
        self.steps.append(step)

    def line(self) -> dict[str, Any]:
        """Make a line of the steps since the last; means are over applied steps, null if there was none."""
        applied = [step for step in self.steps if step.was_applied]
        last = self.steps[-1]
        line = {
            "images_seen": last.images_seen,
            "step": last.images_seen // self.batch_size,
            "branch": self.segment.branch,
            "loss": _mean([step.loss for step in applied]),
            "loss_max": max((step.loss for step in applied if step.loss is not None), default=None),
            "grad_norm": _mean([step.grad_norm for step in applied]),
            "lr": last.lr,
            "num_skipped_steps": self.total.num_skipped_steps,
            "loss_spikes": [step.images_seen for step in self.steps if step.is_spike],
        }
        self.steps.clear()
        return line

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the fields that a checkpoint holds."""
        saved = {"batch_size": self.batch_size, **state}  # until November 2026 checkpoints did not hold it
        vars(self).update(vars(TypeAdapter(Metrics).validate_python(saved)))


def _mean(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return math.fsum(numbers) / len(numbers) if numbers else None


class Recorder:
    """Recorder of every line, in `metrics.jsonl`, `status.json`, the loggers and the log."""

    def __init__(
        self, run: RunDir, config: RunConfig, group: Group, peak: Peak, loggers: Sequence[Logger] = ()
    ) -> None:
        self._run, self._config, self._group, self.loggers = run, config, group, loggers
        self._model = build_model_config(config.training)
        self._utilisation = functools.partial(utilisation, self._model, peak, world_size=group.world_size)
        self._batch_size = config.training.optimiser.batch_size
        self.metrics = Metrics(batch_size=self._batch_size)
        self._unread: list[tuple[TrainedStep, Tensor, Tensor]] = []
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
        self._counted_until, self._wall_s = time.perf_counter(), 0.0
        self._interval: list[TrainedStep] = []

    def step(self, step: TrainedStep, loss_sum: Tensor, grad_norm: Tensor) -> None:
        """Record a step; a line is written when it is due, for which all ranks wait.

        Args:
            loss_sum: sum over all ranks. Both numbers stay on the device until a line or a checkpoint needs them, so
                that the host gives the device the next step at once.

        Raises:
            DivergedError: too many non-finite steps in a row.
            LockLost: another process took the run over.
        """
        self.metrics.count(step)
        self._unread.append((step, loss_sum, grad_norm))
        self._interval.append(step)
        every = self._config.runtime.log_every_steps
        if step.images_seen // self._batch_size % every == 0 or step.images_seen == self.metrics.segment.stop:
            self._write_line()
            self._group.barrier()  # here and not in the next step's collectives, whose time is short
        if (skipped := self.metrics.consecutive_skipped) > MAX_SKIPPED_STEPS:
            raise DivergedError(
                f"{skipped} steps in a row were not finite, up to image {step.images_seen}; "
                "lower optimiser.lr_peak or lengthen the warm-up"
            )

    def _read(self) -> None:
        """Read the losses and norms of the steps so far, all in one wait for the device."""
        losses = [loss_sum for _, loss_sum, _ in self._unread]
        norms = [grad_norm.to(loss_sum).view(()) for _, loss_sum, grad_norm in self._unread]
        values = torch.stack([*losses, *norms]).tolist() if losses else []
        for (step, *_), loss_sum, norm in zip(self._unread, values[: len(losses)], values[len(losses) :], strict=True):
            loss, grad_norm = (x if math.isfinite(x) else None for x in (loss_sum / step.num_targets, norm))
            self.metrics.add(dataclasses.replace(step, loss=loss, grad_norm=grad_norm))
        self._unread.clear()

    def count_time(self) -> float:
        """Add the time since the last call to the counters; returns the interval's time so far."""
        before, self._counted_until = self._counted_until, time.perf_counter()
        wall_s = self._counted_until - before
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
        steps = self._interval
        times_s = sum(step.data_wait_s for step in steps), sum(step.forward_s for step in steps)
        waits_s, forwards_s = zip(*self._group.all_gather_object(times_s), strict=True)
        self._begin_interval()
        if not self._group.is_first:
            return
        num_images, num_targets = self._batch_size * len(steps), sum(step.num_targets for step in steps)
        images_per_s = num_images / wall_s
        line |= {
            "images_done": self.metrics.images_done,
            "images_per_s": images_per_s,
            "ms_per_step": 1000 * wall_s / len(steps),
            **self._utilisation(images_per_s=images_per_s, scored_tokens=num_targets / num_images),
            "data_wait": max(waits_s) / wall_s,
            "data_wait_rank": waits_s.index(max(waits_s)),
            "forward_ms": 1000 * max(forwards_s) / len(steps),
            "forward_rank": forwards_s.index(max(forwards_s)),
            "device_memory_gb": peak_memory_bytes(self._group.device) / 1e9,
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
        scalars = line_scalars(line, is_cosine=self._config.training.schedule.kind == "cosine") if self.loggers else {}
        for logger in self.loggers:
            if self.metrics.images_done > logger.logged_until:  # else it is trained again
                logger.log_values(line["images_seen"], scalars)
        loss, part = line["loss"], "stable" if branch is None else f"decay to {branch}"
        _log.info(
            f"{line['images_seen']:>10} images  {part:<20} "
            f"loss {'not finite' if loss is None else f'{loss:.4f}'}  {images_per_s:.0f} images/s  "
            f"MFU {100 * line['mfu']:.1f} % of the measured peak  lr {line['lr']:.2e}"
        )

    def progress(self) -> dict[str, Any]:
        """Return the state of the counters, for a checkpoint."""
        self.count_time()
        self._read()
        return dataclasses.asdict(self.metrics)

    def row_columns(self) -> dict[str, Any]:
        """Return the columns of the results row of a budget that ends here."""
        self.count_time()
        took = self.metrics.total
        images_per_s = took.num_images / took.wall_s
        scored = mean_scored_tokens(self._model, self._config.training.objective.prefix)
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
