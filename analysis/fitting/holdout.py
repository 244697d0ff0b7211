"""Does a law extrapolate? Fit without the largest scales, predict them, and compare with a naive baseline."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.result import Fit, HeldOut
from aimscale.analysis.laws.base import Array
from aimscale.analysis.table.names import column_names, our_name

SHARE = 0.15
"""Share of the points, those of largest scale, that are held out where no number of values is asked for."""
MIN_HELD_OUT = 5


def largest(scale: Array, *, num_values: int | None = None, share: float = SHARE, name: str = "scale") -> Array:
    """Which points to hold out (n,): the largest of their scale; points of one value stay together.

    Args:
        scale: positive scale of every point (n,).
        num_values: how many of its largest values; None takes `share` of the points and at least `MIN_HELD_OUT`.
        name: what the scale is called, for the refusal.

    Raises:
        AnalysisError: the scale has values that are not positive, or too few to leave two of them (one, of a share).
    """
    scale = np.asarray(scale, float)
    values = np.unique(scale)
    if len(values) and not values[0] > 0:
        raise AnalysisError(f"{name} has values that are not positive, so it is no scale to hold out by.")
    if num_values is None:
        wanted = max(MIN_HELD_OUT, int(np.ceil(share * len(scale))))
        cut = np.sort(scale)[-wanted] if len(scale) > wanted else values[0] if len(values) else np.nan
    elif len(values) > num_values + 1:
        wanted, cut = num_values, values[-num_values]
    else:
        wanted, cut = num_values, np.nan
    if not len(values) or not cut > values[0]:
        raise AnalysisError(
            f"{len(scale)} points of {len(values)} {name} are too few to hold out the largest {wanted}."
        )
    return scale >= cut


def scale_values(df: pd.DataFrame, by: str, columns: Mapping[str, str] | None = None) -> Array:
    """The scale of every row (n,) to hold out by, a column or a variable of `columns`; NaN where it is no number.

    Raises:
        AnalysisError: there is no such column.
    """
    name = next((each for each in (by, (columns or {}).get(by), our_name(df, by)) if each in df.columns), None)
    if name is None:
        raise AnalysisError(f"Cannot hold out the largest {by}: it is no column; its columns are {column_names(df)}.")
    return pd.to_numeric(df[name], errors="coerce").to_numpy(float)


def held_out(result: Fit, df: pd.DataFrame, *, by: str, num_values: int = 1, resamples: int = 300) -> HeldOut:
    """Refit without the `num_values` largest values of a variable or column, and predict those rows.

    The naive baseline is a straight line in log-log (no offset) against `by`, extended: drawn through
    the training points that share the other variables' values (a size held out: at the same D), or
    through the best loss at each value of `by` where fewer than two of those are there.

    Args:
        result: the fit whose law, objective and columns are used.
        by: variable of the law (N, D, C) or a column of the table.
        num_values: how many of the largest distinct values to hold out.
        resamples: draws for the prediction intervals.

    Raises:
        AnalysisError: unknown `by`, or too few values or points remain.
    """
    points = df.loc[result.data.index]
    scale = result.data[by].to_numpy(float) if by in result.data else scale_values(points, by)
    test = largest(scale, num_values=num_values, name=by)
    refit = _without(result, points, test, resamples)
    predicted = refit.predict(points[test])
    y = result.data["y"].to_numpy()
    measured = y[test]
    others = [v for v in result.law.variables if v != by]
    naive, num_own = _naive(scale, y, test, [result.data[v].to_numpy(float) for v in others])
    table = result.data.loc[test, list(result.law.variables)].assign(
        measured=measured,
        predicted=predicted["value"],
        pi_lo=predicted["pi_lo"],
        pi_hi=predicted["pi_hi"],
        inside=(measured >= predicted["pi_lo"]) & (measured <= predicted["pi_hi"]),
        naive=naive,
    )
    relative, log_rmse = errors(predicted["value"].to_numpy(), measured)
    naive_relative, naive_log_rmse = errors(naive, measured)
    return HeldOut(
        variable=by,
        values=tuple(map(float, np.unique(scale[test]))),
        num_train=int((~test).sum()),
        num_test=int(test.sum()),
        mean_abs_relative_error=relative,
        log_rmse=log_rmse,
        naive_mean_abs_relative_error=naive_relative,
        naive_log_rmse=naive_log_rmse,
        others=" and ".join(others),
        num_own=num_own,
        not_identified=refit.not_identified,
        predictions=table,
    )


def _without(result: Fit, points: pd.DataFrame, test: Array, resamples: int) -> Fit:
    """The same law fitted in the same way to the points that are not held out."""
    return fit(
        result.law,
        points[~test],
        y=result.columns["y"],
        objective=result.objective,
        columns={k: v for k, v in result.columns.items() if k in result.law.variables},
        weights=result.columns.get("weight", result.data["weight"].to_numpy()[~test]),
        fixed=result.fixed,
        bounds=result.bounds,
        resamples=resamples,
        confidence=result.confidence,
    )


def errors(predicted: Array, measured: Array) -> tuple[float, float]:
    """Mean absolute relative error and root mean square log error."""
    with np.errstate(invalid="ignore", divide="ignore"):
        log_rmse = float(np.sqrt(np.mean(np.log(predicted / measured) ** 2)))
    return float(np.mean(np.abs(predicted / measured - 1))), log_rmse


def _naive(scale: Array, y: Array, test: Array, others: list[Array]) -> tuple[Array, int]:
    """The line's forecast of every held-out point, and for how many it was drawn at their own other values."""
    train = ~test
    values = np.unique(scale[train])
    best = np.array([y[train & (scale == v)].min() for v in values])
    overall = np.polyfit(np.log(values), np.log(best), 1)
    out, num_own = [], 0
    for i in np.flatnonzero(test):
        alike = train & np.all([np.isclose(other, other[i], rtol=0.01) for other in others] or [False], axis=0)
        own = len(np.unique(scale[alike])) > 1
        num_own += own
        line = np.polyfit(np.log(scale[alike]), np.log(y[alike]), 1) if own else overall
        out.append(np.exp(np.polyval(line, np.log(scale[i]))))
    return np.array(out), num_own
