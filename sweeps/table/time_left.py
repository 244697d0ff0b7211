"""Time left of a sweep: what its runs lack by the plan, corrected by the measured pace, on the devices in use."""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from aimscale.sweeps.plan.costs import CostCard


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Pace and progress of a run."""

    is_running: bool = False
    """Whether it occupies devices now."""
    is_over: bool = False
    """Whether no more of it will be executed: it finished, was cancelled, or failed for good."""
    images_done: int = 0
    """Images trained on."""
    flops_to_evaluate: float = 0.0
    """Remaining FLOPs of validation and probes."""
    images_per_s: float | None = None
    """Training speed of all devices together, images/s; None before the first log line."""
    startup_s: float | None = None
    """Time from the start of its process to its first step, s, at its last start."""
    elapsed_s: float = 0.0
    """Time since its last start, s."""


def time_left(cards: Sequence[CostCard], runs: Sequence[Progress]) -> tuple[list[float], float | None, bool]:
    """Return the remaining time of each run and of the sweep, s, and whether it is based on a measured pace.

    A run takes as many times what the plan says as its own pace shows, or else the median of those measured. The time
    of the sweep is None if no device is in use.
    """
    pairs = list(zip(cards, runs, strict=True))
    slower = [
        card.images_executed / card.training_s / run.images_per_s if run.images_per_s else None for card, run in pairs
    ]
    usual = statistics.median([each for each in slower if each] or [1.0])
    startup_s = statistics.median([run.startup_s for run in runs if run.startup_s is not None] or [0.0])
    left = []
    for (card, run), factor in zip(pairs, slower, strict=True):
        training_s = card.training_s * max(0, card.images_executed - run.images_done) / card.images_executed
        evaluation_s = card.evaluation_s * run.flops_to_evaluate / (card.flops_evaluation or 1.0)
        work_s = (factor or usual) * (training_s + evaluation_s)
        left.append(0.0 if run.is_over else max(0.0, startup_s - run.elapsed_s) + work_s)
    free = [left[i] for i, (card, run) in enumerate(pairs) if run.is_running for _ in range(card.devices)]
    waiting = [i for i, run in enumerate(runs) if free and not run.is_running and not run.is_over]
    waiting.sort(key=lambda i: -cards[i].device_hours)
    ends = schedule_s(free, [(left[i], cards[i].devices) for i in waiting])
    return left, max(ends, default=None), any(slower)


def schedule_s(free: Sequence[float], waiting: Sequence[tuple[float, int]]) -> list[float]:
    """Return when each device has done its part of some runs that start in order, each as soon as it can, s.

    Args:
        free: when each device becomes free, s.
        waiting: duration, s, and devices of each run; one that wants more devices than there are takes all.
    """
    ends = list(free)
    heapq.heapify(ends)
    for duration_s, num_devices in waiting:
        taken = [heapq.heappop(ends) for _ in range(min(num_devices, len(ends)))]
        for _ in taken:
            heapq.heappush(ends, max(taken) + duration_s)
    return ends
