"""Flags of a fit: parameters that are not known, variables that move together, outliers, and what speaks against a law.

Tests against a law take the estimate's own components of variance for the null: what points of a size, a budget or a
run share is no misfit.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping

import numpy as np
import pandas as pd
from scipy.stats import f as fisher

from aimscale.analysis.errors import option
from aimscale.analysis.fitting.groups import Groups, basis_of, numbers_of_values
from aimscale.analysis.fitting.identification import num_values
from aimscale.analysis.fitting.inference import SMALLEST_DELTA, Estimate
from aimscale.analysis.fitting.problem import Problem
from aimscale.analysis.fitting.result import Interval
from aimscale.analysis.laws.base import Array
from aimscale.analysis.table.design import experiment_columns, held_equal
from aimscale.analysis.table.names import their_name
from aimscale.analysis.table.points import Observations
from aimscale.analysis.table.select import spaced
from aimscale.analysis.words import Flag, human, p_value

WIDE_FACTOR, WIDE_EXPONENT_FACTOR = 100.0, 10.0
"""An interval of a positive parameter (an exponent) whose ends differ by more than this factor does not identify it."""
WIDE_DERIVED = 0.5
"""A derived exponent (of N* or D*, between 0 and 1) that is not known to within this is not identified."""
SAME_VARIABLE = 0.999
"""Two variables whose logarithms correlate by more than this are one: 6 % of scatter about a proportion over 100x."""
OUTLIER_SCALES = 6.0
"""A residual beyond this many robust standard deviations is named: of 1000 normal errors none is, once in a million."""
ALARM = 0.01
"""A test is told of at this probability or less."""
MAX_GROUPS = 30
"""Groups of a column that are tested: with more of them, each alone hardly matters."""
MOST_POINTS = 400
"""Points that tests look at: of larger tables those of evenly spaced cells or rows."""
HARDLY = 1e-3
"""Columns of which the law's own derivatives leave less than this share are not tested."""


def diagnose(
    found: Estimate,
    params: Collection[str],
    intervals: Mapping[str, Interval],
    points: Observations,
    hidden: frozenset[str] = frozenset(),
) -> tuple[tuple[Flag, ...], frozenset[str]]:
    """Collect the flags of a fit, and the reported parameters (of `params`) that it does not identify.

    Args:
        intervals: of reported parameters and of the law's own.
        hidden: parameters that no losses at these scales could identify (`unidentified`).
    """
    law, flags = found.problem.law, list[Flag]()
    if names := ", ".join(name for name in params if name in hidden):
        counts = " and ".join(f"{num_values(values)} values of {v}" for v, values in points.x.items())
        text = f"{counts} do not identify {names}, whatever the noise; measure more, or hold one by {option('fix')}."
        flags.append(Flag(kind="few_values", subject=names, text=text))
    of_params, of_variables = [*_parameters(found, intervals)], [*_variables(found.problem, points)]
    flags += [flag for flag, _ in of_params if flag.subject not in hidden]
    flags += [*(flag for flag, _ in of_variables), *_outliers(found, points), *blind_flags(found.groups)]
    lost = hidden.union(*(unknown for _, unknown in (*of_params, *of_variables)))
    ends = {name: intervals[name] for name in law.derived if name in intervals}
    lost |= {name for name, i in ends.items() if not i.high - i.low <= WIDE_DERIVED}
    inner = set(law.names) - set(params)  # the law's own coordinates, unknown to the reader
    return tuple(f for f in flags if f.subject not in inner), lost & set(params)


def _parameters(found: Estimate, intervals: Mapping[str, Interval]) -> Iterator[tuple[Flag, set[str]]]:
    """Flag parameters on a bound, or whose interval reaches one or spans orders of magnitude, at most once each, with
    those that are not identified for it."""
    problem = found.problem
    for j in np.flatnonzero(problem.movable).tolist():
        p, (low, high), is_linear = problem.law.parameters[j], problem.limits(j), j < problem.num_linear
        i, near = intervals[p.name], 1e-6 * (high - low if np.isfinite(high - low) and not p.log else 1.0)
        on_low = found.vector[j] - problem.lower[j] <= near
        on_high = not on_low and problem.upper[j] - found.vector[j] <= near
        at_low = np.isfinite(low) and i.low <= low + 1e-6 * abs(low)
        at_high = np.isfinite(high) and i.high >= high * (1 - 1e-6)
        may_be_nil = is_linear and low == 0.0 and (on_low or (at_low and i.high > 0))
        alone = _exponents_of(problem, j) if may_be_nil else set()  # nil has no exponent
        if not is_linear and (at_low or at_high):
            kind, number, unknown = "reaches_bound", low if at_low else high, {p.name}
            text = f"{p.name} is not identified: its interval reaches the bound {number:g}."
        elif may_be_nil and at_low and i.high > 0:
            kind, number, unknown = "from_above", i.high, alone
            text = f"{p.name} has only an upper bound: the data allow any value from 0 to {human(i.high, 4)}."
        elif i.low > 0 and i.high / i.low > (WIDE_FACTOR if is_linear else WIDE_EXPONENT_FACTOR):
            kind, number, unknown = "factor", i.high / i.low, {p.name} | alone
            text = f"{p.name} is known only within a factor of {human(number)}."
        elif on_low or on_high:
            end, number = ("lower", low) if on_low else ("upper", high)
            kind, unknown = f"{end}_bound", alone if is_linear else {p.name}
            text = f"{p.name} lies on its {end} bound {number:g}."
        else:
            continue
        yield Flag(kind=kind, subject=p.name, number=number, text=text), unknown


