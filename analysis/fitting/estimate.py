"""`fit`: a table, a law and an objective in; the best optimum with intervals, flags and exclusions out. `held_out`: fit
without the largest scales, predict them, and compare with a naive baseline. `link`: a sigmoid from loss to accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import did_you_mean
from aimscale.analysis.distributions import t_above
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import CONFIDENCE, satterthwaite
from aimscale.analysis.fitting.diagnostics import OUTLIER_SCALES, blind_flags, row_names
from aimscale.analysis.fitting.held_out import HeldOut
from aimscale.analysis.fitting.inference import estimated
from aimscale.analysis.fitting.problem import LSQ, Objective, find_objective, make_problem
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.laws import LINK_SIGMOID, Array, Columns, Law, find_law
from aimscale.analysis.table.groups import SIZE_COLUMNS, scales_of
from aimscale.analysis.table.points import Points, law_points
from aimscale.analysis.table.runs import Runs, Table, joined
from aimscale.analysis.table.schema import Exclusion

COMPUTE = "compute"
"""Weights in proportion to a run's compute: what forecasts are fitted with."""
GROUPS_OF = {"N": "sizes", "D": "budgets"}
"""Variable -> the groups of points that may share an error at one value of it, as flags name them."""


def fit(
    table: Table,
    law: Law | str = "chinchilla",
    *,
    y: str = "val_loss",
    weights: str | None = None,
    objective: Objective | str = "robust",
    columns: Mapping[str, str] | None = None,
    fixed: Mapping[str, float] | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    zero_allowed: bool = False,
    drop_outliers: bool = False,
    is_tested: bool = True,
) -> Fit:
    """Fit a law to a table.

    Args:
        table: one row per point.
        law: a law or its name.
        y: column to fit; `columns={"L": ...}` names it, too.
        weights: "compute", or a column of positive numbers, in proportion to which points count; None: all alike.
        objective: an objective or its name; the default is least squares of logarithms for all but outliers.
        columns: variable of the law -> column; default: the variable's own name, else the results table's column.
        fixed: parameters held at a value.
        bounds: parameters kept between two values.
        zero_allowed: let variables be zero (an ideal loss), where the law takes no logarithm of them.
        drop_outliers: fit once more without the points that lie far beyond the others (`Fit.outliers`), which
            `exclusions` name.
        is_tested: whether to look for what speaks against the law (`lack_of_fit`).

    Returns:
        Parameters with intervals and flags; `predict`, `plot` and `summary` are its methods.

    Raises:
        AnalysisError: missing column, unknown name, too few points, or a variable without variation.

    Example:
        >>> table = read_table("results.parquet")
        >>> law = fit(table, "chinchilla")
        >>> law.params["alpha"], law.intervals["alpha"]
        >>> law.predict(N=1e6, D=1e6)
    """
    runs, law, objective = Runs(table), find_law(law), find_objective(objective)
    fixed, bounds = dict(fixed or {}), dict(bounds or {})
    _check_names(law, fixed, bounds)
    y = runs.column(y if "L" in law.variables else (columns or {}).get("L", y))
    free, is_positive = len(law.parameters) - len(fixed), objective.log
    points = law_points(
        law, runs, y=y, columns=columns, num_free=free, positive_y=is_positive, zero_allowed=zero_allowed
    )
    point_weights = None if weights is None else weights_of(points.rows, weights)
    fitted = fit_points(points, law, objective, weights=point_weights, fixed=fixed, bounds=bounds)
    if drop_outliers and len(labels := fitted.outliers):
        keep = ~points.index.isin(labels)
        text = f"beyond {OUTLIER_SCALES:g} robust standard deviations: {row_names(points, labels)}"
        dropped = Exclusion(kind="outliers", number=len(labels), text=text)
        points = replace(points.take(keep), exclusions=(*points.exclusions, dropped))
        point_weights = point_weights if point_weights is None else point_weights[keep]
        fitted = fit_points(points, law, objective, weights=point_weights, fixed=fixed, bounds=bounds)
    return replace(fitted, weights=weights or "", is_tested=is_tested)


def fit_points(
    points: Points,
    law: Law,
    objective: Objective,
    *,
    weights: Array | None = None,
    fixed: dict[str, float] | None = None,
    bounds: dict[str, tuple[float, float]] | None = None,
) -> Fit:
    """Fit a law to points of its variables, with weights (n,)."""
    x, fixed, bounds = {v: points.x[v] for v in law.variables}, fixed or {}, bounds or {}
    law = law.centred(Columns(x))
    problem = make_problem(law, x, points.y, objective, weights=weights, fixed=fixed, bounds=bounds)
    estimate = estimated(problem, points.groups, points.known)
    return Fit(points=points, estimate=estimate, fixed=fixed, bounds=bounds)


