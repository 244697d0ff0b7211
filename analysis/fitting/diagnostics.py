"""Flags of a fit: parameters that are not known, variables that move together, outliers, and what speaks against a law.

Parameters that can move along the null space of the law's Jacobian are not identified, however precise the losses: a
function of D that is seen at two values of D shows one difference, which any exponent explains.

Tests against a law take the estimate's own components of variance for the null: what points of a size, a budget or a
run share is no misfit.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.linalg import null_space

from aimscale.analysis.display import Flag, human, option, p_value, some
from aimscale.analysis.distributions import f_above
from aimscale.analysis.fitting.inference import SMALLEST_DELTA, Estimate, Interval
from aimscale.analysis.fitting.problem import LOG_LSQ, Problem, make_problem
from aimscale.analysis.laws import Array, Law
from aimscale.analysis.table.groups import Groups, basis_of, indicators, planned_scales, scales_of, spaced
from aimscale.analysis.table.points import Points

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
MIN_INDEPENDENT_SHARE = 1e-3
"""Columns of which the law's own derivatives leave less than this share are not tested."""
SAME_VALUE = 0.05
"""Values of a variable are one where they differ by less than this share of the smaller (or of the variable's range,
where that is narrower)."""
NULL_SLOPE = 1e-10
"""A direction of the parameters that moves the law by less than this share of the strongest one does not move it."""
PROBE_STEP, MOVED = 1e-3, 1e-7
"""Step along such a direction, and the relative change of a parameter that counts as following it."""
PLACES = 0.35, 0.65
"""Shares of their ranges, evenly between, that non-linear parameters are set to: any generic interior point will do."""


@dataclass(frozen=True, kw_only=True)
class Misfit:
    """How far points lie off a law, beside their noise."""

    subject: str
    """What was tested: "form", all cells against repeated runs or a smooth pattern, which errors that sizes or budgets
    share do not pass for; or a variable such as N, its scales, for which such errors do pass."""
    off: float
    """Per cent of y by which the law is off beyond noise (root mean square over points)."""
    noise: float
    """Per cent of y by which points scatter that share a scale."""
    f: float
    degrees: tuple[int, int]
    p: float
    """Probability that a true law shows as much."""
    follows: str = ""
    """Term that the misfit of the form follows most."""

    def words(self) -> str:
        """Write how far off, the noise, and the test."""
        return f"{self.off:.2g} % off, noise {self.noise:.2g} % (F = {self.f:.2g}, {p_value(self.p)})"


def diagnose(
    estimate: Estimate,
    params: Collection[str],
    intervals: Mapping[str, Interval],
    points: Points,
    hidden: frozenset[str] = frozenset(),
) -> tuple[tuple[Flag, ...], frozenset[str]]:
    """Collect the flags of a fit, and the reported parameters (of `params`) that it does not identify.

    Args:
        intervals: of reported parameters and of the law's own.
        hidden: parameters that no losses at these scales could identify (`unidentified`).
    """
    law, flags = estimate.problem.law, list[Flag]()
    if names := ", ".join(name for name in params if name in hidden):
        counts = " and ".join(f"{num_values(values)} values of {v}" for v, values in points.x.items())
        text = f"{counts} do not identify {names}, whatever the noise; measure more, or hold one by {option('fix')}."
        flags.append(Flag(kind="few_values", subject=names, text=text))
    of_params, of_variables = [*_parameters(estimate, intervals)], [*_variables(estimate.problem, points)]
    flags += [flag for flag, _ in of_params if flag.subject not in hidden]
    flags += [*(flag for flag, _ in of_variables), *_outliers(estimate, points), *blind_flags(estimate.groups)]
    lost = hidden.union(*(unknown for _, unknown in (*of_params, *of_variables)))
    ends = {name: intervals[name] for name in law.derived if name in intervals}
    lost |= {name for name, i in ends.items() if not i.high - i.low <= WIDE_DERIVED}
    inner = set(law.names) - set(params)  # the law's own coordinates, unknown to the reader
    return tuple(f for f in flags if f.subject not in inner), lost & set(params)


