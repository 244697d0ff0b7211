"""Flags of a fit: bounds, identification, rival minima, outliers, variables that move together."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from aimscale.analysis.fitting.identification import num_values
from aimscale.analysis.fitting.optimise import Minimum
from aimscale.analysis.fitting.problem import Problem
from aimscale.analysis.fitting.result import Interval, interval
from aimscale.analysis.laws.base import Array
from aimscale.analysis.table.points import Observations
from aimscale.analysis.words import Flag

WIDE_FACTOR, WIDE_EXPONENT_FACTOR = 100.0, 10.0
"""An interval of a positive parameter (an exponent) whose ends differ by more than this factor does not identify it."""
SAME_VARIABLE = 0.999
"""Two variables whose logarithms correlate by more than this are one: 6 % of scatter about a proportion over 100x."""
OUTLIER_SCALES = 6.0
"""A residual beyond this many robust standard deviations is named."""
UNKNOWN = ("reaches_bound", "factor")
"""Kinds of flags of a parameter that is not identified."""
WITHIN_NOISE = 2.0
"""Log-likelihood that a rival minimum may lose and still be hardly less likely than the best."""


def diagnose(
    problem: Problem,
    minima: list[Minimum],
    params: Collection[str],
    draws: Mapping[str, Array],
    intervals: Mapping[str, Interval],
    points: Observations,
    hidden: frozenset[str] = frozenset(),
) -> tuple[tuple[Flag, ...], frozenset[str]]:
    """All flags of a fit, and the reported parameters (of `params`) that it does not identify.

    Args:
        hidden: parameters that no losses at these scales could identify (`unidentified`).
    """
    best = minima[0]
    flags, lost = _of_parameters(problem, best, draws, intervals)
    flags, lost = [flag for flag in flags if flag.subject not in hidden], lost | hidden
    if names := [name for name in params if name in hidden]:
        counts = " and ".join(f"{num_values(values)} values of {v}" for v, values in points.x.items())
        flags.insert(0, Flag(kind="few_values", subject=", ".join(names), more=(counts,)))
    if len(minima) > 1 and not hidden:
        gap = _likelihood_lost(problem, best.total, minima[1].total)
        flags += [Flag(kind="rival", number=gap)] if gap < WITHIN_NOISE else []
    for flag, unknown in _of_variables(problem, points):
        flags.append(flag)
        lost |= unknown
    flags += _outliers(problem, best, points)
    derived = [name for name in params if name not in problem.law.names]
    known = [intervals[name] for name in derived if name in intervals]
    is_wide = any(i.low > 0 and i.high / i.low > WIDE_EXPONENT_FACTOR for i in known)
    if is_wide or lost & {p.name for p in problem.law.nonlinear}:
        lost |= set(derived)  # they are functions of the same exponents: none is known when one is not
    inner = set(problem.law.names) - set(params)  # the law's own coordinates, unknown to the reader
    return tuple(f for f in flags if f.subject not in inner), frozenset(lost & set(params))


def _likelihood_lost(problem: Problem, best: float, rival: float) -> float:
    """Log-likelihood that a rival's objective loses against the best.

    The noise's scale is fitted too: n/2 ln(S/S0) of squares, n ln(S/S0) of absolute values.
    """
    power = 1 if problem.objective.robust and not problem.objective.multiple else 2
    return float(np.sum(problem.weights > 0) / power * np.log(max(rival, 1e-12) / max(best, 1e-12)))


def _of_parameters(
    problem: Problem, best: Minimum, draws: Mapping[str, Array], intervals: Mapping[str, Interval]
) -> tuple[list[Flag], set[str]]:
    """At most one flag for each parameter: its interval reaches a bound, or spans orders of magnitude; it lies on a
    bound. And the names of those that are not identified."""
    flags, lost = [], set[str]()
    for j in np.flatnonzero(problem.movable).tolist():
        p, is_linear = problem.law.parameters[j], j < problem.num_linear
        low, high = (float(np.exp(e[j]) if p.log else e[j]) for e in (problem.lower, problem.upper))
        i = intervals.get(p.name) or (interval(draws[p.name]) if p.name in draws else None)
        found = [*_of_interval(p.name, i, low, high, is_linear)] if i is not None else []
        near = 1e-6 * (high - low if np.isfinite(high - low) and not p.log else 1.0)
        if best.vector[j] - problem.lower[j] <= near:
            found.append(Flag(kind="lower_bound", subject=p.name, number=low))
        elif problem.upper[j] - best.vector[j] <= near:
            found.append(Flag(kind="upper_bound", subject=p.name, number=high))
        flags += found[:1]
        if is_linear and any(f.kind == "from_above" or (f.kind == "lower_bound" and f.number == 0) for f in found):
            lost |= _exponents_of(problem, j)  # what has no coefficient has no exponent
        if any(flag.kind in UNKNOWN or not is_linear for flag in found):
            lost.add(p.name)
    return flags, lost


def _of_interval(name: str, i: Interval, low: float, high: float, is_linear: bool) -> Iterator[Flag]:
    """What an interval says against a parameter of these bounds."""
    at_low = np.isfinite(low) and i.low <= low + 1e-6 * abs(low)
    at_high = np.isfinite(high) and i.high >= high * (1 - 1e-6)
    if not is_linear and (at_low or at_high):
        yield Flag(kind="reaches_bound", subject=name, number=low if at_low else high)
    elif is_linear and at_low and low == 0.0 and i.high > 0:
        yield Flag(kind="from_above", subject=name, number=i.high)
    elif i.low > 0 and i.high / i.low > (WIDE_FACTOR if is_linear else WIDE_EXPONENT_FACTOR):
        yield Flag(kind="factor", subject=name, number=i.high / i.low)


def _exponents_of(problem: Problem, j: int) -> set[str]:
    """Non-linear parameters that enter basis function j alone."""
    middle = (problem.lower + problem.upper)[problem.num_linear :] / 2
    t = {p.name: np.full((1, 1), np.exp(v) if p.log else v) for p, v in zip(problem.law.nonlinear, middle, strict=True)}
    _, gradients = problem.law.basis_and_gradient(problem.x, t)
    moving = [{i for i, d in enumerate(each) if np.any(np.asarray(d) != 0)} for each in gradients]
    return {p.name for p, those in zip(problem.law.nonlinear, moving, strict=True) if those == {j}}


def _of_variables(problem: Problem, points: Observations) -> Iterator[tuple[Flag, set[str]]]:
    """Variables that hardly vary, or move together; with the parameters that are unknown for it."""
    for v, values in points.x.items():
        factor = float(values.max() / max(values.min(), 1e-300))
        if factor < 2:
            yield Flag(kind="narrow", subject=v, number=factor), set()
    for a, b in itertools.combinations(points.x, 2):
        r = float(np.corrcoef(np.log(points.x[a]), np.log(points.x[b]))[0, 1])
        if abs(r) > SAME_VARIABLE and len(points.x) == 2:
            # What is left to tell them apart is the law's own curvature, which noise imitates.
            unknown = set().union(*(_exponents_of(problem, j) for j in range(problem.num_linear)))
            yield Flag(kind="one_variable", subject=f"{a} and {b}", number=r), unknown
        elif abs(r) > 0.98:
            yield Flag(kind="collinear", subject=f"{a} and {b}", number=r), set()


def _outliers(problem: Problem, best: Minimum, points: Observations) -> Iterator[Flag]:
    r = problem.residual(best.vector)
    scale = 1.4826 * np.median(np.abs(r - np.median(r)))
    far = np.abs(r) > OUTLIER_SCALES * scale
    if scale > 0 and far.any():
        row = str(points.index[int(np.argmax(np.abs(r)))])
        yield Flag(kind="outliers", subject=row, number=float(far.sum()), more=(OUTLIER_SCALES,))
