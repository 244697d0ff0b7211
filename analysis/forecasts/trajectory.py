"""The trajectory of a run, forecast from the finished runs of its sweep: its loss at each point while it trains.

At a point of training (images seen, before or after a decay) every run of a sweep has the same schedule behind it, and
what they have in common there needs no law: plateaus, spikes of the data, decays. Only the ratio between sizes follows
one: ln L = level(point) + a(images) N^-alpha, where a changes with ln images. The errors are the core's: those that all
points of a run share, and those of single points. Points where runs scatter more count less and have a wider band.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from aimscale.analysis.display import Result, human
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import components_of, half_width, linear_design
from aimscale.analysis.laws import Array
from aimscale.analysis.table.groups import Groups, indicators
from aimscale.analysis.table.runs import Runs, Table

EXPONENT, EXPONENT_SD = 0.6, 0.25
"""Exponent of N, and its standard deviation over sweeps, before a sweep tells more."""
EXPONENTS = np.linspace(0.05, 1.5, 30)
SAME_SIZE = 0.02
"""Sizes whose N differ by less than this fraction are one."""
WIDTH = 0.2
"""Distance in ln images over which the scatter of points is averaged."""
HUBER, ROUNDS = 2.0, 4
"""Standard deviations from which a point counts less, and rounds of weighting."""
SHARED, SHARED_RUNS = 0.6, 3.0
"""Standard deviation of the error that the points of a run share, in those of a point, where runs do not tell it, and
number of runs that this counts as."""
SPARE_POINTS = 6
"""Points beyond one at each place that are needed: two are spent on the ratio, the others tell how runs scatter."""
MAX_RUNS = 40
"""Number of runs that are used, the largest ones: more tell next to nothing."""
MISFIT = 0.003
"""Standard deviation by which ln loss departs from the law for each factor e in N beyond the largest size."""
DOF = 8.0
"""Degrees of freedom of the standard deviations, which few runs tell."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Trajectory(Result):
    """Forecast of the losses of one run while it trains, and at its budgets."""

    table: pd.DataFrame
    """One row a point: images_seen, is_budget, loss, low and high (95 % of one run), and standard deviations of ln
    loss: sd, and its parts law (the forecast's own), run (shared by its points) and noise (of the point alone)."""
    num_params: float
    """N of the run."""
    sizes: tuple[float, ...]
    """N of the sizes that it follows from, ascending."""
    num_runs: int
    """Number of their runs."""
    exponent: float
    """Exponent of N of the ratio to the next smaller size."""
    curves: pd.DataFrame = field(repr=False)
    """Losses of those runs."""

    @property
    def basis(self) -> str:
        """Runs that it follows from, in words."""
        beyond, num = self.num_params / self.sizes[-1], len(self.sizes)
        far = f", {human(beyond, 2)} times their largest N" if beyond > 1 + SAME_SIZE else ""
        return f"{self.num_runs} finished runs of {num} size{'s' * (num != 1)}{far}"

    def headline(self) -> str:
        """Say what is forecast, and from what."""
        return f"Trajectory of a run of {human(self.num_params)} parameters, from {self.basis}"