def _parameters(estimate: Estimate, intervals: Mapping[str, Interval]) -> Iterator[tuple[Flag, set[str]]]:
    """Flag parameters on a bound, or whose interval reaches one or spans orders of magnitude, at most once each, with
    those that are not identified for it."""
    problem = estimate.problem
    for j in np.flatnonzero(problem.movable).tolist():
        p, (low, high), is_linear = problem.law.parameters[j], problem.limits(j), j < problem.num_linear
        i, near = intervals[p.name], 1e-6 * (high - low if np.isfinite(high - low) and not p.log else 1.0)
        on_low = estimate.vector[j] - problem.lower[j] <= near
        on_high = not on_low and problem.upper[j] - estimate.vector[j] <= near
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


def _variables(problem: Problem, points: Points) -> Iterator[tuple[Flag, set[str]]]:
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


def outliers(estimate: Estimate, points: Points) -> pd.Index:
    """Find the labels of the points whose residual lies far beyond the others', the farthest first."""
    r = estimate.problem.residual(estimate.vector)
    scale = max(1.4826 * float(np.median(np.abs(r - np.median(r)))), estimate.components.point, SMALLEST_DELTA)
    farthest = np.argsort(-np.abs(r), kind="stable")
    return points.index[farthest[np.abs(r)[farthest] > OUTLIER_SCALES * scale]]


def _outliers(estimate: Estimate, points: Points) -> Iterator[Flag]:
    """Flag them, by their names where the table names runs."""
    if len(labels := outliers(estimate, points)):
        beyond = f"{len(labels)} points lie beyond {OUTLIER_SCALES:g} robust standard deviations"
        text = (
            f"{beyond} ({row_names(points, labels)}); leave them out by {option('drop-outliers')} if they are faulty."
        )
        yield Flag(kind="outliers", subject=str(labels[0]), number=float(len(labels)), text=text)


def row_names(points: Points, labels: pd.Index) -> str:
    """Name rows of the table by number, with their runs where it names them."""
    runs = points.rows.frame.get("run_id")
    named = [str(label) if runs is None else f"{label} ({str(runs[label])[-60:]})" for label in labels]
    return f"row{'s' * (len(named) > 1)} {some(named)}"


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


def misfits(estimate: Estimate, points: Points) -> tuple[Misfit, ...]:
    """Test the form of a law, and each of its variables alone.

    A variable is tested with the other ones' scales taken out, against points that share no error but a run's: if one
    size lies off, all of its points do, whether the law misses it or its run did.
    """
    keep = spaced(len(points), MOST_POINTS)
    x = {v: values[keep] for v, values in points.x.items()}
    scales = {v: scales_of(values) for v, values in x.items()}
    named = {v: pd.get_dummies(codes) for v, codes in scales.items() if 2 * codes.max() < len(keep)}
    runs, budgets = ([estimate.groups[kind][keep]] if kind in estimate.groups else [] for kind in ("runs", "budgets"))
    out = [_form(estimate, points)]
    for v in x:
        groups = (*(scales[w] for w in named if w != v), *(budgets if v == "N" else runs))
        beside = [indicators(codes).toarray() for codes in groups]
        terms = named[v] if v in named else _patterns({v: x[v]})
        out.append(_misfit(v, estimate, terms, keep, beside=beside, shared=("runs",)))
    return tuple(each for each in out if each)


def _misfit(subject: str, estimate: Estimate, table: pd.DataFrame, keep: Array, **options: Any) -> Misfit | None:
    if (test := extra_columns_test(estimate, table, keep, **options)) is None:
        return None
    f, p, excess, a, b, noise = test
    off = 100 * excess / float(np.sqrt(np.sum(estimate.design.weights[keep])))
    return Misfit(subject=subject, off=off, noise=100 * noise, f=f, degrees=(a, b), p=p)


