"""Held-out tests: fit without the largest scales, predict them, and compare with a naive baseline."""

from __future__ import annotations

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.result import Fit, HeldOut
from aimscale.analysis.laws.base import Array
from aimscale.analysis.table.names import no_column, our_name

GROUPS_OF = {"N": "sizes", "D": "budgets"}
"""Variable -> the groups of points that may share an error at one value of it, as flags name them."""


def held_out(result: Fit, df: pd.DataFrame, *, by: str, num_values: int = 1) -> HeldOut:
    """Refit without the `num_values` largest values of a variable or column, and predict those rows.

    The naive baseline is a straight line in log-log (no offset) against `by`, extended: drawn through
    the training points that share the other variables' values (a size held out: at the same D), or
    through the best loss at each value of `by` where fewer than two of those are there.

    Args:
        result: the fit whose law, objective and columns are used.
        df: the table that it was fitted to.
        by: variable of the law (N, D, C) or a column of the table.
        num_values: how many of the largest distinct values to hold out.

    Returns:
        Error of the law on what was left out, and that of a straight line.

    Example:
        >>> table = read_table("results.parquet")
        >>> held_out(fit(table, "chinchilla"), table, by="D").mean_abs_relative_error
    """
    points, data, law = df.loc[result.data.index], result.data, result.law
    if by not in data and (name := our_name(points, by)) not in points:
        raise no_column(points, by, " to hold out by")
    scale = pd.to_numeric(data[by] if by in data else points[name], errors="coerce").to_numpy(float)
    test = largest(scale, num_values, by)
    refit = fit(
        points[~test],
        law,
        y=result.columns["y"],
        objective=result.objective,
        columns={v: result.columns[v] for v in law.variables},
        fixed=result.fixed,
        bounds=result.bounds,
        weights=result.weights or None,
        is_tested=False,
    )
    others = [data[v].to_numpy() for v in law.variables if v != by]
    table = data.loc[test, [*law.variables, "y"]].rename(columns={"y": "measured"})
    table = table.join(refit.predict(points[test])[["value", "pi_lo", "pi_hi"]]).rename(columns={"value": "predicted"})
    table["inside"] = table["measured"].between(table["pi_lo"], table["pi_hi"])
    table["naive"] = [_line(scale, data["y"].to_numpy(), ~test, others, i) for i in np.flatnonzero(test).tolist()]
    of_law, of_line = ((table[name] / table["measured"] - 1).abs().mean() for name in ("predicted", "naive"))
    return HeldOut(
        variable=by,
        values=tuple(map(float, np.unique(scale[test]))),
        num_train=int((~test).sum()),
        num_test=int(test.sum()),
        mean_abs_relative_error=float(of_law),
        naive_mean_abs_relative_error=float(of_line),
        not_identified=refit.not_identified,
        is_blind=any(f.kind in ("unseen", "few_groups") and f.subject == GROUPS_OF.get(by) for f in refit.flags),
        predictions=table,
    )


def largest(scale: Array, num_values: int, name: str) -> Array:
    """Mark the points that have one of the largest values of their scale (n,); two values at least must be left."""
    values = np.unique(scale)
    if not values[0] > 0 or np.isnan(values).any():
        raise AnalysisError(f"{name} has values that are not positive, so it is no scale to hold out by.")
    if len(values) < num_values + 2:
        raise AnalysisError(f"{len(values)} values of {name} are too few to hold out the largest {num_values}.")
    return scale >= values[-num_values]


def _line(scale: Array, y: Array, train: Array, others: list[Array], i: int) -> float:
    """Extend the naive line to point i."""
    alike = train & np.all([np.isclose(other, other[i], rtol=0.01) for other in others] or [False], axis=0)
    points = pd.Series(y[alike], scale[alike])
    if points.index.nunique() < 2:
        points = pd.Series(y[train]).groupby(scale[train]).min()
    return float(np.exp(np.polyval(np.polyfit(np.log(points.index), np.log(points), 1), np.log(scale[i]))))
