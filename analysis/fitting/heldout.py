"""Does a law extrapolate? Fit without the largest scales, predict them, and compare with a naive baseline."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Result
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.laws.base import Array
from aimscale.analysis.table.names import our_name


@dataclass(frozen=True, kw_only=True, repr=False)
class HeldOut(Result):
    """What a fit to the smaller scales predicts for the largest, and what happened."""

    variable: str
    """Scale that was held out: N, D, C or another column."""
    values: tuple[float, ...]
    """The held-out values of it."""
    num_train: int
    num_test: int
    mean_abs_relative_error: float
    """Mean of |prediction / measurement - 1|."""
    log_rmse: float
    """Root mean square of ln prediction - ln measurement."""
    naive_mean_abs_relative_error: float
    """The same error of the naive baseline."""
    naive_log_rmse: float
    """The same of the naive baseline."""
    naive: str
    """What the naive baseline is."""
    coverage: float
    """Share of held-out points inside their prediction interval."""
    predictions: pd.DataFrame = field(repr=False)
    """Rows: index of the table, variables, measured, measured_se (standard error of the measurement, NaN if unknown),
    predicted, pi_lo, pi_hi, inside, naive."""

    @property
    def num_inside(self) -> int:
        """Held-out points inside their prediction interval."""
        return int(self.predictions["inside"].sum())

    @property
    def table(self) -> pd.DataFrame:
        """`predictions`."""
        return self.predictions

    def headline(self) -> str:
        """Errors of the law and of the naive baseline."""
        return (
            f"{self.variable} >= {min(self.values):.3g} held out: mean error {self.mean_abs_relative_error:.2%} "
            f"(naive {self.naive_mean_abs_relative_error:.2%}), {self.num_inside} of {self.num_test} inside their "
            "prediction intervals"
        )

    def sentence(self) -> str:
        """Error on the held-out scale beside the naive baseline."""
        verdict = "better" if self.log_rmse < self.naive_log_rmse else "no better"
        return (
            f"Held out {self.variable} >= {min(self.values):.3g}: fitted on {self.num_train} points, the law predicts "
            f"the other {self.num_test} with mean error {self.mean_abs_relative_error:.2%} (log-RMSE "
            f"{self.log_rmse:.4f}), {verdict} than {self.naive} ({self.naive_mean_abs_relative_error:.2%}, "
            f"{self.naive_log_rmse:.4f}); {self.num_inside} of {self.num_test} lie inside their prediction interval."
            f"{self._farthest()}"
        )

    def _farthest(self) -> str:
        """The point at the largest scale: forecast, interval, measurement with its own error."""
        rows = self.predictions
        if rows["pi_lo"].isna().all():
            return ""
        at = list(rows.columns[: list(rows.columns).index("measured")])
        last = rows.sort_values([self.variable, *at] if self.variable in rows else at).iloc[-1]
        scale = ", ".join(f"{v} = {last[v]:.4g}" for v in at)
        error = f" ± {1.96 * last['measured_se']:.4g} (its images)" if last["measured_se"] > 0 else ""
        return (
            f" At {scale}: forecast {last['predicted']:.4g} [{last['pi_lo']:.4g}, {last['pi_hi']:.4g}], measured "
            f"{last['measured']:.4g}{error}: {'inside' if last['inside'] else 'outside'}."
        )

    def summary(self) -> str:
        """The test as prose, and every prediction."""
        return f"{self.sentence()}\n\n{super().summary()}"

    def to_dict(self) -> dict[str, Any]:
        """Everything but the predictions, in plain types."""
        return {k: v for k, v in vars(self).items() if k != "predictions"} | {"values": list(self.values)}


def held_out(result: Fit, df: pd.DataFrame, *, by: str, num_values: int = 1, resamples: int = 300) -> HeldOut:
    """Refit without the `num_values` largest values of a variable or column, and predict those rows.

    The naive baseline is a straight line in log-log (no offset) against `by`, extended: drawn through
    the training points that share the other variables' values (a size held out: at the same D), or
    through the best loss at each value of `by` where fewer than two of those are there.

    Args:
        result: the fit whose law, objective and columns are used.
        by: variable of the law (N, D, C) or a column of the table.
        num_values: how many of the largest distinct values to hold out.
        resamples: bootstrap resamples for the prediction intervals.

    Raises:
        AnalysisError: unknown `by`, or too few values or points remain.
    """
    points = df.loc[result.data.index]
    scale = _scale(result, points, by)
    values = np.unique(scale)
    if values[0] <= 0:
        raise AnalysisError(f"{by} has values that are not positive, so it is no scale to hold out by.")
    if len(values) <= num_values + 1:
        raise AnalysisError(
            f"{by} takes {len(values)} values, too few to hold out the largest {num_values}; vary {by} more."
        )
    cut = values[-num_values]
    test = scale >= cut
    refit = _without(result, points, test, resamples)
    measured = result.data["y"].to_numpy()[test]
    predicted = refit.predict(points[test])
    y = result.data["y"].to_numpy()
    others = [result.data[v].to_numpy(float) for v in result.law.variables if v != by]
    naive, num_own = _naive(scale, y, test, others)
    table = result.data.loc[test, list(result.law.variables)].assign(
        measured=measured,
        measured_se=_standard_errors(points[test], result.columns["y"]),
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
        values=tuple(float(v) for v in values[-num_values:]),
        num_train=int((~test).sum()),
        num_test=int(test.sum()),
        mean_abs_relative_error=relative,
        log_rmse=log_rmse,
        naive_mean_abs_relative_error=naive_relative,
        naive_log_rmse=naive_log_rmse,
        naive=_naive_words(result, by, num_own, int(test.sum())),
        coverage=float(table["inside"].mean()),
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
        intervals="auto" if result.interval_kind == "none" else result.interval_kind,
        cluster=result.cluster,
        resamples=resamples,
        confidence=result.confidence,
    )


def errors(predicted: Array, measured: Array) -> tuple[float, float]:
    """Mean absolute relative error and root mean square log error."""
    with np.errstate(invalid="ignore", divide="ignore"):
        log_rmse = float(np.sqrt(np.mean(np.log(predicted / measured) ** 2)))
    return float(np.mean(np.abs(predicted / measured - 1))), log_rmse


def _scale(result: Fit, points: pd.DataFrame, by: str) -> Array:
    if by in result.data.columns:
        return result.data[by].to_numpy(float)
    by = our_name(points, by)
    if by not in points.columns:
        raise AnalysisError(
            f"Cannot hold out by {by!r}: it is neither a variable of {result.law.formula} nor a column."
        )
    return points[by].to_numpy(float)


def _naive(scale: Array, y: Array, test: Array, others: list[Array]) -> tuple[Array, int]:
    """The line's forecast of every held-out point, and for how many it was drawn at their own other values."""
    train = ~test
    values = np.unique(scale[train])
    best = np.array([y[train & (scale == v)].min() for v in values])
    overall = _log_log_line(values, best)
    out, num_own = [], 0
    for i in np.flatnonzero(test):
        alike = train.copy()
        for other in others:
            alike &= np.isclose(other, other[i], rtol=0.01)
        own = len(np.unique(scale[alike])) > 1
        num_own += own
        slope, intercept = _log_log_line(scale[alike], y[alike]) if own and others else overall
        out.append(np.exp(intercept + slope * np.log(scale[i])))
    return np.array(out), num_own if others else 0


def _log_log_line(x: Array, y: Array) -> tuple[float, float]:
    """Slope and intercept of a straight line in log-log."""
    slope, intercept = np.polyfit(np.log(x), np.log(y), 1)
    return float(slope), float(intercept)


def _naive_words(result: Fit, by: str, num_own: int, num: int) -> str:
    others = " and ".join(v for v in result.law.variables if v != by)
    if num_own == 0:
        return "a straight line in log-log through the best loss at each value"
    rest = "" if num_own == num else f" ({num_own} of {num} points; else through the best loss at each value)"
    return f"a straight line in log-log at the same {others}{rest}"


def _standard_errors(points: pd.DataFrame, y: str) -> Array:
    """Standard errors of the measurements, where the table has them beside the column."""
    name = f"{y}_se"
    if name not in points.columns:
        return np.full(len(points), np.nan)
    return pd.to_numeric(points[name], errors="coerce").to_numpy(float)
