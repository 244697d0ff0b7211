"""Gains in compute of one recipe over another: measured ones by budget or by pair of runs, and a smooth curve of these.

The gain itself is modelled, not the difference of two laws: its logarithm is a constant plus a random walk over ln C (a
local level, Harvey 1989), beside errors that pairs of a size or of a budget share. How much each counts is found by
restricted maximum likelihood, so gains are drawn towards one constant as far as they allow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.linalg import solve_triangular

from aimscale.analysis.distributions import t_above
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import half_width, satterthwaite
from aimscale.analysis.fitting.diagnostics import SAME_VALUE, SAME_VARIABLE
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.inference import Function
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.laws import Array, Params
from aimscale.analysis.table.groups import Cost, isoflop_budgets, shared_budgets, spaced

MIN_BUDGETS, MIN_LEFT = 4, 2
"""Budgets at which gains are read off directly, and gains that a curve needs beyond its coefficients."""
END = 3
"""Budgets through which the baseline's curve is extended by a line."""
MOST_PAIRS = 300
"""Pairs of runs that a curve goes through at most, evenly spaced over compute."""
WALKS, SHARES = (0.0, *np.geomspace(0.01, 1000, 11)), (0.0, 0.1, 0.3, 1.0, 3.0)
"""Variances that are tried, in units of that of one gain: of the walk over the table, and of what groups share."""
NEWTON_STEPS, NEWTON_REACH, MOST = 40, 1.0, 8.0
"""Steps to a gain, the longest one, and the largest logarithm of a gain."""


@dataclass(frozen=True, kw_only=True)
class Gains:
    """Measured gains (n,) of a recipe."""

    rows: pd.DataFrame
    """N, D, C of the recipe's runs, and the logarithm of the gain: how much more compute the baseline needs for the
    same loss."""
    slopes: Array
    """Derivative of the baseline's ln loss by ln C where it has that loss: an error of ln loss moves a gain by its
    inverse."""
    groups: Mapping[str, Array] = field(default_factory=dict)
    """Kind of group (sizes, budgets) -> number of each gain's group: what its gains may share."""
    law: Fit | None = None
    """Law of the baseline that tells its slopes; None where gains are read off its own losses."""
    of_params: Function | None = None
    """Logarithms of the gains as a function of that law's parameters."""

    @property
    def flops(self) -> Array:
        """Compute (n,) of the recipe's runs."""
        return self.rows["C"].to_numpy(float)

    def near(self, flops: Array) -> pd.Series:
        """Average the logarithms of gains by the nearest of amounts of compute (m,), whose numbers are the index."""
        nearest = np.abs(np.log(self.flops[:, None] / flops)).argmin(axis=1)
        return self.rows["log_gain"].groupby(nearest).mean()

    def errors(self, weights: Array, errors: Array, degrees: float) -> tuple[Array, Array, Array]:
        """Return weighted sums (m,) of the gains, and add the errors of the law's slopes to their own (m,) errors."""
        value, free = weights @ self.rows["log_gain"].to_numpy(), np.full(len(weights), degrees)
        if self.law is None or self.of_params is None:
            return value, errors, free
        of_params = self.of_params
        _, more, spare = self.law.estimate.error_of(lambda params: of_params(params) @ weights.T)
        parts = np.stack([errors, more])
        return value, np.linalg.norm(parts, axis=0), satterthwaite(parts, np.stack([free, spare]))


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Errors of a curve's value at one place, and what more runs where there are some would leave of them."""

    variance: float
    shared: Array
    """Covariance of the value there with the gain at every run (n,)."""
    at_runs: Array
    """Variance of the gain at every run (n,)."""
    noise: Array
    """Variance of the gain that one more pair of runs measures (n,)."""
    degrees: float

    def after(self, seeds: int) -> Array:
        """Return the standard errors (n,) after so many more pairs at a run's size and data."""
        variance = self.variance - self.shared**2 / (self.at_runs + self.noise / seeds)
        return np.sqrt(np.maximum(variance, 0.0))


@dataclass(frozen=True, kw_only=True)
class Smooth:
    """Curve through measured gains at amounts of compute (m,): logarithms with 95 % intervals."""

    value: Array
    low: Array
    high: Array
    trend: tuple[float, float, float]
    """Change over the table's compute by the straight line, as a factor with its interval."""
    trend_p: float
    """Probability of one as large, if there is none."""
    covariance: Array
    """Covariance (m + n, m + n) of the values and of the gains at all runs."""
    noise: Array
    degrees: float

    def spread(self, place: int) -> Spread:
        """Take the errors at one amount of compute."""
        n, covariance = len(self.noise), self.covariance
        errors = {
            "variance": float(covariance[place, place]),
            "shared": covariance[place, -n:],
            "at_runs": np.diag(covariance)[-n:],
        }
        return Spread(**errors, noise=self.noise, degrees=self.degrees)


