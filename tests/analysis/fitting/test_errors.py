"""The sandwich against statsmodels' and Student's, degrees of freedom that follow the design, components, groups."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

from aimscale.analysis import fit, laws
from aimscale.analysis.fitting.errors import components_of, sandwich
from aimscale.analysis.fitting.groups import Groups, groups_of, with_spread


def line(sizes: int, runs: int, points: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Design of a straight line in a covariate that sizes share, with numbers of sizes and runs."""
    size = np.repeat(np.arange(sizes), runs * points)
    run = np.repeat(np.arange(sizes * runs), points)
    return np.column_stack([np.ones(len(size)), size - size.mean()]), size, run


def residual_of(design: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    root = np.sqrt(weights)
    return y - design @ np.linalg.lstsq(design * root[:, None], y * root, rcond=None)[0]


def test_the_variance_is_cr2_by_its_definition_whatever_the_weights():
    rng = np.random.default_rng(0)
    design, size, _ = line(6, 1, 4)
    design = np.column_stack([design, rng.standard_normal(24)])
    weights = rng.uniform(0.5, 2, 24)
    residual = residual_of(design, rng.standard_normal(24), weights)
    root = np.sqrt(weights)
    x, e = design * root[:, None], residual * root
    bread = np.linalg.inv(x.T @ x)
    left = np.eye(24) - x @ bread @ x.T
    meat, halves = np.zeros((3, 3)), []
    for g in range(6):
        at = size == g
        values, vectors = np.linalg.eigh(left[np.ix_(at, at)])
        a = vectors / np.sqrt(values) @ vectors.T
        meat += np.outer(x[at].T @ a @ e[at], x[at].T @ a @ e[at])
        halves.append(left[:, at] @ a @ x[at] @ bread)
    found = sandwich(design, residual, weights, size)
    np.testing.assert_allclose(found.to_params @ found.covariance @ found.to_params.T, bread @ meat @ bread, rtol=1e-8)
    columns = np.stack([half[:, 1] for half in halves], axis=1)  # of the slope
    eigenvalues = np.linalg.eigvalsh(columns.T @ columns)
    _, degrees = found.of_contrasts(np.array([[0.0, 1.0, 0.0]]))
    assert degrees[0] == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum())


def _falling(x, t):
    return 1.0, -x["L"]


def test_points_alone_give_the_exact_t_interval_and_sizes_that_of_their_means():
    rng = np.random.default_rng(1)
    x = np.linspace(1, 2, 12)
    df = pd.DataFrame({"L": x, "acc": 0.9 - 0.3 * x + 0.01 * rng.standard_normal(12)})
    linear = (laws.free("c"), laws.free("s"))
    law = laws.Law(name="line", formula="acc = c - s L", variables=("L",), linear=linear, nonlinear=(), basis=_falling)
    result = fit(law, df, y="acc", objective="lsq", resamples=20000)
    residual = result.data["residual"].to_numpy()
    half = student.ppf(0.975, 10) * np.sqrt(np.sum(residual**2) / 10 / np.sum((x - x.mean()) ** 2))
    i = result.intervals["s"]
    assert (i.high - i.low) / 2 == pytest.approx(half, rel=0.25)  # HC2 holds without equal variances
    design, size, _ = line(8, 1, 20)
    y = 3.0 * rng.standard_normal(8)[size] + 0.1 * rng.standard_normal(160)
    found = sandwich(design, residual_of(design, y, np.ones(160)), np.ones(160), size)
    (se,), (degrees,) = found.of_contrasts(np.array([[1.0, 0.0]]))
    assert degrees == pytest.approx(7, abs=1.5)
    wide = np.percentile(np.abs(found.draws(20000, rng)[:, 0]), 95) / (student.ppf(0.975, degrees) * se)
    assert 0.95 < wide < 1.25  # a draw that deviates in the slope, too, has its fewer degrees of freedom


def test_components_are_those_that_made_the_table():
    rng, found = np.random.default_rng(5), []
    design, size, run = line(12, 3, 4)
    groups = Groups(sizes=size, runs=run)
    for _ in range(200):
        y = 0.5 * rng.standard_normal(12)[size] + 0.3 * rng.standard_normal(36)[run] + 0.2 * rng.standard_normal(144)
        found.append(components_of(design, residual_of(design, y, np.ones(144)), np.ones(144), groups))
    variances = np.mean([[c.size**2, c.run**2, c.point**2] for c in found], axis=0)
    assert variances == pytest.approx([0.25, 0.09, 0.04], rel=0.1)
    errors = found[0].simulate(np.ones(144), groups, 2000, rng)
    assert np.corrcoef(errors[:, 0], errors[:, 1])[0, 1] > np.corrcoef(errors[:, 0], errors[:, 143])[0, 1] + 0.5


def test_groups_are_told_from_the_table_and_only_where_they_show():
    n = np.repeat([1e5, 1e6, 1e7], 4)
    rows = pd.DataFrame({"run_id": [f"r{i // 2}" for i in range(12)]})
    found = groups_of(rows, {"N": n})
    assert found.counts == {"sizes": 3, "runs": 6}
    assert groups_of(rows.assign(run_id=range(12)), {"N": n}).runs is None
    assert groups_of(rows.assign(run_id=np.repeat(["a", "b", "c"], 4)), {"N": n}).runs is None  # runs that are sizes
    assert groups_of(rows[[]], {"N": n}).counts == {"sizes": 3}
    bent = np.column_stack([np.ones(12), np.log(n), np.log(n) ** 2])
    left, unseen = with_spread(found, bent)
    assert (left.sizes, unseen) == (None, ("sizes",))
    assert left.runs is not None


def test_too_few_sizes_are_said(grid):
    small = grid[grid["params_total"] < 4e5]
    result = fit(laws.CHINCHILLA, small.assign(run_id=small["size"]), fixed={"E": 0.2}, resamples=50)
    assert ("unseen", "sizes") in [(flag.kind, flag.subject) for flag in result.flags]
    assert result.groups.counts == {}
