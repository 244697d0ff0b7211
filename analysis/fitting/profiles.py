"""Profile likelihood: how much worse the best fit gets when one parameter is held away from its optimum."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import chi2
from scipy.stats import t as student

from aimscale.analysis.display import Result
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.optimise import Problem, make_problem, minimise
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.laws.base import Array

FLAT = "its profile is flat"
"""What the flag about such a parameter says."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Profile(Result):
    """The profile of one parameter."""

    parameter: str
    values: Array = field(repr=False)
    """Where it was held (m,)."""
    lost: Array = field(repr=False)
    """Log-likelihood lost there, all other parameters refitted (m,)."""
    low: float
    """Lower end of the likelihood-ratio interval; the grid's end if the profile never crosses the threshold."""
    high: float
    confidence: float
    closed: tuple[bool, bool]
    """Whether the profile crosses the threshold below and above: False means flat, the data do not bound it there."""

    @property
    def table(self) -> pd.DataFrame:
        """One row a grid point: value, lost."""
        return pd.DataFrame({"value": self.values, "lost": self.lost})

    def headline(self) -> str:
        """The interval in words."""
        return self.sentence()

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return vars(self) | {"values": self.values.tolist(), "lost": self.lost.tolist()}

    def sentence(self) -> str:
        """The interval in words."""
        if not any(self.closed):
            return f"{self.parameter} is not identified: {FLAT} from {self.low:.4g} to {self.high:.4g}."
        open_end = "" if all(self.closed) else f"; not bounded {'below' if not self.closed[0] else 'above'}"
        return f"{self.parameter}: {self.confidence:.0%} profile interval {self.low:.4g} to {self.high:.4g}{open_end}."


def problem_of(fit: Fit) -> Problem:
    """The optimiser's problem that a fit solved."""
    x = {v: fit.data[v].to_numpy() for v in fit.law.variables}
    weights = fit.data["weight"].to_numpy()
    y = fit.data["y"].to_numpy()
    return make_problem(fit.law, x, y, fit.objective, weights=weights, fixed=fit.fixed, bounds=fit.bounds)


def profile(fit: Fit, parameter: str, *, span: float = 4.0, num: int = 41, confidence: float = 0.95) -> Profile:
    """Profile a parameter over its bootstrap spread (or a factor of e each way without one).

    The objective's increase is divided by `likelihood_scale`, so that squares and robust losses share the threshold of
    Student's t (for a straight line and squares the interval is exact).

    Args:
        span: half-width of the grid in standard deviations of the bootstrap.

    Raises:
        AnalysisError: the law has no such parameter, or it was fixed.
    """
    if parameter not in fit.law.names:
        raise AnalysisError(f"{fit.law.formula} has no parameter {parameter!r}; it has {', '.join(fit.law.names)}.")
    if parameter in fit.fixed:
        raise AnalysisError(f"{parameter} was fixed at {fit.fixed[parameter]:g}; a profile needs it free.")
    index = fit.law.names.index(parameter)
    at, problem = fit.law_params[parameter], problem_of(fit)
    p = fit.law.parameters[index]
    positive = at > 0 and (p.log or p.limits(problem.x)[0] >= 0)
    spread = _spread(fit, parameter, at, positive)
    if at == 0 and index < problem.num_linear:  # on its bound: up to all of the loss at the centre of the data
        spread = float(np.median(np.abs(problem.y)) / problem.reference(fit.law_params)[index]) / span
    steps = np.linspace(-span, span, num) * spread
    values = at * np.exp(steps) if positive else at + steps
    low, high = p.limits(problem.x)
    values = np.unique(np.clip(values, low, high))
    totals = np.array([_held_total(problem, fit, parameter, v) for v in values])
    best = min(fit.objective_value, float(totals.min()))
    scale = likelihood_scale(fit)
    tiny = 1e-24 * float(np.sum(fit.data["weight"].to_numpy()))  # what rounding leaves of squared residuals
    # without noise every worse value is ruled out
    lost = (totals - best) / scale if scale > tiny else np.where(totals - best > tiny, np.inf, 0.0)
    spare = max(1, len(fit.data) - len(fit.law.parameters) + len(fit.fixed))
    threshold = (
        chi2.ppf(confidence, 1) if fit.objective.likelihood else student.ppf(0.5 + confidence / 2, spare) ** 2
    ) / 2
    ends, closed = _crossings(values, lost, at, threshold)
    return Profile(
        parameter=parameter, values=values, lost=lost, low=ends[0], high=ends[1], confidence=confidence, closed=closed
    )