def measured_gains(points: pd.DataFrame, cost: Cost) -> Gains:
    """Measure gains of the second recipe (G = 2) over the first at N, D, C and loss y: by budgets of compute where runs
    share these or grow in one proportion, else by pairs of runs."""
    budgets = isoflop_budgets(points)
    if abs(np.corrcoef(np.log(points["N"]), np.log(points["D"]))[0, 1]) > SAME_VARIABLE:
        budgets = shared_budgets(points)
    if budgets is not None:
        sides = [_lowest(points[points["G"] == group].assign(C=budgets)) for group in (1.0, 2.0)]
        if len(sides[0]) >= END and len(sides[1]) >= MIN_BUDGETS:
            return _by_budget(*sides)
    return _by_pair(points, cost)


def _lowest(rows: pd.DataFrame) -> pd.DataFrame:
    """Keep the row of the lowest loss of every budget."""
    return rows.loc[rows.groupby("C")["y"].idxmin()].sort_values("C")


def _by_budget(baseline: pd.DataFrame, level: pd.DataFrame) -> Gains:
    """Read off at which compute the baseline's lowest losses, joined by lines in log-log, reach those of the level."""
    falling = baseline[baseline["y"] < baseline["y"].cummin().shift(fill_value=np.inf)]
    c, y = np.log(falling[["C", "y"]].to_numpy(float)).T
    if len(c) < END:
        raise AnalysisError("The baseline's losses do not fall with compute, so there is no gain in compute to tell.")
    wanted, log_flops = np.log(level["y"].to_numpy(float)), np.log(level["C"].to_numpy(float))
    reached = np.interp(-wanted, -y, c)
    for part, beyond in ((slice(None, END), wanted > y[0]), (slice(-END, None), wanted < y[-1])):
        line = np.polyfit(y[part], c[part], 1)
        reached = np.where(beyond, np.polyval(line, wanted), reached)
    rows = level[["N", "D", "C"]].assign(log_gain=reached - log_flops)
    return Gains(rows=rows, slopes=np.interp(reached, c, np.gradient(y, c)))


def _by_pair(points: pd.DataFrame, cost: Cost) -> Gains:
    """Turn the difference of the losses of two runs of one size and amount of data into compute, by the slope of the
    baseline's law; without a run of the baseline there, by its law."""
    cells = points.assign(log_y=np.log(points["y"])).groupby(["G", "N", "D"], as_index=False)[["C", "log_y"]].mean()
    sides = [cells[cells["G"] == group] for group in (1.0, 2.0)]
    rows = sides[1].sort_values("C").iloc[spaced(len(sides[1]), MOST_PAIRS)].reset_index(drop=True)
    law = fit(points[points["G"] == 1.0][["N", "D", "y"]], "chinchilla", y="y")
    logs = [np.log(each[["N", "D"]].to_numpy(float)) for each in (rows, sides[0])]
    apart = np.abs(logs[0][:, None] - logs[1][None]).max(axis=2)
    nearest, is_paired = apart.argmin(axis=1), apart.min(axis=1) <= SAME_VALUE
    per_gain = 1 / (2 + cost.s)  # N and D grow alike, C = kappa N^(1 + s) D

    def at(log_gain: Array, which: Array = logs[0]) -> Callable[[Params], Array]:
        scales = np.exp(which + per_gain * np.reshape(log_gain, (-1, 1)))
        return law.estimate.law_at(dict(zip("ND", scales.T, strict=True)))

    beside, measured = at(np.zeros(1), logs[1][nearest]), rows["log_y"].to_numpy()
    residual_of = sides[0]["log_y"].to_numpy()[nearest]

    def target(params: Params) -> Array:  # a pair shares what the law misses there
        return measured - np.where(is_paired, residual_of - beside(params), 0.0)

    params, log_gains, step = law.estimate.params, np.zeros(len(rows)), 1e-4
    for _ in range(NEWTON_STEPS):
        low, here, high = (at(log_gains + move)(params) for move in (-step, 0.0, step))
        slopes = np.minimum((high - low) / (2 * step), -1e-12)
        log_gains = np.clip(
            log_gains + np.clip((target(params) - here) / slopes, -NEWTON_REACH, NEWTON_REACH), -MOST, MOST
        )
    reached = at(log_gains)
    groups = {name: pd.factorize(rows[v])[0] for name, v in (("sizes", "N"), ("budgets", "D"))}
    return Gains(
        rows=rows[["N", "D", "C"]].assign(log_gain=log_gains),
        slopes=slopes,
        groups=groups,
        law=law,
        of_params=lambda params: log_gains + (target(params) - reached(params)) / slopes,
    )


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """Generalised least squares of gains (n,) on columns (n, k) with errors of one covariance but for its scale."""

    whiten: Array
    """Inverse root (n, n) of the covariance."""
    x: Array
    """Columns, whitened."""
    left: Array
    """Residuals, whitened."""
    information: Array
    variance: float
    """Scale of the covariance."""
    log_likelihood: float
    """Restricted log-likelihood (REML), but for a constant."""