def trajectory(curves: Table, num_params: float) -> Trajectory:
    """Forecast the losses of a run of N parameters at the points that smaller runs, or others of its size, have passed.

    Args:
        curves: one row a point of a finished run: run_id, params_total, images_seen, is_budget, val_loss. All runs
            share one design and one schedule.
        num_params: N of the run; larger runs are left out.

    Returns:
        Forecasts with intervals of one run, which grow with the distance in N.

    Raises:
        AnalysisError: there are fewer than two smaller sizes, and none of its own, or they share too few points.

    Example:
        >>> trajectory(read_table("results.parquet").assign(is_budget=True), 1e6)
    """
    rows = Runs(curves).frame
    rows = rows[
        (rows["val_loss"] > 0) & (rows["images_seen"] > 0) & (rows["params_total"] <= num_params * (1 + SAME_SIZE))
    ]
    largest = rows.groupby("run_id")["params_total"].first().sort_values().index[-MAX_RUNS:]
    rows = rows[rows["run_id"].isin(largest)].sort_values("params_total", ignore_index=True)
    log_n = np.log(rows["params_total"].to_numpy(float))
    sizes = np.cumsum(np.diff(log_n, prepend=log_n[:1]) > SAME_SIZE)
    is_own = len(rows) > 0 and num_params <= np.exp(log_n[-1]) * (1 + SAME_SIZE)
    if rows.empty or not (sizes[-1] or is_own):
        raise AnalysisError("No two smaller sizes have finished, nor two other runs of this one, to forecast it from.")
    grouped = rows.groupby(["is_budget", "images_seen"])
    if len(rows) < grouped.ngroups + SPARE_POINTS:
        raise AnalysisError("The finished runs share too few points to tell how runs scatter.")
    places, log_loss = grouped.size().index.to_frame(index=False), np.log(rows["val_loss"].to_numpy(float))
    at = np.log(places["images_seen"].to_numpy(float))
    runs, beyond = rows.groupby("run_id").ngroup().to_numpy(), 0.0 if is_own else float(np.log(num_params) - log_n[-1])
    exponent, table = _forecast(
        log_loss, log_n - log_n[-1], grouped.ngroup().to_numpy(), at - at.mean(), runs, beyond, sizes[-1] > 1
    )
    return Trajectory(
        table=places.join(table).sort_values(["is_budget", "images_seen"], ignore_index=True),
        num_params=num_params,
        sizes=tuple(rows["params_total"].groupby(sizes).mean()),
        num_runs=rows["run_id"].nunique(),
        exponent=exponent,
        curves=rows,
    )


def run_points(curves: pd.DataFrame, budgets: pd.DataFrame) -> pd.DataFrame:
    """Join the points during training of some runs with the rows of their budgets, as `trajectory` takes them."""
    curves = curves[curves["run_id"].isin(budgets["run_id"])]
    rows = pd.concat([curves.assign(is_budget=False), budgets.assign(is_budget=True)], ignore_index=True)
    return rows.dropna(subset=["params_total", "images_seen", "val_loss"])


def _forecast(
    y: Array, log_n: Array, codes: Array, at: Array, runs: Array, beyond: float, tells_exponent: bool
) -> tuple[float, pd.DataFrame]:
    """Fit the levels of the places and the ratio between sizes to ln losses, and forecast a run at every place.

    Args:
        y: ln losses (n,).
        log_n: ln N (n,) beyond the largest size.
        codes: number of each point's place (n,).
        at: ln images of each place, about their mean.
        runs: number of each point's run (n,).
        beyond: ln N of the run to forecast, beyond the largest size.
        tells_exponent: whether there are sizes enough to tell the exponent.

    Returns:
        The exponent of N, and the columns of `Trajectory.table`.
    """
    num, num_runs = len(at), int(runs.max()) + 1
    exponent, ratio, residual, scatter, weights = _fit(y, log_n, codes, at, tells_exponent)

    def jacobian(levels: Array, log_n: Array, at: Array) -> Array:
        slope = -log_n * np.exp(-exponent * log_n) * (ratio[0] + ratio[1] * at)
        return np.column_stack([levels, _ratio_columns(log_n, at, exponent), slope])

    # the prior of the exponent is one more point, of a run of its own
    rows = jacobian(indicators(codes).toarray(), log_n, at[codes]) / scatter[codes, None]
    prior = np.append(np.zeros(num + 2), 1 / EXPONENT_SD)
    design = linear_design(np.vstack([rows, prior]), np.append(weights * scatter[codes] ** 2, num))
    groups = Groups({"runs": np.append(runs, num_runs)})
    errors = components_of(design, np.append(residual / scatter[codes], (exponent - EXPONENT) / EXPONENT_SD), groups)
    # few runs hardly tell the error that the points of a run share: it is drawn towards what is usual
    degrees, usual = max(0, num_runs - 2), (SHARED * errors.point) ** 2
    shared = (degrees * errors.shared["runs"] ** 2 + SHARED_RUNS * usual) / (degrees + SHARED_RUNS)
    errors = replace(errors, shared={"runs": float(np.sqrt(shared))})
    jacobian_there = jacobian(np.eye(num), np.full(num, beyond), at)
    levels = y - _ratio_columns(log_n, at[codes], exponent) @ ratio
    levels = np.bincount(codes, weights * levels) / np.bincount(codes, weights)
    log_loss = jacobian_there[:, :-1] @ np.concatenate([levels, ratio])
    law = errors.variance_of(jacobian_there @ design.inverse, groups) + (MISFIT * beyond) ** 2
    parts = {"law": np.sqrt(law), "run": errors.shared["runs"] * scatter, "noise": errors.point * scatter}
    sd = np.sqrt(sum(each**2 for each in parts.values()))
    half = half_width(sd, np.full(num, DOF))
    ends = {"loss": np.exp(log_loss), "low": np.exp(log_loss - half), "high": np.exp(log_loss + half)}
    return exponent, pd.DataFrame({**ends, "sd": sd, **parts})


