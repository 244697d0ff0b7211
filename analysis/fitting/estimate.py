"""`fit`: a table, a law and an objective in; the best optimum with intervals, flags and exclusions out. `held_out`: fit
without the largest scales, predict them, and compare with a naive baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import CONFIDENCE, half_width, known_errors
from aimscale.analysis.fitting.diagnostics import diagnose, lack_of_fit
from aimscale.analysis.fitting.groups import groups_of
from aimscale.analysis.fitting.identification import unidentified
from aimscale.analysis.fitting.inference import Estimate, estimated
from aimscale.analysis.fitting.problem import Objective, find_objective, make_problem
from aimscale.analysis.fitting.result import Fit, HeldOut, Interval
from aimscale.analysis.laws.base import Array, Columns, Law, Params
from aimscale.analysis.laws.catalogue import find_law
from aimscale.analysis.table.names import names_of, no_column, our_name
from aimscale.analysis.table.points import observe, with_compute
from aimscale.analysis.table.read import loss_unit
from aimscale.analysis.words import did_you_mean

COMPUTE = "compute"
"""Weights in proportion to a run's compute: what forecasts are fitted with."""
INTERVAL_SCALES: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "own": (np.positive, np.positive),
    "log": (np.log, np.exp),
    "reciprocal": (np.reciprocal, lambda value: 1 / value if value > 0 else np.inf),
}
"""Scales on which an interval is symmetric: a function and its inverse."""
GROUPS_OF = {"N": "sizes", "D": "budgets"}
"""Variable -> the groups of points that may share an error at one value of it, as flags name them."""