def _fitted(x: Array, u: Array, covariance: Array) -> _Fit:
    root, degrees = np.linalg.cholesky(covariance), len(u) - x.shape[1]
    whiten = solve_triangular(root, np.eye(len(u)), lower=True)
    xi, ui = whiten @ x, whiten @ u
    information = xi.T @ xi
    residual = ui - xi @ np.linalg.solve(information, xi.T @ ui)
    variance = max(float(residual @ residual) / degrees, 1e-18)
    logs = 2 * np.log(np.diag(root)).sum() + np.linalg.slogdet(information)[1] + degrees * np.log(variance)
    parts = {"whiten": whiten, "x": xi, "left": residual, "information": information}
    return _Fit(**parts, variance=variance, log_likelihood=-float(logs) / 2)


def smooth(gains: Gains, flops: Array, *, with_line: bool) -> Smooth:
    """Draw the curve through measured gains at amounts of compute (m,).

    Args:
        with_line: whether the walk is about a straight line over ln C, in place of a constant.
    """
    u, per_loss, m = gains.rows["log_gain"].to_numpy(), 1 / np.abs(gains.slopes), len(flops)
    logs = np.log(np.append(flops, gains.flops))
    place = (logs - logs[m:].min()) / np.ptp(logs[m:])
    columns = [np.ones(len(place))] + [place] * with_line
    if gains.groups:  # a change that helps sizes alone gains more where these lack
        split = np.log((gains.rows["D"] / gains.rows["N"]).to_numpy(float))
        split = np.append(np.zeros(m), split - split.mean())
        columns += [split, split**2]
    x, walk, unit = np.stack(columns, axis=1), np.minimum.outer(place, place), np.mean(per_loss**2)
    if len(u) < x.shape[1] + MIN_LEFT:
        raise AnalysisError(f"{len(u)} gains at equal N and D are too few for a curve over compute; run more of both.")
    shared = [np.equal.outer(each, each) * np.outer(per_loss, per_loss) for each in gains.groups.values()]

    def tried(size: float, *shares: float) -> tuple[_Fit, float]:
        parts = (share * part for share, part in zip(shares, shared, strict=True))
        return _fitted(x[m:], u, np.diag(per_loss**2) + size * unit * walk[m:, m:] + sum(parts)), size * unit

    best, size = max(
        itertools.starmap(tried, itertools.product(WALKS, *(SHARES for _ in shared))),
        key=lambda each: each[0].log_likelihood,
    )
    drawn = size * walk[:, m:] @ best.whiten.T
    rest, gls = x - drawn @ best.x, np.linalg.solve(best.information, best.x.T @ best.whiten)
    weights = drawn @ (best.whiten - best.x @ gls) + x @ gls
    covariance = size * walk - drawn @ drawn.T + rest @ np.linalg.solve(best.information, rest.T)
    degrees, curve_errors = float(len(u) - x.shape[1]), np.sqrt(best.variance * np.diag(covariance)[:m])
    value, errors, free = gains.errors(weights[:m], np.maximum(curve_errors, 0.0), degrees)
    half = half_width(errors, free)
    j = [int(with_line)]
    curve_errors = np.sqrt(best.variance * np.linalg.inv(best.information)[j, j])
    change, error, spare = gains.errors(gls[j], curve_errors, degrees)
    reach = half_width(error, spare)
    return Smooth(
        value=value,
        low=value - half,
        high=value + half,
        trend=tuple(np.exp([change, change - reach, change + reach])[:, 0].tolist()),
        trend_p=2 * float(t_above(np.abs(change / np.maximum(error, 1e-300)), spare)[0]),
        covariance=best.variance * covariance,
        noise=best.variance * per_loss**2,
        degrees=degrees,
    )
