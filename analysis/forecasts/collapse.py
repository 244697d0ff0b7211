"""Do the training curves of all rungs have one shape? Normalised by their ends they do, where rates scale well.

At a fixed D / N the curves of well-tuned rungs coincide, or drift slowly with size, within the noise of seeds; a rung
whose curve has another shape is mis-tuned, and that shows long before its end: curves are cut at one share of training.
(Loss-curve collapse: arXiv 2507.02119, 2509.25087.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import f as fisher

from aimscale.analysis.display import Result, plain_types
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.laws.base import Array

START = 0.1
"""Share of training before which curves are not compared: warm-up."""
NUM_BINS = 15
END_BINS = 3
"""Last steps of progress whose mean is the end by which a curve is normalised."""
FALSE_ALARMS = 0.02
"""Probability that any rung of a well-tuned ladder is named."""
SMOOTHNESS = 3
"""Degrees of freedom of a smooth curve's departure: bins of one curve are not independent (an assumption, checked on
simulated ladders: no false alarm in 14, the limit met by every rung at three times its rate)."""
MIN_RUNGS = 5
"""Four rungs besides the one in question: two for the drift with size, two for the noise."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Collapse(Result):
    """Shapes of the training curves, rung by rung."""

    table: pd.DataFrame
    """One row a rung: rung, num_runs, distance (root mean square over progress, in log loss, from where the other rungs
    put it), ratio (squared, over the others' own scatter), limit (beyond which it is named), deviates."""
    curves: pd.DataFrame = field(repr=False)
    """Normalised curves, means over a rung's runs: rung, progress, value (loss over its end)."""
    until: float
    """Share of training that is compared."""

    @property
    def deviating(self) -> list[str]:
        """Rungs that deviate beyond the noise."""
        return [str(rung) for rung in self.table.loc[self.table["deviates"], "rung"]]

    def headline(self) -> str:
        """The verdict."""
        so_far = "" if self.until >= 1 else f" up to {self.until:.0%} of training"
        if not self.deviating:
            return f"The curves of {len(self.table)} rungs collapse{so_far}: none deviates beyond the noise"
        verb = "deviates" if len(self.deviating) == 1 else "deviate"
        return f"{', '.join(self.deviating)} {verb} from the other rungs' curve{so_far}: look at the learning rate"

    def to_dict(self) -> dict[str, Any]:
        """Plain types, without the curves."""
        return plain_types({"until": self.until, "deviating": self.deviating, "rungs": self.table.to_dict("records")})


def collapse(curves: pd.DataFrame, *, until: float | None = None) -> Collapse:
    """Compare the shapes of training curves over rungs.

    Each rung's mean log curve over its end is held against where the others put it (a straight line over their order at
    every step of progress), in units of the others' scatter about that line; the ratio follows Fisher's F.

    Args:
        curves: one row per logged step: rung (in order of size), run, progress (share of training, 0 to 1), loss.
        until: share of training that is compared; default: the least that all runs have reached.

    Raises:
        AnalysisError: too few rungs, or curves too short to have a shape.
    """
    reached = float(curves.groupby("run")["progress"].max().min())
    until = reached if until is None else until
    if not 2 * START <= until <= reached + 1e-9:
        raise AnalysisError(
            f"Shapes are compared from {2 * START:.0%} of training on, and a run has reached {reached:.0%}; wait for "
            "it or leave it out."
        )
    rungs = list(dict.fromkeys(curves["rung"]))
    if len(rungs) < MIN_RUNGS:
        raise AnalysisError(
            f"There are curves of {len(rungs)} rungs; their shapes are compared over {MIN_RUNGS} or more."
        )
    edges = np.linspace(START, until, NUM_BINS + 1)
    shapes, num_runs = [], []
    for rung in rungs:
        of_rung = curves[(curves["rung"] == rung) & (curves["progress"] <= until)]
        each = [_shape(curve, edges) for _, curve in of_rung.groupby("run", sort=False)]
        shapes.append(np.mean(each, axis=0))
        num_runs.append(len(each))
    distances, ratios = _held_against_others(np.array(shapes))
    limit = float(fisher.isf(FALSE_ALARMS / len(rungs), SMOOTHNESS, SMOOTHNESS * (len(rungs) - 3)))
    table = pd.DataFrame({"rung": rungs, "num_runs": num_runs, "distance": distances, "ratio": ratios, "limit": limit})
    table["deviates"] = table["ratio"] > limit
    middle = (edges[:-1] + edges[1:]) / 2
    drawn = [
        pd.DataFrame({"rung": r, "progress": middle, "value": np.exp(s)}) for r, s in zip(rungs, shapes, strict=True)
    ]
    return Collapse(table=table, curves=pd.concat(drawn, ignore_index=True), until=until)


def _shape(curve: pd.DataFrame, edges: Array) -> Array:
    """Mean log loss in every step of progress, over its end; steps without a line lie between their neighbours.

    Raises:
        AnalysisError: too few lines, or a loss that is not positive.
    """
    curve = curve.dropna(subset=["loss"])
    bins = np.digitize(curve["progress"], edges[1:-1])
    inside = curve["progress"].to_numpy() >= edges[0]
    if len(np.unique(bins[inside])) < NUM_BINS // 2 or (curve["loss"] <= 0).any():
        run = curve["run"].iloc[0] if len(curve) else "that has no losses"
        raise AnalysisError(
            f"The curve of run {run} has too few logged losses above 0; log more often or leave it out."
        )
    means = pd.Series(np.log(curve["loss"].to_numpy(float)[inside])).groupby(bins[inside]).mean()
    logs = np.interp(np.arange(NUM_BINS), means.index, means.to_numpy())
    return logs - logs[-END_BINS:].mean()


def _held_against_others(shapes: Array) -> tuple[Array, Array]:
    """Every rung's distance from where the others put it, and its square over their scatter; shapes (rungs, bins)."""
    n, num_bins = shapes.shape
    design = np.stack([np.ones(n), np.arange(n)], axis=1)
    distances, ratios = np.empty(n), np.empty(n)
    for i in range(n):
        others = np.arange(n) != i
        line, *_ = np.linalg.lstsq(design[others], shapes[others], rcond=None)
        scatter = np.sum((shapes[others] - design[others] @ line) ** 2) / ((n - 3) * num_bins)
        leverage = design[i] @ np.linalg.inv(design[others].T @ design[others]) @ design[i]
        square = float(np.mean((shapes[i] - design[i] @ line) ** 2))
        distances[i], ratios[i] = np.sqrt(square), square / (1 + leverage) / max(scatter, 1e-12)
    return distances, ratios
