"""The steps since the last line, and the lines that they become.

Losses stay on the device until a line is due: between lines nothing waits for it. What is pending at a checkpoint is
stored in it, so that an interrupted run writes the same lines as an uninterrupted one.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from typing import Any

import torch

from aimscale.harness.device.distributed import Group
from aimscale.harness.step.engine import StepOutcome

SPIKE_WINDOW = 100
"""A loss is compared with this many before it ..."""
SPIKE_SIGMAS = 6.0
"""... and called a spike when it is above their mean by so many standard deviations (half of the window suffices)."""
TAIL_FRACTION = 0.05
"""A budget's `train_loss` is the mean over this last share of it."""


@dataclasses.dataclass(kw_only=True)
class _Step:
    """One step that is not yet in a line."""

    images_seen: int
    """After it."""
    lr: float
    num_targets: int
    was_applied: bool
    """Whether it updated the weights."""
    in_tail: bool
    """Whether it counts into the budget's `train_loss`."""
    loss: float | None = None
    """Mean over its targets; null when it was not finite."""
    grad_norm: float | None = None
    """Before clipping; null when it was not finite."""
    is_spike: bool = False
    """Whether the loss stands out from those before it."""


class StepLog:
    """Collects steps and turns them into lines, without waiting for the device in between."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._settled: list[_Step] = []
        self._pending: list[tuple[_Step, StepOutcome]] = []
        self._tail_sum, self._tail_count = 0.0, 0
        self._recent: collections.deque[float] = collections.deque(maxlen=SPIKE_WINDOW)

    def add(self, outcome: StepOutcome, *, images_seen: int, lr: float, num_targets: int, in_tail: bool) -> None:
        """Note a step; `in_tail` counts it into the budget's `train_loss`."""
        step = _Step(
            images_seen=images_seen, lr=lr, num_targets=num_targets, was_applied=outcome.was_applied, in_tail=in_tail
        )
        self._pending.append((step, outcome))

    def _settle(self) -> None:
        """Bring pending values to the host: one sum over ranks for all of them."""
        if not self._pending:
            return
        sums = self._group.sum_tensor(torch.stack([outcome.loss_sum for _, outcome in self._pending]).double()).tolist()
        norms = torch.stack([outcome.grad_norm.double().cpu() for _, outcome in self._pending]).tolist()
        for (step, _), loss_sum, norm in zip(self._pending, sums, norms, strict=True):
            step.loss = loss_sum / step.num_targets if math.isfinite(loss_sum) else None
            step.grad_norm = norm if math.isfinite(norm) else None
            if step.loss is not None:
                step.is_spike = self._stands_out(step.loss)
                self._recent.append(step.loss)
                if step.in_tail:
                    self._tail_sum, self._tail_count = self._tail_sum + step.loss, self._tail_count + 1
            self._settled.append(step)
        self._pending.clear()

    def _stands_out(self, loss: float) -> bool:
        if len(self._recent) < SPIKE_WINDOW // 2:
            return False
        return loss > statistics.fmean(self._recent) + SPIKE_SIGMAS * statistics.pstdev(self._recent)

    def line(self, batch_size: int, branch: int | None, num_skipped_steps: int) -> dict[str, Any]:
        """One line for the steps since the last; means are over applied steps, null if there was none."""
        self._settle()
        applied = [step for step in self._settled if step.was_applied]
        last = self._settled[-1]
        line: dict[str, Any] = {
            "images_seen": last.images_seen,
            "step": last.images_seen // batch_size,
            "branch": branch,
            "loss": _mean([step.loss for step in applied]),
            "loss_max": max((step.loss for step in applied if step.loss is not None), default=None),
            "grad_norm": _mean([step.grad_norm for step in applied]),
            "lr": last.lr,
            "num_skipped_steps": num_skipped_steps,
            "loss_spikes": [step.images_seen for step in self._settled if step.is_spike],
        }
        self._settled.clear()
        return line

    def train_loss(self) -> float | None:
        """Mean loss over the budget's tail."""
        self._settle()
        return self._tail_sum / self._tail_count if self._tail_count else None

    def start_segment(self) -> None:
        """Forget the tail of an earlier budget, and losses at another learning rate."""
        self._tail_sum, self._tail_count = 0.0, 0
        self._recent.clear()

    def state(self) -> dict[str, Any]:
        """Everything not yet in a line, for a checkpoint."""
        self._settle()
        return {
            "steps": [dataclasses.asdict(step) for step in self._settled],
            "tail_sum": self._tail_sum,
            "tail_count": self._tail_count,
            "recent": list(self._recent),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self._pending.clear()
        self._settled = [_Step(**step) for step in state["steps"]]
        self._tail_sum, self._tail_count = state["tail_sum"], state["tail_count"]
        self._recent = collections.deque(state["recent"], maxlen=SPIKE_WINDOW)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
