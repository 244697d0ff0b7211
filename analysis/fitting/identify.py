"""Flags of a fit, in words: bounds, identification, rival minima, outliers, correlated variables."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from aimscale.analysis.fitting.optimise import Minimum, Problem
from aimscale.analysis.fitting.result import Flag, Interval, Rival, about
from aimscale.analysis.laws.base import Array
from aimscale.analysis.table.points import Observations

WIDE_FACTOR, WIDE_EXPONENT_FACTOR = 100.0, 10.0
"""An interval of a positive parameter (an exponent) whose ends differ by more than this factor does not identify it."""
SAME_VARIABLE = 0.999
"""Two variables whose logarithms correlate by more than this are one: 6 % of scatter about a proportion over 100x."""
OUTLIER_SCALES = 6.0
"""A residual beyond this many robust standard deviations is named."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What to tell the reader of a fit."""

    flags: tuple[str, ...]
    """Sentences; one about a parameter starts with its name and a space."""
    not_identified: frozenset[str]
    """Reported parameters whose digits mean nothing."""


def log_likelihood_ratio(problem: Problem, total: float, best: float) -> float:
    """Log-likelihood lost at a larger objective when the noise's scale is fitted too: n/2 ln(S/S0) or n ln(S/S0)."""
    if problem.objective.likelihood:
        return total - best
    n = np.sum(problem.weights > 0)
    if best <= 0:
        return np.inf if total > 1e-12 else 0.0
    return float(n / problem.objective.power_of_residual * np.log(total / best))


def rivals_of(problem: Problem, minima: list[Minimum]) -> tuple[Rival, ...]:
    """The local minima after the best, with the verdict whether the data can tell them apart."""
    out = []
    for m in minima[1:]:
        law_params = {name: float(v[0]) for name, v in problem.params_of(m.vector[None]).items()}
        lost = log_likelihood_ratio(problem, m.total, minima[0].total)
        out.append(Rival(params=law_params, objective_value=m.total, within_noise=lost < 2.0))
    return tuple(out)


def diagnose(
    problem: Problem,
    best: Minimum,
    law_params: dict[str, float],
    params: dict[str, float],
    draws: dict[str, Array],
    intervals: dict[str, Interval],
    rivals: tuple[Rival, ...],
    points: Observations,
) -> Diagnosis:
    """All flags of a fit, and the parameters that it does not identify."""
    flags: list[str] = []
    lost: set[str] = set()
    _bounds(problem, best, flags, lost)
    _intervals(problem, law_params, draws, intervals, flags, lost)
    close = [r for r in rivals if r.within_noise]
    if close:
        other = ", ".join(f"{k} = {v:.4g}" for k, v in close[0].params.items())
        flags.append(f"A rival minimum lies within the noise: {other}.")
    _correlated_variables(problem, points, flags, lost)
    _outliers(problem, best, points, flags)
    _rising(problem, best, points, flags)
    derived = [name for name in params if name not in law_params]
    if lost & {p.name for p in problem.law.nonlinear} or any(_is_wide(intervals.get(name)) for name in derived):
        lost |= set(derived)  # they are functions of the same exponents: none is known when one is not
    above = {about(f) for f in flags if "is known from above only" in f}
    flags = [f for f in flags if not (about(f) in above and "lies on its lower bound" in f)]
    reached = {_parameter_and_bound(f) for f in flags if "its interval reaches the bound" in f}
    flags = [f for f in flags if not ("lies on its" in f and _parameter_and_bound(f) in reached)]
    inner = set(law_params) - set(params)  # the law's own coordinates, unknown to the reader
    flags = [f for f in dict.fromkeys(flags) if about(f) not in inner]
    return Diagnosis(flags=tuple(flags), not_identified=frozenset(lost & set(params)))


def _parameter_and_bound(flag: str) -> tuple[str, str]:
    return about(flag), flag.rsplit(" ", 1)[1]


def known_from_above(name: str, high: float) -> Flag:
    """The flag of a coefficient that may be zero."""
    return Flag(f"{name} is known from above only: the data allow any value from 0 to {high:.4g}.", name)


def _is_wide(interval: Interval | None) -> bool:
    return interval is not None and interval.low > 0 and interval.high / interval.low > WIDE_EXPONENT_FACTOR


def _rising(problem: Problem, best: Minimum, points: Observations, flags: list[str]) -> None:
    """A measurement that rises where the law can only fall is fitted as noise; a straight line in log-log shows it."""
    if any(np.any(values <= 0) for values in points.x.values()):
        return
    z = problem.objective.transform(points.y)
    design = np.column_stack([np.ones(len(z)), *(np.log(values) for values in points.x.values())])
    line = np.linalg.lstsq(design, z, rcond=None)[0]
    of_line = np.sum((z - design @ line) ** 2)
    of_law = np.sum((z - problem.objective.transform(problem.predict(best.vector[None])[0])) ** 2)
    rising = [v for v, slope in zip(points.x, line[1:], strict=True) if slope > 0]
    if rising and of_line < 0.5 * of_law:
        what = f"{points.called['y']} rises with {' and '.join(rising)}"
        flags.append(
            f"{what}, which {problem.law.formula} cannot follow, so it is fitted as noise; is it an accuracy, or "
            "something else?"
        )