def fit(
    df: pd.DataFrame,
    law: Law | str = "chinchilla",
    *,
    y: str = "val_loss",
    weights: str | None = None,
    objective: Objective | str = "robust",
    columns: Mapping[str, str] | None = None,
    fixed: Mapping[str, float] | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    zero_allowed: bool = False,
    is_tested: bool = True,
) -> Fit:
    """Fit a law to a table.

    Args:
        df: one row per point.
        law: a law or its name.
        y: column to fit; `columns={"L": ...}` names it, too.
        weights: "compute", or a column of positive numbers, in proportion to which points count; None: all alike.
        objective: an objective or its name; the default is least squares of logarithms for all but outliers.
        columns: variable of the law -> column; default: the variable's own name, else the results table's column.
        fixed: parameters held at a value.
        bounds: parameters kept between two values.
        zero_allowed: let variables be zero (an ideal loss), where the law takes no logarithm of them.
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
    law, objective = find_law(law), find_objective(objective)
    fixed, bounds = dict(fixed or {}), dict(bounds or {})
    _check_names(law, fixed, bounds)
    y = our_name(df, y if "L" in law.variables else (columns or {}).get("L", y))
    free = len(law.parameters) - len(fixed)
    points = observe(law, df, y=y, columns=columns, positive_y=objective.log, num_free=free, zero_allowed=zero_allowed)
    law, rows = law.centred(Columns(points.x)), df.loc[points.index]
    of_points = None if weights is None else weights_of(rows, weights)
    problem = make_problem(law, points.x, points.y, objective, weights=of_points, fixed=fixed, bounds=bounds)
    found = estimated(problem, groups_of(rows, points.x), known_errors(rows, y))
    hidden = unidentified(law, points.x, fixed)
    own = intervals_of(found, hidden)
    params = {name: float(v) for name, v in law.reported(found.params).items()}
    flags, not_identified = diagnose(found, params, own, points, hidden)
    against = lack_of_fit(found, points, rows) if is_tested else ()
    fitted, residual = found.problem.predict(found.vector[None])[0], found.problem.residual(found.vector)
    return Fit(
        law=law,
        objective=found.problem.objective,
        params=params,
        intervals={name: own[name] for name in params if name in own},
        flags=(*flags, *against, *points.flags),
        not_identified=not_identified,
        objective_value=float(found.problem.total(found.vector)),
        num_points=len(points.y),
        num_rows=points.num_rows,
        exclusions=points.exclusions,
        ranges={v: (float(values.min()), float(values.max())) for v, values in points.x.items()},
        columns=points.columns,
        data=pd.DataFrame(points.x, index=points.index).assign(y=points.y, fitted=fitted, residual=residual),
        estimate=found,
        weights=weights or "",
        names=names_of(df),
        loss_unit=loss_unit(df),
        fixed=fixed,
        bounds=bounds,
    )


def weights_of(rows: pd.DataFrame, by: str) -> Array:
    """Return weights (n,) of points, 1 on average, in proportion to their compute or to a column."""
    rows = with_compute(rows) if by == COMPUTE else rows
    name = our_name(rows, "C" if by == COMPUTE else by)
    if name not in rows:
        raise no_column(rows, name, " to weight by")
    values = pd.to_numeric(rows[name], errors="coerce").to_numpy(float)
    if not np.all(np.isfinite(values) & (values > 0)):
        raise AnalysisError(f"{name} has values that are not positive numbers, so points cannot be weighted by it.")
    return values / values.mean()


def intervals_of(found: Estimate, hidden: frozenset[str]) -> dict[str, Interval]:
    """Find 95 % intervals of the law's own, the reported and the derived parameters that are not held.

    Exponents and coefficients have intervals of their logarithm; a limit such as E, and derived exponents, of
    themselves; others as the law says (`Law.scales`). A coefficient whose contribution may be nil begins at 0.
    """
    law, parts, out = found.problem.law, found.problem.basis(found.vector[None]), dict[str, Interval]()
    movable = dict(zip(law.names, found.problem.movable.tolist(), strict=True))
    # a limit's term does not vary over the points
    varies = {p.name: bool(np.ptp(g) > 1e-12 * np.abs(g).max()) for p, g in zip(law.linear, parts, strict=True)}
    scales = {p.name: "log" for p in law.parameters if p.log or varies.get(p.name)} | dict(law.scales)
    for name, value in law.quantities(found.params).items():
        if not movable.get(name, True):
            continue
        forth, back = INTERVAL_SCALES[scales.get(name, "own") if value > 0 else "own"]

        def scaled(p: Params, name: str = name, forth: Callable[[Array], Array] = forth) -> Array:
            return forth(law.quantities(p)[name])

        with np.errstate(all="ignore"):
            low, high = sorted(float(back(end[0])) for end in found.interval_of(scaled))
        out[name] = Interval() if name in hidden else Interval(low, high)
        # a reported parameter of the same name has its own unit
        if name in movable and out[name].is_known and value == found.params[name]:
            is_limit = not varies.get(name, True) and all(bool(np.all(g >= 0)) for g in parts)
            out[name] = _bounded(found, law.names.index(name), out[name], is_limit)
    return out


def _bounded(found: Estimate, j: int, i: Interval, is_limit: bool) -> Interval:
    """Clip the interval of the law's own parameter j to its bounds, and a limit to the lowest value of the law."""
    problem, (low, high) = found.problem, found.problem.limits(j)
    bottom, top = max(i.low, low), i.high
    if j < problem.num_linear:  # the interval of a coefficient that may be nil begins at its bound
        at, unit = found.vector[j], np.where(np.arange(len(found.vector)) == j, 1.0, found.vector)
        half = float(half_width(*found.covariance.of_contrasts(np.eye(len(unit))[j, problem.movable]), CONFIDENCE)[0])
        if at - half <= problem.lower[j]:
            own_unit = float(problem.params_of(unit[None])[problem.law.names[j]][0])
            bottom, top = low, max(top, (at + half) * own_unit)
    lowest = float(problem.predict(found.vector[None]).min()) if is_limit else np.inf
    return Interval(bottom, min(top, high, lowest))


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
