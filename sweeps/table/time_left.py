"""Time left of a sweep: the remaining work of every run, at the measured pace, on the devices in use.

A step takes `a + b f`, with f the FLOPs of one device: small models are limited by kernel launches, large ones by
arithmetic. Evaluation takes k times as long as training with as many FLOPs. Before anything is measured, the times of
the cost cards are used.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aimscale.sweeps.plan.costs import CostCard

COMPUTE_BOUND_MFU = 0.4
"""Assumed MFU of a step that is limited by arithmetic."""
FIXED_STEP_SHARE = 0.75
"""Assumed part of a step's remaining time that is the same at every size. Measured sizes correct both assumptions."""
PRIOR_WEIGHT = 0.2
"""Weight of the assumptions relative to one measured run."""


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
    mfu: float | None = None
    """FLOPs executed over the peak measured on its device, 0..1."""
    startup_s: float | None = None
    """Time from the start of its process to its first step, s, at its last start."""
    elapsed_s: float = 0.0
    """Time since its last start, s."""
    spent_s: float | None = None
    """Total time of a finished run, all attempts, s; None if it has not finished."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Measured pace on the devices of a sweep."""

    step_s: float
    """a: time of a step apart from its arithmetic, s."""
    flop_s: float
    """b: time per FLOP of one device, s."""
    startup_s: float
    """Time to the first step, s."""
    evaluation: float
    """k: a FLOP of evaluation takes so many times what one of training takes."""


def time_left(cards: Sequence[CostCard], runs: Sequence[Progress]) -> tuple[list[float], float | None, bool]:
    """Return the remaining time of each run and of the sweep, s, and whether it is based on a measured pace.

    That of the sweep is None if no device is in use.
    """
    pace = measured_pace(cards, runs)
    left = [_remaining_s(card, run, pace) for card, run in zip(cards, runs, strict=True)]
    free = [left[i] for i, run in enumerate(runs) if run.is_running for _ in range(cards[i].devices)]
    waiting = [i for i, run in enumerate(runs) if free and not run.is_running and not run.is_over]
    waiting.sort(key=lambda i: -cards[i].device_hours)
    return left, max(schedule_s(free, [(left[i], cards[i].devices) for i in waiting]), default=None), pace is not None


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


def measured_pace(cards: Sequence[CostCard], runs: Sequence[Progress]) -> Pace | None:
    """Fit the pace to the measured runs, or return None if no run is measured.

    The errors of step times are weighted as relative errors.
    """
    seen = [(card, run, step_s) for card, run in zip(cards, runs, strict=True) if (step_s := _own_step_s(card, run))]
    if not seen:
        return None
    from scipy.optimize import nnls  # before anything is measured, `status` does without

    mean_s = sum(step_s for *_, step_s in seen) / len(seen)
    constant = [FIXED_STEP_SHARE * (1 - min(1.0, run.mfu / COMPUTE_BOUND_MFU)) for _, run, _ in seen if run.mfu] or [
        0.0
    ]
    rows = [[1 / step_s, _flops_of_step(card) / step_s] for card, _, step_s in seen] + [[PRIOR_WEIGHT / mean_s, 0.0]]
    units = np.max(rows, axis=0)
    found, _ = nnls(
        np.array(rows) / units, np.array([1.0] * len(seen) + [PRIOR_WEIGHT * sum(constant) / len(constant)])
    )
    startups = [run.startup_s for _, run, _ in seen if run.startup_s is not None]
    ended = [
        (_evaluation_s(card, card.flops_evaluation, step_s), max(0.0, run.spent_s - card.steps * step_s))
        for card, run, step_s in seen
        if run.spent_s is not None
    ]
    planned_s, spent_s = (sum(each) for each in zip(*ended, strict=True)) if ended else (0.0, 0.0)
    assumed_s = PRIOR_WEIGHT * planned_s / max(1, len(ended))
    return Pace(
        step_s=float(found[0] / units[0]),
        flop_s=float(found[1] / units[1]),
        startup_s=float(np.median(startups)) if startups else 0.0,
        evaluation=(spent_s + assumed_s) / (planned_s + assumed_s) if planned_s else 1.0,
    )


def _own_step_s(card: CostCard, run: Progress) -> float | None:
    return card.batch_size / run.images_per_s if run.images_per_s else None


def _flops_of_step(card: CostCard) -> float:
    """Return the FLOPs of a step on one device."""
    return card.flops_executed / card.steps / card.devices


def _evaluation_s(card: CostCard, flops: float, step_s: float) -> float:
    """Return the time of so many FLOPs of evaluation at the speed of training, s."""
    return card.steps * step_s * flops / card.flops_executed


def _remaining_s(card: CostCard, run: Progress, pace: Pace | None) -> float:
    """Return the remaining time of a run on its devices, s."""
    if run.is_over:
        return 0.0
    steps = max(0, card.images_executed - run.images_done) / card.batch_size
    if pace is None:
        evaluation_s = card.evaluation_s * run.flops_to_evaluate / (card.flops_evaluation or 1.0)
        return steps * card.training_s / card.steps + evaluation_s
    own_s = _own_step_s(card, run) if run.is_running else None
    step_s = own_s or pace.step_s + pace.flop_s * _flops_of_step(card)
    startup_s = max(0.0, pace.startup_s - run.elapsed_s) if run.is_running else pace.startup_s
    return startup_s + steps * step_s + pace.evaluation * _evaluation_s(card, run.flops_to_evaluate, step_s)
