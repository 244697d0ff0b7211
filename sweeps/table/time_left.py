"""Time left of a sweep: what its runs lack by the plan, corrected by what others took, on the devices in use."""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Iterable, Sequence
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
    spent_s: float | None = None
    """Total time of a finished run, all attempts, s; None if it has not finished."""


def time_left(cards: Sequence[CostCard], runs: Sequence[Progress]) -> tuple[list[float], float | None, bool]:
    """Return the remaining time of each run and of the sweep, s, and whether it is based on a measured pace.

    Steps take as many times what the plan says as those of the measured runs that are nearest in size; evaluation as
    many times as that of runs that finished. The time of the sweep is None if no device is in use.
    """
    measured = [
        (card, run, card.batch_size / run.images_per_s / _planned_step_s(card))
        for card, run in zip(cards, runs, strict=True)
        if run.images_per_s
    ]
    startup_s = _median((run.startup_s for _, run, _ in measured if run.startup_s is not None), 0.0)
    ended = [
        (run.spent_s - slower * card.training_s) / (slower * card.evaluation_s)
        for card, run, slower in measured
        if run.spent_s is not None and card.evaluation_s
    ]
    evaluation = max(0.0, _median(ended, 1.0))

    def remaining_s(card: CostCard, run: Progress) -> float:
        if run.is_over:
            return 0.0
        if run.is_running and run.images_per_s:
            slower = card.batch_size / run.images_per_s / _planned_step_s(card)
        else:
            apart = [(abs(math.log(_step_flops(card) / _step_flops(other))), each) for other, _, each in measured]
            nearest = min((distance for distance, _ in apart), default=0.0)
            slower = _median((each for distance, each in apart if distance == nearest), 1.0)
        training_s = card.training_s * max(0, card.images_executed - run.images_done) / card.images_executed
        evaluation_s = evaluation * card.evaluation_s * run.flops_to_evaluate / (card.flops_evaluation or 1.0)
        return max(0.0, startup_s - run.elapsed_s) + slower * (training_s + evaluation_s)

    left = [remaining_s(card, run) for card, run in zip(cards, runs, strict=True)]
    free = [left[i] for i, run in enumerate(runs) if run.is_running for _ in range(cards[i].devices)]
    waiting = [i for i, run in enumerate(runs) if free and not run.is_running and not run.is_over]
    waiting.sort(key=lambda i: -cards[i].device_hours)
    ends = schedule_s(free, [(left[i], cards[i].devices) for i in waiting])
    return left, max(ends, default=None), bool(measured)


def _planned_step_s(card: CostCard) -> float:
    return card.training_s / card.steps


def _step_flops(card: CostCard) -> float:
    """Return the FLOPs of a step on one device, by which runs are near in size or not."""
    return card.flops_executed / card.steps / card.devices


def _median(values: Iterable[float], default: float) -> float:
    found = list(values)
    return statistics.median(found) if found else default


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