def weights_of(rows: Runs, by: str) -> Array:
    """Return weights (n,) of points, 1 on average, in proportion to their compute or to a column."""
    rows = rows.with_compute() if by == COMPUTE else rows
    name = rows.column("C" if by == COMPUTE else by)
    if name not in rows:
        raise rows.no_column(name, " to weight by")
    values = pd.to_numeric(rows[name], errors="coerce").to_numpy(float)
    if not np.all(np.isfinite(values) & (values > 0)):
        raise AnalysisError(f"{name} has values that are not positive numbers, so points cannot be weighted by it.")
    return values / values.mean()


def _check_names(law: Law, fixed: dict[str, float], bounds: dict[str, tuple[float, float]]) -> None:
    if set(law.names) <= set(fixed):
        raise AnalysisError(f"Every parameter of {law.formula} is held, so nothing is left to fit; free one.")
    positive = {p.name for p in law.parameters if p.log}
    for name, (low, high) in ({name: (v, v) for name, v in fixed.items()} | bounds).items():
        if name not in law.names:
            raise AnalysisError(f"{law.formula} has no parameter {name!r}; {did_you_mean(name, law.names, 'it has')}")
        if not np.isfinite([low, high]).all() or (low <= 0 and name in positive):
            what = "positive, finite" if name in positive else "finite"
            raise AnalysisError(f"{name} of {law.formula} needs {what} numbers, so it cannot be {low:g}.")
        if name in bounds and not low < high:
            raise AnalysisError(f"The bounds of {name} are {low:g} and {high:g}; the first must be the smaller.")


def held_out(result: Fit, table: Table, *, by: str, num_values: int = 1) -> HeldOut:
    """Refit without the `num_values` largest values of a variable or column, and predict those rows.

    The naive baseline is a straight line in log-log (no offset) against `by`, extended: drawn through
    the training points that share the other variables' values (a size held out: at the same D), or
    through the best loss at each value of `by` where fewer than two of those are there.

    Args:
        result: the fit whose law, objective and columns are used.
        table: the table that it was fitted to.
        by: variable of the law (N, D, C) or a column of the table.
        num_values: how many of the largest distinct values to hold out.

    Returns:
        Error of the law on what was left out, and that of a straight line.

    Example:
        >>> table = read_table("results.parquet")
        >>> held_out(fit(table, "chinchilla"), table, by="D").mean_abs_relative_error
    """
    points, data, law = Runs(table).take(result.data.index), result.data, result.law
    if by not in data and (name := points.column(by)) not in points:
        raise points.no_column(by, " to hold out by")
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
    others = [scales_of(data[v].to_numpy(float)) for v in law.variables if v != by]
    tested = data.loc[test, [*law.variables, "y"]].rename(columns={"y": "measured"})
    predicted = refit.predict(points[test].frame, level=CONFIDENCE)[["value", "pi_lo", "pi_hi"]]
    tested = tested.join(predicted.rename(columns={"value": "predicted"}))
    tested["inside"] = tested["measured"].between(tested["pi_lo"], tested["pi_hi"])
    tested["naive"] = [_line(scale, data["y"].to_numpy(), ~test, others, i) for i in np.flatnonzero(test).tolist()]
    of_law, of_line = ((tested[name] / tested["measured"] - 1).abs().mean() for name in ("predicted", "naive"))
    return HeldOut(
        variable=by,
        values=tuple(map(float, np.unique(scale[test]))),
        num_train=int((~test).sum()),
        num_test=int(test.sum()),
        mean_abs_relative_error=float(of_law),
        naive_mean_abs_relative_error=float(of_line),
        **_mean_error(result, refit, points, test),
        not_identified=refit.not_identified,
        is_blind=any(flag.subject == GROUPS_OF.get(by) for flag in blind_flags(refit.estimate.groups)),
        predictions=tested,
    )


