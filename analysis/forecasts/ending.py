"""Where a running run will end: its own loss now, and what was left to fall of the curves that are finished."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import t as student

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.laws.base import Array

WINDOW = 0.1
"""Share of the progress so far over which a loss is averaged: single lines are noisy."""
MIN_FINISHED = 3
MIN_FOR_LINE = 5
MIN_PROGRESS = 0.1


@dataclass(frozen=True, kw_only=True)
class Ending:
    """A forecast of a run's last training loss."""

    run: str
    progress: float
    """Share of its training so far."""
    value: float
    """Training loss at its end."""
    low: float
    """Lower end of the prediction interval."""
    high: float
    num_finished: int
    """Finished curves that it rests on."""
    confidence: float

    def sentence(self) -> str:
        """In words."""
        return (
            f"{self.run}: at {self.progress:.0%} of its training, will end at a training loss of {self.value:.4g} "
            f"[{self.low:.4g}, {self.high:.4g}] if its curve goes on like those of {self.num_finished} finished runs"
        )


def endings(curves: pd.DataFrame, *, confidence: float = 0.95) -> list[Ending]:
    """Forecast the ends of unfinished runs by the shape of the finished ones.

    The fall that is left, ln loss at the end minus ln loss now, is read off the finished runs at the same share of
    training: a straight line over their loss there, or its mean of fewer than five; the interval is Student's.

    Args:
        curves: one row per logged step: run, progress (share of the run's own training, 0 to 1), loss.

    Raises:
        AnalysisError: fewer than three finished runs.
    """
    by_run = {str(run): curve.dropna(subset=["loss"]) for run, curve in curves.groupby("run", sort=False)}
    finished = {run: curve for run, curve in by_run.items() if curve["progress"].max() >= 1 - 1e-9}
    if len(finished) < MIN_FINISHED:
        raise AnalysisError(
            f"{len(finished)} runs are finished; an end is forecast from the curves of at least {MIN_FINISHED}."
        )
    out = []
    for run, curve in by_run.items():
        progress = float(curve["progress"].max()) if len(curve) else 0.0
        if run in finished or progress < MIN_PROGRESS:
            continue
        here = np.array([_log_loss(each, progress) for each in finished.values()])
        left = np.array([_log_loss(each, 1.0) for each in finished.values()]) - here
        now = _log_loss(curve, progress)
        fall, half = _predicted(here, left, now, confidence)
        out.append(
            Ending(
                run=run,
                progress=progress,
                value=float(np.exp(now + fall)),
                low=float(np.exp(now + fall - half)),
                high=float(np.exp(now + fall + half)),
                num_finished=len(finished),
                confidence=confidence,
            )
        )
    return out


def _predicted(here: Array, left: Array, now: float, confidence: float) -> tuple[float, float]:
    """The fall that is left and half of its prediction interval: a line over the loss so far, or the mean of few runs.

    Larger models stand lower and have another share of their loss to lose, so a line beats the mean from five runs on.
    """
    n, tail = len(left), 0.5 + confidence / 2
    if n < MIN_FOR_LINE:
        return float(left.mean()), float(student.ppf(tail, n - 1) * np.std(left, ddof=1) * np.sqrt(1 + 1 / n))
    centred = here - here.mean()
    slope = float(centred @ left / (centred @ centred))
    rest = left - left.mean() - slope * centred
    leverage = 1 + 1 / n + (now - here.mean()) ** 2 / (centred @ centred)
    half = student.ppf(tail, n - 2) * np.sqrt(rest @ rest / (n - 2) * leverage)
    return float(left.mean() + slope * (now - here.mean())), float(half)


def _log_loss(curve: pd.DataFrame, progress: float) -> float:
    """Mean log loss just before a share of training."""
    at: Array = curve["progress"].to_numpy(float)
    inside = (at <= progress + 1e-9) & (at > progress * (1 - WINDOW))
    values = curve["loss"].to_numpy(float)[inside] if inside.any() else curve["loss"].to_numpy(float)[-1:]
    return float(np.mean(np.log(values)))
