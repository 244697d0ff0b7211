"""Counts and measurements of a run so far, for its log lines, its budgets' rows and its checkpoints.

Checkpoints hold the steps that are in no line yet, so that an interrupted run logs what an uninterrupted one does.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from typing import Any

from aimscale.harness.run.schedule import Segment

SPIKE_WINDOW = 100
"""Number of preceding losses that a loss is compared with ..."""
SPIKE_SIGMAS = 6.0
"""... and number of standard deviations above their mean from which it counts as a spike (half of the window
suffices)."""
TAIL_FRACTION = 0.05
"""Last share of a budget, over which its `train_loss` is averaged."""


@dataclasses.dataclass(kw_only=True)
class Tally:
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

    def __add__(self, other: Tally) -> Tally:
        ours, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return Tally(**{key: ours[key] + theirs[key] for key in ours})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedStep:
    """Step that was taken."""

    images_seen: int
    """Images seen after the step."""
    lr: float
    num_targets: int
    was_applied: bool
    """Whether it updated the weights."""
    loss: float | None
    """Mean over its targets; null if not finite."""
    grad_norm: float | None
    """Norm before clipping; null if not finite."""
    is_spike: bool = False
    """Whether the loss stands out from those before it."""


class Metrics:
    """Collector of steps that turns them into lines."""

    def __init__(self, batch_size: int) -> None:
        self.images_done = 0
        """Images trained on, decay branches included."""
        self.consecutive_skipped = 0
        """Non-finite steps since the last finite one."""
        self.trunk, self.branch = Tally(), Tally()
        """Tallies of the trunk so far, and of the branch that the run is on."""
        self._batch_size = batch_size
        self._segment = Segment(start=0, stop=0, branch=None)
        self._steps: list[TrainedStep] = []
        self._tail_sum, self._tail_count = 0.0, 0
        self._recent: collections.deque[float] = collections.deque(maxlen=SPIKE_WINDOW)

    @property
    def current(self) -> Tally:
        """Tally of the trunk or the branch, wherever the run is."""
        return self.trunk if self._segment.branch is None else self.branch

    @property
    def total(self) -> Tally:
        """Tally of the way from the start of the trunk to here."""
        return self.trunk if self._segment.branch is None else self.trunk + self.branch

    def enter(self, segment: Segment) -> None:
        """Begin a segment, or resume it after a restart; a branch's counts begin with it."""
        self._segment = segment
        if not segment.resumes:
            self._tail_sum, self._tail_count = 0.0, 0
            self._recent.clear()  # losses at another learning rate
            if segment.branch is not None:
                self.branch = Tally()

    def add(self, step: TrainedStep, *, num_bad_samples: int = 0) -> None:
        """Count a step, in which so many samples could not be decoded."""
        self.images_done += self._batch_size
        self.current.num_images += self._batch_size
        self.current.num_skipped_steps += not step.was_applied
        self.current.num_bad_samples += num_bad_samples
        self.consecutive_skipped = 0 if step.was_applied else self.consecutive_skipped + 1
        if (loss := step.loss) is not None:
            step = dataclasses.replace(step, is_spike=self._stands_out(loss))
            self.current.num_loss_spikes += step.is_spike
            self._recent.append(loss)
            branch = self._segment.branch
            if branch is not None and step.images_seen > (1 - TAIL_FRACTION) * branch:
                self._tail_sum, self._tail_count = self._tail_sum + loss, self._tail_count + 1
        self._steps.append(step)

    def line(self) -> dict[str, Any]:
        """Make a line of the steps since the last; means are over applied steps, null if there was none."""
        applied = [step for step in self._steps if step.was_applied]
        last = self._steps[-1]
        line = {
            "images_seen": last.images_seen,
            "step": last.images_seen // self._batch_size,
            "branch": self._segment.branch,
            "loss": _mean([step.loss for step in applied]),
            "loss_max": max((step.loss for step in applied if step.loss is not None), default=None),
            "grad_norm": _mean([step.grad_norm for step in applied]),
            "lr": last.lr,
            "num_skipped_steps": self.total.num_skipped_steps,
            "loss_spikes": [step.images_seen for step in self._steps if step.is_spike],
        }
        self._steps.clear()
        return line

    def _stands_out(self, loss: float) -> bool:
        """Return whether a loss is a spike."""
        if len(self._recent) < SPIKE_WINDOW // 2:
            return False
        return loss > statistics.fmean(self._recent) + SPIKE_SIGMAS * statistics.pstdev(self._recent)

    @property
    def train_loss(self) -> float | None:
        """Mean loss over the budget's tail."""
        return self._tail_sum / self._tail_count if self._tail_count else None

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, with all steps that are not yet in a line."""
        return {
            "images_done": self.images_done,
            "consecutive_skipped": self.consecutive_skipped,
            "trunk": dataclasses.asdict(self.trunk),
            "branch": dataclasses.asdict(self.branch),
            "steps": [dataclasses.asdict(step) for step in self._steps],
            "tail_sum": self._tail_sum,
            "tail_count": self._tail_count,
            "recent": list(self._recent),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.images_done, self.consecutive_skipped = state["images_done"], state["consecutive_skipped"]
        self.trunk, self.branch = Tally(**state["trunk"]), Tally(**state["branch"])
        self._steps = [TrainedStep(**step) for step in state["steps"]]
        self._tail_sum, self._tail_count = state["tail_sum"], state["tail_count"]
        self._recent = collections.deque(state["recent"], maxlen=SPIKE_WINDOW)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
