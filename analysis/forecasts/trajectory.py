"""The trajectory of a run, forecast from the finished runs of its sweep: its loss at each point while it trains.

At a point of training (images seen, before or after a decay) every run of a sweep has the same schedule behind it, and
what they have in common there is taken as it is, without a law: plateaus, spikes of the data, rates, decays. Only the
ratio to the next smaller size follows a law: ln L = level(point) + a(images) N^-alpha, where a is a power of the images
seen. So budgets and trajectory agree. The errors are the core's: those that all points of a run share, and those of
single points. Points where runs scatter more, as on a first plateau, count less and have a wider band.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from aimscale.analysis.display import Drawing, Result
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import Components, Design, components_of, half_width, linear_design
from aimscale.analysis.fitting.groups import Groups, indicators
from aimscale.analysis.fitting.inference import CONFIDENCE
from aimscale.analysis.laws.base import Array
from aimscale.analysis.words import human

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

    plot = Drawing("scaling.plot_trajectory")

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


def trajectory(curves: pd.DataFrame, num_params: float) -> Trajectory:
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
    rows = curves[(curves["val_loss"] > 0) & (curves["params_total"] <= num_params * (1 + SAME_SIZE))]
    largest = rows.groupby("run_id")["params_total"].first().sort_values().index[-MAX_RUNS:]
    rows = rows[rows["run_id"].isin(largest)].sort_values("params_total", ignore_index=True)
    log_n = np.log(rows["params_total"].to_numpy(float))
    sizes = np.cumsum(np.diff(log_n, prepend=log_n[:1]) > SAME_SIZE)
    is_own = len(rows) > 0 and num_params <= np.exp(log_n[-1]) * (1 + SAME_SIZE)
    if rows.empty or not (sizes[-1] or is_own):
        raise AnalysisError("No two smaller sizes have finished, nor two other runs of this one, to forecast it from.")
    if len(rows) < len(rows[["images_seen", "is_budget"]].drop_duplicates()) + SPARE_POINTS:
        raise AnalysisError("The finished runs share too few points to tell how runs scatter.")
    fitted = _fit(rows, log_n, sizes)
    table = fitted.predict(0.0 if is_own else float(np.log(num_params) - log_n[-1]))
    return Trajectory(
        table=table.sort_values(["is_budget", "images_seen"], ignore_index=True),
        num_params=num_params,
        sizes=tuple(rows["params_total"].groupby(sizes).mean()),
        num_runs=rows["run_id"].nunique(),
        exponent=fitted.exponent,
        curves=rows,
    )


def run_points(curves: pd.DataFrame, budgets: pd.DataFrame) -> pd.DataFrame:
    """Join the points during training of some runs with the rows of their budgets, as `trajectory` takes them."""
    curves = curves[curves["run_id"].isin(budgets["run_id"])]
    rows = pd.concat([curves.assign(is_budget=False), budgets.assign(is_budget=True)], ignore_index=True)
    return rows.dropna(subset=["params_total", "images_seen", "val_loss"])


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """Levels of the points and the ratio between sizes, fitted to ln losses."""

    places: pd.DataFrame
    """images_seen and is_budget of each point (places)."""
    at: Array
    """ln images (places,), about their mean."""
    scatter: Array
    """Standard deviation (places,) of single losses about the law."""
    exponent: float
    params: Array
    """Levels (places,), then the ratio at the mean point, and its change with ln images."""
    design: Design
    components: Components
    """Errors in units of the scatter, the prior of the exponent as one more point."""
    groups: Groups

    def predict(self, beyond: float) -> pd.DataFrame:
        """Forecast a run whose size lies so far beyond the largest, in ln N."""
        num = len(self.places)
        gradient = np.column_stack([np.eye(num), _ratio_columns(np.full(num, beyond), self.at, self.exponent)])
        log_loss = gradient @ self.params
        slope = _exponent_slope(np.full(num, beyond), self.at, self.exponent, self.params[num:])
        contrasts = np.column_stack([gradient, slope]) @ self.design.inverse
        kinds = {name: contrasts @ indicators(codes) for name, codes in self.groups.items()}
        sds = self.components.shared
        law = sum((sds[name] ** 2 * np.sum(each**2, axis=1) for name, each in kinds.items()), np.zeros(num))
        law += self.components.point**2 * np.sum(contrasts**2, axis=1) + (MISFIT * beyond) ** 2
        parts = {
            "law": np.sqrt(law),
            "run": np.sqrt(sum(sd**2 for sd in sds.values())) * self.scatter,
            "noise": self.components.point * self.scatter,
        }
        sd = np.sqrt(sum(each**2 for each in parts.values()))
        half = half_width(sd, np.full(num, DOF), CONFIDENCE)
        ends = {"loss": np.exp(log_loss), "low": np.exp(log_loss - half), "high": np.exp(log_loss + half)}
        return self.places.assign(**ends, sd=sd, **parts)


def _ratio_columns(log_n: Array, at: Array, exponent: float) -> Array:
    """Return the derivatives (n, 2) of the ratio to the largest size at ln N beyond it (n,) and ln images (n,)."""
    ratio = np.expm1(-exponent * log_n)
    return np.column_stack([ratio, ratio * at])


def _exponent_slope(log_n: Array, at: Array, exponent: float, params: Array) -> Array:
    """Return the derivative (n,) of the ratio by the exponent."""
    return -log_n * np.exp(-exponent * log_n) * (params[0] + params[1] * at)


def _fit(rows: pd.DataFrame, log_n: Array, sizes: Array) -> _Fit:
    """Fit by weighted least squares; points that scatter more count less, outliers less still."""
    grouped = rows.groupby(["is_budget", "images_seen"])
    codes, places = grouped.ngroup().to_numpy(), grouped.size().index.to_frame(index=False)
    y, beyond = np.log(rows["val_loss"].to_numpy(float)), log_n - log_n[-1]
    where = np.log(places["images_seen"].to_numpy(float))
    where -= where.mean()
    at, num, weights = where[codes], len(places), np.ones(len(y))
    for _ in range(ROUNDS):
        tried = [_regress(y, codes, _ratio_columns(beyond, at, each), weights) for each in EXPONENTS]
        errors = np.array([error for error, _, _ in tried])
        prior = ((EXPONENTS - EXPONENT) / EXPONENT_SD) ** 2
        # the points of a run tell little more of the exponent than one does
        spread = errors.min() / max(1, len(y) - num - 2)
        best = int(np.argmin(errors + (spread * num * prior if sizes[-1] > 1 else 1e9 * prior)))
        _, ratio, residual = tried[best]
        scatter = _scatter(residual, codes, where)
        weights = np.minimum(1.0, HUBER * scatter[codes] / np.maximum(np.abs(residual), 1e-12)) / scatter[codes] ** 2
    exponent = float(EXPONENTS[best])
    columns = _ratio_columns(beyond, at, exponent)
    levels = np.bincount(codes, weights * (y - columns @ ratio)) / np.bincount(codes, weights)
    jacobian = np.column_stack([indicators(codes).toarray(), columns, _exponent_slope(beyond, at, exponent, ratio)])
    prior_row = np.append(np.zeros(num + 2), 1 / EXPONENT_SD)
    design = linear_design(
        np.vstack([jacobian / scatter[codes, None], prior_row]), np.append(weights * scatter[codes] ** 2, num)
    )
    groups = Groups({"runs": np.append(rows.groupby("run_id").ngroup(), rows["run_id"].nunique())})
    found = components_of(design, np.append(residual / scatter[codes], (exponent - EXPONENT) / EXPONENT_SD), groups)
    return _Fit(
        places=places,
        at=where,
        scatter=scatter,
        exponent=exponent,
        params=np.concatenate([levels, ratio]),
        design=design,
        components=_with_prior(found, rows["run_id"].nunique() - 2),
        groups=groups,
    )


def _with_prior(found: Components, degrees: int) -> Components:
    """Draw the error that the points of a run share towards what is usual: few runs hardly tell it."""
    degrees, usual = max(0, degrees), (SHARED * found.point) ** 2
    own = found.shared["runs"] ** 2
    shared = (degrees * own + SHARED_RUNS * usual) / (degrees + SHARED_RUNS)
    return Components(shared={"runs": float(np.sqrt(shared))}, point=found.point, degrees=found.degrees)


def _regress(y: Array, codes: Array, columns: Array, weights: Array) -> tuple[float, Array, Array]:
    """Regress y on columns and a level at each place; returns the sum of squares, coefficients and residuals."""
    both = np.column_stack([y, columns])
    sums = np.stack([np.bincount(codes, weights * each) for each in both.T], axis=1)
    both = both - (sums / np.bincount(codes, weights)[:, None])[codes]
    root = np.sqrt(weights)
    found = np.linalg.lstsq(both[:, 1:] * root[:, None], both[:, 0] * root, rcond=None)[0]
    residual = both[:, 0] - both[:, 1:] @ found
    return float(np.sum(weights * residual**2)), found, residual


def _scatter(residual: Array, codes: Array, where: Array) -> Array:
    """Return the standard deviation of single losses (places,), averaged over neighbours, outliers drawn in."""
    usual = np.median(np.abs(residual)) / 0.6745
    squares = np.bincount(codes, np.minimum(np.abs(residual), 3 * usual) ** 2)
    near = np.exp(-0.5 * ((where[:, None] - where) / WIDTH) ** 2)
    degrees = near @ np.maximum(np.bincount(codes) - 1, 0)
    return np.sqrt(np.maximum(near @ squares, 1e-12) / np.maximum(degrees, 1.0))