def _bounds(problem: Problem, best: Minimum, flags: list[str], lost: set[str]) -> None:
    span = np.where(np.isfinite(problem.upper - problem.lower), problem.upper - problem.lower, 1.0)
    for j, p in enumerate(problem.law.parameters):
        if not problem.movable[j]:
            continue
        for end, word in ((problem.lower[j], "lower"), (problem.upper[j], "upper")):
            if np.isfinite(end) and abs(best.vector[j] - end) <= 1e-6 * span[j]:
                value = np.exp(end) if p.log else end
                flags.append(Flag(f"{p.name} lies on its {word} bound {value:g}.", p.name))
                if j >= problem.num_linear:
                    lost.add(p.name)
                elif end == 0.0:
                    # a term without a coefficient leaves its exponent free
                    lost |= _exponents_of(problem, j)


def _exponents_of(problem: Problem, j: int) -> set[str]:
    """Non-linear parameters that enter basis function j alone."""
    t = {p.name: np.full((1, 1), np.exp(v) if p.log else v) for p, v in _middle(problem)}
    _, gradients = problem.law.basis_and_gradient(problem.x, t)
    out = set()
    for p, derivatives in zip(problem.law.nonlinear, gradients, strict=True):
        moving = {i for i, d in enumerate(derivatives) if np.any(np.asarray(d) != 0)}
        if moving == {j}:
            out.add(p.name)
    return out


def _middle(problem: Problem) -> list:
    low, high = problem.lower[problem.num_linear :], problem.upper[problem.num_linear :]
    return list(zip(problem.law.nonlinear, (low + high) / 2, strict=True))


def _intervals(
    problem: Problem,
    law_params: dict[str, float],
    draws: dict[str, Array],
    intervals: dict[str, Interval],
    flags: list[str],
    lost: set[str],
) -> None:
    """Parameters whose interval runs into a bound or spans orders of magnitude."""
    for j, p in enumerate(problem.law.parameters):
        if p.name not in draws or not problem.movable[j]:
            continue
        i = intervals.get(p.name)
        low, high = (i.low, i.high) if i else np.percentile(draws[p.name], [2.5, 97.5])
        ends = [np.exp(e) if p.log else e for e in (problem.lower[j], problem.upper[j])]
        at_low = np.isfinite(ends[0]) and low <= ends[0] + 1e-6 * max(abs(ends[0]), abs(law_params[p.name]), 1e-300)
        at_high = np.isfinite(ends[1]) and high >= ends[1] * (1 - 1e-6)
        if j >= problem.num_linear and (at_low or at_high):
            bound = ends[0] if at_low else ends[1]
            flags.append(Flag(f"{p.name} is not identified: its interval reaches the bound {bound:g}.", p.name))
            lost.add(p.name)
        elif at_low and ends[0] == 0.0 and high > 1e-9 * abs(float(np.median(problem.y))):
            flags.append(known_from_above(p.name, high))
            lost |= _exponents_of(problem, j)  # the term may be absent, and what has no coefficient has no exponent
        elif low > 0 and high / low > (WIDE_FACTOR if j < problem.num_linear else WIDE_EXPONENT_FACTOR):
            flags.append(Flag(f"{p.name} is known only within a factor of {high / low:.2g}.", p.name))
            lost.add(p.name)


def _correlated_variables(problem: Problem, points: Observations, flags: list[str], lost: set[str]) -> None:
    for v, values in points.x.items():
        factor = values.max() / max(values.min(), 1e-300)
        if factor < 2:
            flags.append(f"{v} varies by a factor of {factor:.3g} only, so its part of the law is hardly seen.")
    for a, b in itertools.combinations(points.x, 2):
        r = np.corrcoef(np.log(points.x[a]), np.log(points.x[b]))[0, 1]
        if abs(r) > SAME_VARIABLE and len(points.x) == 2:
            # What is left to tell them apart is the law's own curvature, which noise imitates.
            flags.append(f"{a} and {b} move together, in one proportion, so no exponent of theirs is identified.")
            lost |= {name for j in range(problem.num_linear) for name in _exponents_of(problem, j)}
        elif abs(r) > 0.98:
            flags.append(
                f"{a} and {b} move together (correlation of logarithms {r:.3f}), so their exponents trade off."
            )


def _outliers(problem: Problem, best: Minimum, points: Observations, flags: list[str]) -> None:
    r = problem.objective.transform(points.y) - problem.objective.transform(problem.predict(best.vector[None])[0])
    scale = 1.4826 * np.median(np.abs(r - np.median(r)))
    far = np.flatnonzero(np.abs(r) > OUTLIER_SCALES * scale) if scale > 0 else np.array([], int)
    if len(far):
        worst = far[np.argsort(-np.abs(r[far]))][:5]
        names = ", ".join(str(points.index[i]) for i in worst)
        flags.append(
            f"{len(far)} residual{'s' * (len(far) > 1)} beyond {OUTLIER_SCALES:g} robust standard deviations "
            f"(largest: row {names})."
        )