def _ratio_columns(log_n: Array, at: Array, exponent: float) -> Array:
    """Return the derivatives (n, 2) of the ratio to the largest size by its value at the mean place and its slope."""
    ratio = np.expm1(-exponent * log_n)
    return np.column_stack([ratio, ratio * at])


def _fit(
    y: Array, log_n: Array, codes: Array, at: Array, tells_exponent: bool
) -> tuple[float, Array, Array, Array, Array]:
    """Fit by weighted least squares; points that scatter more count less, outliers less still.

    Returns:
        Exponent, coefficients of the ratio (2,), residuals (n,), scatter of single losses (places,) and weights (n,).
    """
    weights, prior = np.ones(len(y)), ((EXPONENTS - EXPONENT) / EXPONENT_SD) ** 2
    for _ in range(ROUNDS):
        tried = [_regress(y, codes, _ratio_columns(log_n, at[codes], each), weights) for each in EXPONENTS]
        errors = np.array([np.sum(weights * residual**2) for _, residual in tried])
        # the points of a run tell little more of the exponent than one does
        spread = errors.min() / max(1, len(y) - len(at) - 2)
        best = int(np.argmin(errors + (spread * len(at) if tells_exponent else 1e9) * prior))
        ratio, residual = tried[best]
        scatter = _scatter(residual, codes, at)
        weights = np.minimum(1.0, HUBER * scatter[codes] / np.maximum(np.abs(residual), 1e-12)) / scatter[codes] ** 2
    return float(EXPONENTS[best]), ratio, residual, scatter, weights


def _regress(y: Array, codes: Array, columns: Array, weights: Array) -> tuple[Array, Array]:
    """Regress y on columns and a level at each place; returns the coefficients of the columns, and residuals."""
    both = np.column_stack([y, columns])
    sums = np.stack([np.bincount(codes, weights * each) for each in both.T], axis=1)
    both = both - (sums / np.bincount(codes, weights)[:, None])[codes]
    root = np.sqrt(weights)
    coefficients = np.linalg.lstsq(both[:, 1:] * root[:, None], both[:, 0] * root, rcond=None)[0]
    return coefficients, both[:, 0] - both[:, 1:] @ coefficients


def _scatter(residual: Array, codes: Array, at: Array) -> Array:
    """Return the standard deviation of single losses (places,), averaged over neighbours, outliers drawn in."""
    usual = np.median(np.abs(residual)) / 0.6745
    squares = np.bincount(codes, np.minimum(np.abs(residual), 3 * usual) ** 2)
    near = np.exp(-0.5 * ((at[:, None] - at) / WIDTH) ** 2)
    degrees = near @ np.maximum(np.bincount(codes) - 1, 0)
    return np.sqrt(np.maximum(near @ squares, 1e-12) / np.maximum(degrees, 1.0))