def _mean_error(result: Fit, refit: Fit, points: Runs, test: Array) -> dict[str, Any]:
    """Compare the mean error of held-out points (mask) with what noise and the errors of the parameters explain."""
    estimate, num = refit.estimate, int(test.sum())
    law = estimate.law_at(refit.variables(points[test].frame))
    predicted, errors, degrees = estimate.error_of(lambda p: law(p).mean(axis=-1))
    measured = refit.objective.transform(result.data.loc[test, "y"].to_numpy())
    groups = points.shared_groups({v: result.data[v].to_numpy() for v in result.law.variables}).rows(test)
    noise = np.sqrt(estimate.components.variance_of(np.full((1, num), 1 / num), groups))
    spare = satterthwaite(np.stack([errors, noise]), np.array([degrees, [estimate.components.degrees]]))
    off, sd = float(measured.mean() - predicted[0]), float(np.hypot(errors, noise)[0])
    p = 2 * float(t_above(abs(off) / max(sd, 1e-300), spare[0]))
    return {"mean_error": off, "mean_error_sd": sd, "p": p}


def largest(scale: Array, num_values: int, name: str) -> Array:
    """Mark the points that have one of the largest values of their scale (n,); two values at least must be left."""
    if not scale.min() > 0 or np.isnan(scale).any():
        raise AnalysisError(f"{name} has values that are not positive, so it is no scale to hold out by.")
    codes = scales_of(scale)
    if codes.max() + 1 < num_values + 2:
        raise AnalysisError(f"{codes.max() + 1} values of {name} are too few to hold out the largest {num_values}.")
    return codes > codes.max() - num_values


def _line(scale: Array, y: Array, train: Array, others: list[Array], i: int) -> float:
    """Extend the naive line to point i."""
    alike = train & np.all([other == other[i] for other in others] or [False], axis=0)
    points = pd.Series(y[alike], scale[alike])
    if points.index.nunique() < 2:
        points = pd.Series(y[train]).groupby(scale[train]).min()
    return float(np.exp(np.polyval(np.polyfit(np.log(points.index), np.log(points), 1), np.log(scale[i]))))


def link(
    table: Table,
    *,
    loss: str = "val_loss",
    accuracy: str = "top1",
    chance: float | None = None,
    ideal: float | None = None,
    is_tested: bool = True,
    columns: Mapping[str, str] | None = None,
) -> Fit:
    """Fit accuracy as a sigmoid of loss, by least squares.

    Args:
        loss: column of the loss.
        accuracy: column of the accuracy, 0 to 1.
        chance: accuracy of guessing, which holds the floor; None fits it.
        ideal: loss at which the accuracy is 1: (ideal, 1) is one more point, as in the OLMo ladder.
        is_tested: whether the law is tested for lack of fit, as in `fit`.
        columns: our name or a law's letter -> the name in the table, or a formula, as `read_table` takes them.

    Returns:
        The sigmoid as a fit, whose variable is L; its curve and interval stay between chance and 1.

    Raises:
        AnalysisError: accuracies that are no fractions, an ideal loss not below every measured one, too few points.

    Example:
        >>> probes = probe_frame(read_table("results.parquet"))
        >>> photographs = probes[(probes["task"] == "photographs") & (probes["kind"] == "knn")]
        >>> link(photographs).predict({"L": [0.33]})
    """
    runs = Runs(table, columns)
    if accuracy not in runs:
        raise runs.no_column(accuracy)
    values = pd.to_numeric(runs[accuracy], errors="coerce")
    if not values.dropna().between(0, 1).all():
        raise AnalysisError(f"{accuracy} goes from {values.min():g} to {values.max():g}; give fractions, 0 to 1.")
    rows = runs if ideal is None else _with_ideal(runs, loss, accuracy, ideal)
    return replace(
        fit(
            rows,
            LINK_SIGMOID,
            y=accuracy,
            columns={"L": loss},
            objective=LSQ,
            fixed={} if chance is None else {"floor": chance},
            bounds={"floor": (0.0, 1.0)} if chance is None else {},
            zero_allowed=True,
            is_tested=is_tested,
        ),
        limits=(chance or 0.0, 1.0),
        num_added=0 if ideal is None else 1,
    )


def _with_ideal(runs: Runs, loss: str, accuracy: str, ideal: float) -> Runs:
    """Add the ideal point as a last row, of a size and a run of its own."""
    lowest = pd.to_numeric(runs[loss], errors="coerce").min() if loss in runs else np.inf
    if not 0 <= ideal < lowest:
        raise AnalysisError(
            f"The ideal {loss} of {accuracy} is {ideal:g}; give one from 0 to below the lowest measured, {lowest:g}."
        )
    ideal_point = {name: "ideal point" for name in (*SIZE_COLUMNS, "run_id", "seed") if name in runs}
    return joined([runs, Runs(pd.DataFrame([{**ideal_point, loss: ideal, accuracy: 1.0}]))])
