"""Counts and measurements of a run so far, for its log lines, its budgets' rows and its checkpoints.

Checkpoints hold the steps that are in no line yet, so that an interrupted run logs what an uninterrupted one does.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from aimscale.harness.run.schedule import Segment

SPIKE_WINDOW = 100
"""Number of preceding losses that a loss is compared with ..."""
SPIKE_SIGMAS = 6.0
"""... and number of standard deviations above their mean from which it counts as a spike (half of the window
suffices)."""
TAIL_FRACTION = 0.05
"""Last share of a budget, over which its `train_loss` is averaged."""
_NOWHERE = Segment(start=0, stop=0, branch=None)


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

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return dataclasses.asdict(self)

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        saved = {"batch_size": self.batch_size, **state}  # until November 2026 checkpoints did not hold it
        vars(self).update(vars(TypeAdapter(Metrics).validate_python(saved)))


def _mean(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return math.fsum(numbers) / len(numbers) if numbers else None