def _exponents_of(problem: Problem, j: int) -> set[str]:
    """Name the non-linear parameters that enter basis function j alone."""
    start, middle = problem.num_linear, np.ones(len(problem.lower))
    middle[start:] = (problem.lower + problem.upper)[start:] / 2
    moved = np.vstack([middle, middle + 1e-3 * np.eye(len(middle))[start:]])
    follows = np.array([np.any(g != g[:1], axis=1)[1:] for g in np.broadcast_arrays(*problem.basis(moved))])
    alone = follows[j] & (follows.sum(axis=0) == 1)
    return {p.name for p, is_alone in zip(problem.law.nonlinear, alone, strict=True) if is_alone}


def _variables(problem: Problem, points: Observations) -> Iterator[tuple[Flag, set[str]]]:
    """Flag variables that move together; with the parameters that are unknown for it."""
    for a, b in itertools.combinations(points.x, 2):
        r, both = float(np.corrcoef(np.log(points.x[a]), np.log(points.x[b]))[0, 1]), f"{a} and {b}"
        if abs(r) > SAME_VARIABLE and len(points.x) == 2:
            # What is left to tell them apart is the law's own curvature, which noise imitates.
            unknown = set[str]().union(*(_exponents_of(problem, j) for j in range(problem.num_linear)))
            text = f"{both} grow in one proportion, so neither exponent is identified."
            yield Flag(kind="one_variable", subject=both, number=r, text=text), unknown
        elif abs(r) > 0.98:
            text = f"{both} grow together (correlation of logarithms {r:.3f}), so their exponents trade off."
            yield Flag(kind="collinear", subject=both, number=r, text=text), set()


def _outliers(found: Estimate, points: Observations) -> Iterator[Flag]:
    """Flag points whose residual lies far beyond the others'."""
    r = found.problem.residual(found.vector)
    scale = max(1.4826 * float(np.median(np.abs(r - np.median(r)))), found.components.point, SMALLEST_DELTA)
    if num := int(np.sum(np.abs(r) > OUTLIER_SCALES * scale)):
        row = str(points.index[int(np.argmax(np.abs(r)))])
        text = f"{num} points lie beyond {OUTLIER_SCALES:g} robust standard deviations (farthest: row {row})."
        yield Flag(kind="outliers", subject=row, number=float(num), text=text)


def blind_flags(groups: Groups) -> Iterator[Flag]:
    """Flag kinds of groups that are too few to tell the error that their points share (`visible_groups`)."""
    for name in groups.unseen:
        text = f"Too few {name} to estimate the error that points of one share; intervals assume that there is none."
        yield Flag(kind="unseen", subject=name, text=text)
    for name in groups.few:
        num = groups.counts[name]
        text = f"Only {num} {name}: these rows cannot tell whether the points of one share an error; where they do, "
        text += "95 % intervals contain the truth in only 85 to 92 % of tables."
        yield Flag(kind="few_groups", subject=name, number=num, text=text)


def lack_of_fit(found: Estimate, points: Observations, rows: pd.DataFrame) -> tuple[Flag, ...]:
    """Collect flags against a law; `rows` are the table's of the fitted points (n,)."""
    return (*_form(found, points, rows), *_experiments(found, rows))


