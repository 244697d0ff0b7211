"""What speaks against a fitted law.

More scatter than replicates have, patterns in residuals, exponents that hang on the smallest scale, a size that lies
off the law fitted without it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
from scipy.stats import t as student

from aimscale.analysis.fitting.intervals import Draws, linearised, pseudo_residual, residual_of
from aimscale.analysis.fitting.optimise import Problem, minimise
from aimscale.analysis.inference.groups import Groups, groups_of, with_spread
from aimscale.analysis.inference.lackoffit import pattern_test, replicate_test
from aimscale.analysis.inference.mixed import mixed_model, simulated_errors
from aimscale.analysis.laws.base import Array
from aimscale.analysis.table.points import Observations

ALARM = 0.01
"""A test is told of at this probability or less."""
FAMILY_ALARM = 0.05
"""Probability that any size of a sound table is named."""
BLIND_THRESHOLD = 6.0
"""Where too few sizes are left to know their spread, one must lie this many standard deviations of points off."""
MAX_SIZES = 30
"""More sizes than this are not left out one by one: each alone hardly matters."""


def lack_of_fit_flags(
    problem: Problem, vector: Array, drawn: Draws, points: Observations, rows: pd.DataFrame, seed: int
) -> tuple[str, ...]:
    """Sentences against a fit with a mixed model of its errors; none where nothing speaks against it."""
    if drawn.mixed is None:
        return ()
    weights = problem.weights
    residual = pseudo_residual(problem.objective, residual_of(problem, vector), weights)
    jacobian = linearised(problem, vector)
    rng = np.random.default_rng([seed, 5])
    groups = drawn.groups
    errors = simulated_errors(drawn.mixed.drawn, weights, groups.sizes, groups.runs, rng)
    return (
        *_form(residual, jacobian, weights, points, drawn, errors, rng),
        *_smallest(problem, vector, points, errors),
        *size_flags(problem, vector, points, rows),
    )


def _form(
    residual: Array,
    jacobian: Array,
    weights: Array,
    points: Observations,
    drawn: Draws,
    errors: Array,
    rng: np.random.Generator,
) -> list[str]:
    """Lack of fit against replicates, else patterns."""
    assert drawn.mixed is not None
    cells = np.unique(
        np.round(np.log(np.array([v + 1e-300 for v in points.x.values()])), 9), axis=1, return_inverse=True
    )
    own = None
    if drawn.groups.runs is not None and not drawn.groups.departs:
        # what all points of a size or a scale share is no noise of replicates but lack of fit: the null is without it
        components = replace(drawn.mixed.drawn, size=np.zeros_like(drawn.mixed.drawn.size))
        own = simulated_errors(components, weights, None, drawn.groups.runs, rng)
    found = replicate_test(residual, jacobian, weights, np.ravel(cells[1]), own)
    if found is not None:
        if found.p_value > ALARM:
            return []
        return [
            f"The law does not fit: its residuals scatter more than replicate seeds do (F = {found.statistic:.3g} with "
            f"{found.degrees[0]} and {found.degrees[1]} degrees of freedom, p {_shown(found.p_value)})."
        ]
    found = pattern_test(residual, jacobian, weights, points.x, errors)
    if found is None or found.p_value > ALARM:
        return []
    return [
        f"The law does not fit: its residuals follow {found.pattern} (F = {found.statistic:.3g} with "
        f"{found.degrees[0]} and {found.degrees[1]} degrees of freedom, p {_shown(found.p_value)})."
    ]


def _shown(p: float) -> str:
    return f"= {p:.1g}" if p > 2e-3 or p < 9e-4 else "< 0.002"


def _smallest(problem: Problem, vector: Array, points: Observations, errors: Array) -> list[str]:
    """Exponents that move more than they should when the smallest value of a variable is left out."""
    kept = {}
    for v, values in points.x.items():
        keep = values > values.min() * (1 + 1e-9)
        if len(np.unique(values[keep])) > 2 and keep.sum() > problem.movable.sum() + 2:
            kept[v] = keep
    if not kept:
        return []
    masks = np.array(list(kept.values()))
    vectors, _ = minimise(problem, np.repeat(vector[None], len(masks), axis=0), masks * problem.weights)
    influence = _influence(problem, vector, problem.weights)
    free = np.flatnonzero(problem.movable)
    out = []
    for (v, keep), moved in zip(kept.items(), vectors, strict=True):
        usual = errors @ (_influence(problem, vector, problem.weights * keep) - influence).T
        for place, j in enumerate(free):
            if j < problem.num_linear:
                continue
            shift = moved[j] - vector[j]
            p = (1 + np.sum(np.abs(usual[:, place]) >= abs(shift))) / (1 + len(usual))
            if p <= ALARM and abs(shift) > LEAST_MOVE:
                parameter = problem.law.nonlinear[j - problem.num_linear]
                before, after = (np.exp(e[j]) if parameter.log else e[j] for e in (vector, moved))
                out.append(
                    f"{parameter.name} hangs on the smallest {v}: it is {after:.3g} without it and {before:.3g} with "
                    f"it (p {_shown(float(p))})."
                )
    return out


LEAST_MOVE = 0.02
"""A movement of less than 2 % of an exponent is not told, however sure."""


def _influence(problem: Problem, vector: Array, weights: Array) -> Array:
    """Movement (k, n) of the weighted least-squares estimate per unit of error of each point."""
    jacobian = linearised(problem, vector)
    scaled = jacobian * np.sqrt(weights)[:, None]
    return np.linalg.pinv(scaled, rcond=1e-9) * np.sqrt(weights)


def size_flags(problem: Problem, vector: Array, points: Observations, rows: pd.DataFrame) -> list[str]:
    """Sizes that lie off the law fitted without them."""
    table = left_out_sizes(problem, vector, points, rows)
    if table.empty:
        return []
    odd = table[table["deviations"].abs() > table["threshold"]]
    # only the worst: its neighbours may suffer from it
    worst = odd.loc[[odd["deviations"].abs().idxmax()]] if len(odd) else odd
    return [
        f"Size {row['size']} lies {100 * abs(row['off']):.2g} % {'above' if row['off'] > 0 else 'below'} the law "
        f"fitted without it ({abs(row['deviations']):.2g} standard deviations): look at how it was tuned."
        for row in worst.to_dict("records")
    ]


def left_out_sizes(problem: Problem, vector: Array, points: Observations, rows: pd.DataFrame) -> pd.DataFrame:
    """Each size against the law without it: size, off (mean residual of T(y)), deviations (studentised), threshold."""
    groups = groups_of(rows, points.x)
    codes = groups.sizes if groups.sizes is not None else groups.runs
    columns = ["size", "off", "deviations", "threshold"]
    if "N" not in points.x or codes is None or not 4 <= codes.max() < MAX_SIZES:
        return pd.DataFrame(columns=columns)
    num = int(codes.max()) + 1
    masks = codes != np.arange(num)[:, None]
    if masks.sum(axis=1).min() <= problem.movable.sum() + 1:
        return pd.DataFrame(columns=columns)
    vectors, _ = minimise(problem, np.repeat(vector[None], num, axis=0), masks * problem.weights)
    out = []
    for k in range(num):
        residual, jacobian, keep = residual_of(problem, vectors[k]), linearised(problem, vectors[k]), masks[k]
        left, unseen = with_spread(
            Groups(sizes=np.unique(codes[keep], return_inverse=True)[1], runs=None), jacobian[keep]
        )
        weights = problem.weights[keep]
        pseudo = pseudo_residual(problem.objective, residual[keep], weights)
        model = mixed_model(
            jacobian[keep], pseudo, weights, left.sizes, None, num_draws=200, rng=np.random.default_rng(k)
        )
        share = problem.weights * ~keep / np.sum(problem.weights[~keep])
        curve = model.shift @ (share @ jacobian)
        new = model.drawn.size**2 + model.drawn.point**2 * np.sum(share[~keep] ** 2 / problem.weights[~keep])
        sd = np.sqrt((np.median(np.abs(curve)) / 0.6745) ** 2 + np.median(new))
        spare = max(1, num - 1 - 2) if not unseen else int(keep.sum()) - jacobian.shape[1]
        threshold = float(student.ppf(1 - FAMILY_ALARM / 2 / num, spare)) if not unseen else BLIND_THRESHOLD
        name = rows["size"].iloc[np.flatnonzero(~keep)[0]] if "size" in rows else f"N = {points.x['N'][~keep][0]:.3g}"
        off = float(share @ residual)
        out.append({"size": name, "off": off, "deviations": off / max(sd, 1e-300), "threshold": threshold})
    return pd.DataFrame(out, columns=columns)