def likelihood_scale(fit: Fit) -> float:
    """What to divide an objective's differences by, so that twice the result is chi-squared at the truth.

    For an M-estimator that is the mean of psi^2 over the mean slope of psi (psi: derivative of the loss): sigma^2 for
    squares. The slope is a difference over a bandwidth, since psi has kinks. 1 for a likelihood.
    """
    if fit.objective.likelihood:
        return 1.0
    r, w = fit.data["residual"].to_numpy(), fit.data["weight"].to_numpy()
    n, free = len(r), len(fit.law.parameters) - len(fit.fixed)
    width = 1.4826 * float(np.median(np.abs(r - np.median(r)))) * n**-0.2 + 1e-300

    def psi(residual: Array) -> Array:
        size = fit.objective.delta
        return fit.objective.side(residual) * (np.sign(residual) if size == 0 else np.clip(residual, -size, size))

    slope = float(np.sum(w * (psi(r + width) - psi(r - width)))) / (2 * width * n)
    return float(np.sum((w * psi(r)) ** 2)) / max(1, n - free) / max(slope, 1e-300)


def _spread(fit: Fit, parameter: str, at: float, positive: bool) -> float:
    if parameter in fit.draws:
        draws = fit.draws[parameter]
        draws = np.log(draws[draws > 0]) if positive else draws
        if len(draws) > 2 and np.std(draws) > 0:
            return float(np.std(draws))
    return 0.25 if positive else 0.25 * (abs(at) + 1e-6)


def _held_total(problem: Problem, fit: Fit, parameter: str, value: float) -> float:
    """Objective with one parameter held, refitted from the optimum and from two shifted starts."""
    held = make_problem(
        problem.law,
        {v: problem.x[v][:-1] for v in problem.law.variables},
        problem.y,
        problem.objective,
        weights=problem.weights,
        fixed={**fit.fixed, parameter: value},
        bounds=fit.bounds,
    )
    start = held.vector_of({**fit.law_params, parameter: value})
    width = np.where(np.isfinite(held.upper - held.lower), held.upper - held.lower, 1.0)
    starts = np.concatenate([start, start + 0.02 * width, start - 0.02 * width])
    _, totals = minimise(held, np.clip(starts, held.lower, held.upper))
    return float(totals.min())


def _crossings(
    values: Array, lost: Array, at: float, threshold: float
) -> tuple[tuple[float, float], tuple[bool, bool]]:
    """Where the profile passes the threshold on either side of the optimum, by straight lines between grid points."""
    ends, closed = [], []
    for side in (-1, 1):
        order = np.argsort(side * values)
        v, z = values[order], lost[order]
        beyond = np.flatnonzero((side * (v - at) >= 0) & (z > threshold))
        if len(beyond) == 0:
            ends.append(float(v[-1]))
            closed.append(False)
            continue
        i = beyond[0]
        v0, z0 = (at, 0.0) if i == 0 or side * (v[i - 1] - at) < 0 else (v[i - 1], z[i - 1])
        share = (threshold - z0) / (z[i] - z0) if z[i] > z0 else 1.0
        ends.append(float(v0 + np.clip(share, 0, 1) * (v[i] - v0)))
        closed.append(True)
    return (ends[0], ends[1]), (closed[0], closed[1])


def with_profile_flags(fit: Fit) -> Fit:
    """The fit with flags for parameters whose profile is flat on both sides."""
    flat = [p for p in (profile(fit, n, num=11) for n in fit.law.names if n not in fit.fixed) if not any(p.closed)]
    flags = (*fit.flags, *(p.sentence() for p in flat))
    return replace(fit, flags=flags, not_identified=fit.not_identified | {p.parameter for p in flat})
