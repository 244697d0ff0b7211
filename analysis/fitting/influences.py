"""One badly tuned rung can distort a law: refit without each size (or run, or budget); what moves, and what is off?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import t as student

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.errors import components_of
from aimscale.analysis.fitting.groups import Groups, groups_of, with_spread
from aimscale.analysis.fitting.optimise import global_minimum, minimise
from aimscale.analysis.fitting.problem import Problem, make_problem
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.laws.base import Array
from aimscale.analysis.words import Flag

FAMILY_ALARM = 0.05
"""Probability that any group of a sound table is named."""
BLIND_THRESHOLD = 6.0
"""Where too few sizes are left to know their spread, a group must lie this many standard deviations of points off."""


def influence(result: Fit, df: pd.DataFrame, *, by: str = "size") -> pd.DataFrame:
    """Leave each group out: one row per group with `num_points`, every parameter without it, and how far it lies off.

    `off` is its mean residual of T(y) from the law without it, `deviations` the same in standard deviations, and
    `threshold` how many of these only one sound table in twenty has anywhere.

    Args:
        by: column of the groups, or a variable of the law.

    Raises:
        AnalysisError: no such column, a single group, or too few points without one.
    """
    rows = df.loc[result.data.index]
    labels = result.data[by] if by in result.data.columns else rows[by] if by in rows.columns else None
    if labels is None:
        raise AnalysisError(f"There is no column {by!r} whose groups could be left out.")
    names, codes = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise AnalysisError(f"{by} has a single value, so nothing can be left out.")
    x = {v: result.data[v].to_numpy() for v in result.law.variables}
    y, weights = result.data["y"].to_numpy(), result.data["weight"].to_numpy()
    problem = make_problem(
        result.law, x, y, result.objective, weights=weights, fixed=result.fixed, bounds=result.bounds
    )
    if len(y) - np.bincount(codes).max() <= problem.movable.sum() + 1:
        raise AnalysisError(f"The law needs more than {problem.movable.sum() + 1} points without each {by}.")
    best = global_minimum(problem, count=4)[0].vector
    return left_out(problem, best, groups_of(rows, x), codes, names.tolist(), by)


def left_out(
    problem: Problem, vector: Array, shared: Groups, codes: Array, names: Sequence[object], by: str
) -> pd.DataFrame:
    """The table of `influence`, refitted from an optimum.

    Args:
        vector: the optimum (k,).
        shared: points that share errors.
        codes: number of each point's group (n,).
        names: of the groups.
    """
    masks = codes != np.arange(len(names))[:, None]
    vectors, _ = minimise(problem, np.repeat(vector[None], len(names), axis=0), masks * problem.weights)
    rows = []
    for keep, moved in zip(masks, vectors, strict=True):
        residual, jacobian, root = problem.residual(moved), problem.linearised(moved), np.sqrt(problem.weights * keep)
        share = problem.weights * ~keep / np.sum(problem.weights[~keep])
        # the group's mean less the law without it, as a sum over all points' errors
        gap = share - (share @ jacobian) @ np.linalg.pinv(jacobian * root[:, None], rcond=1e-9) * root
        left, unseen = with_spread(shared.rows(keep), jacobian[keep])
        near = np.clip(residual[keep], -problem.objective.delta, problem.objective.delta)
        spread = components_of(jacobian[keep], near, problem.weights[keep], left)
        sd = max(float(np.sqrt(spread.variance_of(gap, problem.weights, shared))), 1e-300)
        spare, off = max(1, len(names) - 3), float(share @ residual)
        threshold = BLIND_THRESHOLD if unseen else float(student.ppf(1 - FAMILY_ALARM / 2 / len(names), spare))
        rows.append({"num_points": int((~keep).sum()), "off": off, "deviations": off / sd, "threshold": threshold})
    table = pd.DataFrame(rows)
    table.insert(0, by, list(names))
    return table.assign(**problem.params_of(vectors))


def odd_group(table: pd.DataFrame) -> tuple[Flag, ...]:
    """A flag for the group that lies farthest off, if any does: its neighbours may suffer from it."""
    far = table["deviations"].abs()
    if not (far > table["threshold"]).any():
        return ()
    worst = table.iloc[int(np.argmax(far.where(far > table["threshold"], 0.0)))]
    by = str(table.columns[0])
    more = (by, float(abs(worst["deviations"])))
    return (Flag(kind="off", subject=str(worst[by]), number=100 * float(worst["off"]), more=more),)