def _form(found: Estimate, points: Observations, rows: pd.DataFrame) -> Iterator[Flag]:
    """Test residuals against the scatter of replicates, which agree in the law's variables and every setting but the
    seed, else for squares and products of the variables' logarithms."""
    both = pd.DataFrame({f"x {v}": numbers_of_values(values) for v, values in points.x.items()}, index=rows.index)
    both = both.join(rows[held_equal(rows, ("seed", *points.columns.values()))])
    cells = both.groupby(list(both), dropna=False).ngroup().to_numpy()
    num = int(cells.max()) + 1
    keep = np.flatnonzero(np.isin(cells, spaced(num, max(1, num * MOST_POINTS // len(cells)))))
    kind, named = "scatter", pd.get_dummies(cells[keep])
    if not found.design.x.shape[1] < named.shape[1] < len(keep):
        kind, named = "pattern", _patterns({v: values[keep] for v, values in points.x.items()})
    if (test := extra_columns_test(found, named, keep)) and test[1] <= ALARM:
        f, p, excess, *degrees = test
        each = {str(name): extra_columns_test(found, named[[name]], keep) for name in named if kind == "pattern"}
        subject = max(each, key=lambda name: each[name] or (0.0,), default="")
        off = 100 * excess / float(np.sqrt(np.sum(found.design.weights[keep])))
        why = f", and the misfit follows {subject} " if subject else ", more than repeated runs differ "
        text = f"The points lie {off:.2g} % off the law{why}({p_value(p)})."
        yield Flag(kind=kind, subject=subject, number=off, p=p, more=(f, *degrees), text=text)


def _patterns(x: Mapping[str, Array]) -> pd.DataFrame:
    """Return squares and products of the variables' standardised logarithms, in columns called after them."""
    plain = {f"ln {name}": np.log(v) for name, v in x.items() if np.all(v > 0) and np.ptp(v) > 0}
    logs = {name: (v - v.mean()) / v.std() for name, v in plain.items()}
    pairs = itertools.combinations_with_replacement(logs, 2)
    return pd.DataFrame({f"{a} x {b}" if a != b else f"{a} squared": logs[a] * logs[b] for a, b in pairs})


def _experiments(found: Estimate, rows: pd.DataFrame) -> Iterator[Flag]:
    """Test whether rows that differ in a column which may tell experiments apart lie on one law."""
    names, keep = experiment_columns(rows), spaced(len(rows), MOST_POINTS)
    for name in names:
        codes = pd.factorize(rows[name].map(str))[0]
        test = extra_columns_test(found, pd.get_dummies(codes[keep]), keep) if codes.max() < MAX_GROUPS else None
        if test and test[1] <= ALARM / len(names):
            off = 100 * float(np.ptp(np.bincount(codes, found.residual) / np.bincount(codes)))
            column, told = their_name(rows, name), p_value(test[1])
            text = f"Rows with different {column} differ by up to {off:.2g} % ({told}), so no one law fits them; "
            text += f"choose one by {option('where')}."
            yield Flag(kind="experiments", subject=column, number=off, p=test[1], text=text)


def extra_columns_test(
    found: Estimate, table: pd.DataFrame, keep: Array
) -> tuple[float, float, float, int, int] | None:
    """Run an F-test of some points' residuals for the columns of a table (n, m) beside the law's derivatives.

    F = (|A' r|^2 / a) / (|B' r|^2 / b): A is a basis of what the columns span beyond the derivatives, B of what both
    leave, r and all columns are scaled by the roots of the weights.

    Returns:
        F, its probability, the root of the sum of squares above that the mean square below does not explain, a and b;
        None where either is 0.
    """
    if table.empty:
        return None
    root = np.sqrt(found.design.weights[keep])[:, None]
    known, unit = basis_of(found.design.x[keep] * root), table.to_numpy(float) * root
    unit = unit / np.linalg.norm(unit, axis=0)
    above = basis_of(unit - known @ (known.T @ unit), least=HARDLY)
    a, b = above.shape[1], len(keep) - known.shape[1] - above.shape[1]
    if a < 1 or b < 1:
        return None
    both, residual = np.column_stack([known, above]), found.residual[keep] * root[:, 0]
    squares = float(np.sum((residual @ above) ** 2))
    noise = max(float(residual @ residual - np.sum((residual @ both) ** 2)) / b, 1e-300)
    covariance = found.components.covariance(found.groups.rows(keep), len(keep)) * root * root.T
    through = covariance @ both
    inner = both.T @ through
    own = inner[-a:, -a:]
    traces = np.array([np.trace(own), np.trace(covariance) - np.trace(inner)])
    of_squares = np.array([np.sum(own**2), np.sum(covariance**2) - 2 * np.sum(through**2) + np.sum(inner**2)])
    f = squares / a / noise
    p = f_probability(f, np.array([a, b]), traces, of_squares)
    return f, p, float(np.sqrt(max(0.0, squares - a * noise))), a, b


def f_probability(f: float, sizes: Array, traces: Array, of_squares: Array) -> float:
    """Return the probability that a ratio of mean squares of so many normal variables (2,) exceeds f, by the traces
    (2,) of their covariances and of the squares of these: of independent ones it is Fisher's; else each is taken for a
    scaled chi-squared (Box 1954)."""
    expected = np.divide(*(traces / sizes))
    return float(fisher.sf(f / expected, *(traces**2 / of_squares)))