def _form(estimate: Estimate, points: Points) -> Misfit | None:
    """Test residuals against the scatter of replicates, which agree in the law's variables and every setting but the
    seed, else for squares and products of the variables' logarithms."""
    both = pd.DataFrame({f"x {v}": scales_of(values) for v, values in points.x.items()}, index=points.index)
    both = both.join(points.rows[points.rows.held_equal(("seed", *points.columns.values()))])
    cells = both.groupby(list(both), dropna=False).ngroup().to_numpy()
    num = int(cells.max()) + 1
    keep = np.flatnonzero(np.isin(cells, spaced(num, max(1, num * MOST_POINTS // len(cells)))))
    named = pd.get_dummies(cells[keep])
    if estimate.design.x.shape[1] < named.shape[1] < len(keep):
        return _misfit("form", estimate, named, keep)
    named = _patterns({v: values[keep] for v, values in points.x.items()})
    if (whole := _misfit("form", estimate, named, keep)) is None:
        return None
    by_variable = (
        {str(name): _misfit("form", estimate, named[[name]], keep) for name in named} if whole.p <= ALARM else {}
    )
    ratios = {name: test.f for name, test in by_variable.items() if test}
    return replace(whole, follows=max(ratios, key=ratios.__getitem__, default=""))


def lack_of_fit(estimate: Estimate, tests: Iterable[Misfit], points: Points) -> Iterator[Flag]:
    """Flag what speaks against a law."""
    for test in (test for test in tests if test.subject == "form" and test.p <= ALARM):
        what = f", which follows {test.follows}" if test.follows else " beyond seed noise"
        text = f"Lack of fit: {test.off:.2g} %{what} (F = {test.f:.2g}, {p_value(test.p)})."
        kind, more = "pattern" if test.follows else "scatter", (test.f, *test.degrees)
        yield Flag(kind=kind, subject=test.follows, number=test.off, p=test.p, more=more, text=text)
    yield from _experiments(estimate, points)


def _patterns(x: Mapping[str, Array]) -> pd.DataFrame:
    """Return squares and products of the variables' standardised logarithms, in columns called after them."""
    plain = {f"ln {name}": np.log(v) for name, v in x.items() if np.all(v > 0) and np.ptp(v) > 0}
    logs = {name: (v - v.mean()) / v.std() for name, v in plain.items()}
    pairs = itertools.combinations_with_replacement(logs, 2)
    return pd.DataFrame({f"{a} x {b}" if a != b else f"{a} squared": logs[a] * logs[b] for a, b in pairs})


def _experiments(estimate: Estimate, points: Points) -> Iterator[Flag]:
    """Test whether rows that differ in a column which may tell experiments apart lie on one law."""
    rows, keep = points.rows, spaced(len(points), MOST_POINTS)
    names = rows.experiment_columns()
    for name in names:
        codes = pd.factorize(rows[name].map(str))[0]
        test = extra_columns_test(estimate, pd.get_dummies(codes[keep]), keep) if codes.max() < MAX_GROUPS else None
        if test and test[1] <= ALARM / len(names):
            off = 100 * float(np.ptp(np.bincount(codes, estimate.residual) / np.bincount(codes)))
            column, told = rows.called(name), p_value(test[1])
            text = f"Rows with different {column} differ by up to {off:.2g} % ({told}), so no one law fits them; "
            text += f"choose one by {option('where')}."
            yield Flag(kind="experiments", subject=column, number=off, p=test[1], text=text)


def extra_columns_test(
    estimate: Estimate,
    table: pd.DataFrame,
    keep: Array,
    *,
    beside: Sequence[Array] = (),
    shared: Collection[str] | None = None,
) -> tuple[float, float, float, int, int, float] | None:
    """Run an F-test of some points' residuals for the columns of a table (n, m) beside the law's derivatives.

    F = (|A' r|^2 / a) / (|B' r|^2 / b): A is a basis of what the columns span beyond the derivatives, B of what both
    leave, r and all columns are scaled by the roots of the weights.

    Args:
        beside: further columns (n, m) that are taken out with the derivatives.
        shared: kinds of groups whose points share an error where the law is true; None: all.

    Returns:
        F, its probability, the root of the sum of squares above that the mean square below does not explain, a, b, and
        the root of that mean square; None where a or b is 0.
    """
    if table.empty:
        return None
    root = np.sqrt(estimate.design.weights[keep])[:, None]
    law_basis, unit = basis_of(np.column_stack([estimate.design.x[keep], *beside]) * root), table.to_numpy(float) * root
    unit = unit / np.linalg.norm(unit, axis=0)
    above = basis_of(unit - law_basis @ (law_basis.T @ unit), least=MIN_INDEPENDENT_SHARE)
    a, b = above.shape[1], len(keep) - law_basis.shape[1] - above.shape[1]
    if a < 1 or b < 1:
        return None
    both, residual = np.column_stack([law_basis, above]), estimate.residual[keep] * root[:, 0]
    squares = float(np.sum((residual @ above) ** 2))
    noise = max(float(residual @ residual - np.sum((residual @ both) ** 2)) / b, 1e-300)
    groups = Groups({k: codes for k, codes in estimate.groups.items() if shared is None or k in shared}).rows(keep)
    covariance = (
        (estimate.components.covariance(groups, len(keep)) + SMALLEST_DELTA**2 * np.eye(len(keep))) * root * root.T
    )
    through = covariance @ both
    inner = both.T @ through
    inner_above = inner[-a:, -a:]
    traces = np.array([np.trace(inner_above), np.trace(covariance) - np.trace(inner)])
    of_squares = np.array([np.sum(inner_above**2), np.sum(covariance**2) - 2 * np.sum(through**2) + np.sum(inner**2)])
    f = squares / a / noise
    p = f_probability(f, np.array([a, b]), traces, of_squares)
    return f, p, float(np.sqrt(max(0.0, squares - a * noise))), a, b, float(np.sqrt(noise))


def f_probability(f: float, sizes: Array, traces: Array, of_squares: Array) -> float:
    """Return the probability that a ratio of mean squares of so many normal variables (2,) exceeds f, by the traces
    (2,) of their covariances and of the squares of these: of independent ones it is Fisher's; else each is taken for a
    scaled chi-squared (Box 1954)."""
    expected = np.divide(*(traces / sizes))
    return float(f_above(f / expected, *(traces**2 / of_squares)))


def unidentified(law: Law, x: Mapping[str, Array], held: Collection[str] = ()) -> frozenset[str]:
    """Find the parameters, reported and derived ones included, that measurements at scales (n,) cannot tell; those
    `held` at a value are known."""
    cells = np.unique([_rounded(np.asarray(x[v], float)) for v in law.variables], axis=1)
    problem = make_problem(law, dict(zip(law.variables, cells, strict=True)), np.ones(cells.shape[1]), LOG_LSQ)
    vector, p = np.ones(len(problem.lower)), problem.num_linear
    vector[p:] = problem.lower[p:] + np.linspace(*PLACES, len(vector) - p) * (problem.upper - problem.lower)[p:]
    movable = np.array([name not in held for name in law.names])
    jacobian = problem.predict_and_jacobian(vector)[1][movable].T
    size = np.linalg.norm(jacobian, axis=0)
    size = np.where(size > 0, size, 1.0)
    lost: set[str] = set()
    for direction in null_space(np.linalg.qr(jacobian / size, mode="r"), rcond=NULL_SLOPE).T / size:
        step = np.zeros(len(vector))
        step[movable] = PROBE_STEP * direction / np.abs(direction).max()
        params = problem.params_of(np.stack([vector - step, vector + step]))
        for name, (low, high) in law.quantities(params).items():
            if not abs(high - low) <= MOVED * (abs(high) + abs(low)):
                lost.add(name)
    return frozenset(lost - set(held))


def num_values(values: Array) -> int:
    """Count the different values of a variable (n,); those within a few per cent are one."""
    return len(np.unique(_rounded(np.asarray(values, float))))


def _rounded(values: Array) -> Array:
    """Replace each value (n,) by the lowest of those that are the same as it, or of its scale (`planned_scales`)."""
    if np.all(values > 0) and (planned := planned_scales(values)) is not None:
        lowest = np.full(planned[0].max() + 1, np.inf)
        np.minimum.at(lowest, planned[0], values)
        values = lowest[planned[0]]
    order = np.unique(values)
    kept, within = order[:1], SAME_VALUE * np.minimum(np.abs(order), np.ptp(order))
    while len(beyond := order[order > kept[-1] + within[np.searchsorted(order, kept[-1])]]):
        kept = np.append(kept, beyond[0])
    return kept[np.searchsorted(kept, values, side="right") - 1]
