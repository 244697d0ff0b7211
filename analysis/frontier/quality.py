"""Points and budgets of an iso-FLOP table that look wrong, each with what the exponent would be without it."""

from __future__ import annotations

import numpy as np
import pandas as pd

from aimscale.analysis.frontier.optimum import log_line
from aimscale.analysis.frontier.parabola import Budget, near, vertex
from aimscale.analysis.laws.base import Array

OFF_CENTRE = 0.2
"""A vertex in the outer fifth of its budget's sizes is off the centre."""
NEAR_DUPLICATE = 0.02
"""Sizes of one budget, run and seed closer than this fraction stand for one point twice."""
FAR = 5.0
"""A point further from its parabola than this many robust standard deviations of all parabolas' residuals."""


MOST_ADVICE = 8
"""Sentences of advice at most."""


def advice(points: pd.DataFrame, accepted: list[Budget], table: pd.DataFrame, exponent: float) -> tuple[str, ...]:
    """Budgets and points that look wrong, each by name with what the exponent would be without it."""
    log_losses = np.log(points["loss"].to_numpy())[None]
    out = []
    log_n = np.log(table["N"].to_numpy())
    residuals = [_residual(each, log_losses) for each in accepted]
    scale = 1.4826 * float(np.median(np.abs(np.concatenate(residuals)))) + 1e-300
    for k, budget in enumerate(accepted):
        sizes = np.log(budget.num_params)
        place = (log_n[k] - sizes.min()) / np.ptp(sizes)
        if not OFF_CENTRE < place < 1 - OFF_CENTRE and len(accepted) > 2:
            without = log_line(*(np.delete(table[c].to_numpy(), k) for c in ("C", "N")))[1]
            out.append(
                f"The optimum at C = {budget.flops:.3g} lies at the edge of its sizes; without this budget the "
                f"exponent is {without:.3f} instead of {exponent:.3f}."
            )
        order = np.argsort(sizes)
        twins = [
            int(max(budget.rows[order[i]], budget.rows[order[i + 1]]))
            for i in np.flatnonzero((np.diff(sizes[order]) < NEAR_DUPLICATE) & (np.diff(sizes[order]) > 0))
        ]
        far = [int(budget.rows[i]) for i in np.flatnonzero(np.abs(residuals[k]) > FAR * scale)]
        for row, what in [(r, "nearly repeats another size") for r in twins] + [
            (r, "lies far from its parabola") for r in far if r not in twins
        ]:
            without_point = _exponent_without(row, accepted, log_losses)
            out.append(
                f"Row {points.index[row]} (N = {points['N'].iloc[row]:.3g}, C = {budget.flops:.3g}) {what}; without it "
                f"the exponent is {without_point:.3f} instead of {exponent:.3f}."
            )
    return tuple(out[:MOST_ADVICE])


def _residual(budget: Budget, log_losses: Array) -> Array:
    """Relative residuals (m,) of a budget's parabola; 0 outside of its window."""
    losses = budget.losses(log_losses)[0]
    close = near(budget.num_params, budget.num_params[np.argmin(losses)])
    x = np.log(budget.num_params[close])
    out = np.zeros(len(losses))
    # without each point in turn, so that an outlier cannot bend the parabola towards itself
    for i, place in enumerate(np.flatnonzero(close)):
        others = np.arange(len(x)) != i
        if len(np.unique(x[others])) < 3:
            continue
        curve = np.polyfit(x[others] - x.mean(), losses[close][others], 2)
        out[place] = losses[place] / np.polyval(curve, x[i] - x.mean()) - 1
    return out


def _exponent_without(row: int, accepted: list[Budget], log_losses: Array) -> float:
    """The exponent when one row of the table is left out."""
    tops, flops = [], []
    for budget in accepted:
        keep = budget.rows != row
        found = vertex(budget.num_params[keep], budget.losses(log_losses)[0][keep])
        if not isinstance(found, str):
            tops.append(np.exp(found[0]))
            flops.append(budget.flops)
    return log_line(np.array(flops), np.array(tops))[1] if len(tops) > 1 else float("nan")
