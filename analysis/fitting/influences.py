"""One badly tuned rung can distort a law: refit without each size (or run, or budget) and see what moves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.optimise import global_minimum
from aimscale.analysis.fitting.problem import make_problem
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.words import Flag

INFLUENTIAL_SHIFT = 3.0
"""A group whose removal moves a parameter by more than this many standard deviations is influential."""


def influence(result: Fit, df: pd.DataFrame, *, by: str = "size") -> pd.DataFrame:
    """Leave each group out: one row per group with its points, every parameter without it, and `shift`.

    `shift` is the largest movement of a parameter in standard deviations of its draws (NaN without draws).

    Args:
        by: column of the groups, or a variable of the law.

    Raises:
        AnalysisError: no such column, or a single group.
    """
    rows = df.loc[result.data.index]
    groups = result.data[by] if by in result.data.columns else rows[by] if by in rows.columns else None
    if groups is None:
        raise AnalysisError(f"There is no column {by!r} whose groups could be left out.")
    labels = pd.unique(groups)
    if len(labels) < 2:
        raise AnalysisError(f"{by} has a single value, so nothing can be left out.")
    spread = {name: float(np.std(draws)) for name, draws in result.draws.items() if np.std(draws) > 0}
    out = []
    for label in labels:
        left = result.data[(groups != label).to_numpy()]
        params = _refitted(result, left)
        shifts = [abs(params[k] - result.law_params[k]) / sd for k, sd in spread.items()]
        num = len(result.data) - len(left)
        out.append({by: label, "num_points": num, **params, "shift": max(shifts, default=np.nan)})
    return pd.DataFrame(out)


def _refitted(result: Fit, left: pd.DataFrame) -> dict[str, float]:
    """The law's own parameters refitted to some of the fitted points."""
    problem = make_problem(
        result.law,
        {v: left[v].to_numpy() for v in result.law.variables},
        left["y"].to_numpy(),
        result.objective,
        weights=left["weight"].to_numpy(),
        fixed=result.fixed,
        bounds=result.bounds,
    )
    best = global_minimum(problem, count=4)[0]
    return {name: float(v[0]) for name, v in problem.params_of(best.vector[None]).items()}


def with_influence_flags(result: Fit, df: pd.DataFrame, *, by: str = "size") -> Fit:
    """The fit with a flag for every influential group."""
    table = influence(result, df, by=by)
    flags = [
        Flag(kind="influential", subject=str(row[by]), number=row["shift"], more=(by,))
        for row in table[table["shift"] > INFLUENTIAL_SHIFT].to_dict("records")
    ]
    return replace(result, flags=(*result.flags, *flags))
