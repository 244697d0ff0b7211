"""The sandwich against statsmodels' and Student's, degrees of freedom that follow the design, components, groups."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student
from tables import KNOWN, law_grid

from aimscale.analysis import fit, forecaster, held_out, laws, read_tables
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import (
    Components,
    Covariance,
    components_of,
    half_width,
    linear_design,
    sandwich,
)
from aimscale.analysis.forecasts.candidates import expect
from aimscale.analysis.table.groups import Groups, groups_of, visible_groups
from aimscale.analysis.table.points import KnownErrors
from aimscale.analysis.table.runs import Runs


def line(sizes: int, runs: int, points: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Design of a straight line in a covariate that sizes share, with numbers of sizes and runs."""
    size = np.repeat(np.arange(sizes), runs * points)
    run = np.repeat(np.arange(sizes * runs), points)
    return np.column_stack([np.ones(len(size)), size - size.mean()]), size, run


def residual_of(design: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    root = np.sqrt(weights)
    return y - design @ np.linalg.lstsq(design * root[:, None], y * root, rcond=None)[0]


def test_the_variance_is_cr2_by_its_definition_whatever_the_weights():
    """Weights are no precisions: errors are of one variance, and (I - H)(I - H)' is what residuals have of it."""
    rng = np.random.default_rng(0)
    x, size, _ = line(6, 1, 4)
    x = np.column_stack([x, rng.standard_normal(24)])
    w = rng.uniform(0.2, 3, 24)
    residual = residual_of(x, rng.standard_normal(24), w)
    bread = np.linalg.inv(x.T @ (w[:, None] * x))
    left = np.eye(24) - x @ bread @ x.T * w
    meat, halves = np.zeros((3, 3)), []
    for g in range(6):
        at = size == g
        values, vectors = np.linalg.eigh((left @ left.T)[np.ix_(at, at)])
        a = vectors / np.sqrt(values) @ vectors.T
        score = (w[:, None] * x)[at].T @ a
        meat += np.outer(score @ residual[at], score @ residual[at])
        halves.append(left[at].T @ a @ (w[:, None] * x)[at] @ bread)
    found = sandwich(linear_design(x, w), residual, size)
    np.testing.assert_allclose(Covariance(by={"sizes": found}).matrix, bread @ meat @ bread, rtol=1e-8)
    columns = np.stack([half[:, 1] for half in halves], axis=1)  # of the slope
    eigenvalues = np.linalg.eigvalsh(columns.T @ columns)
    _, degrees = found.of_contrasts(np.array([[0.0, 1.0, 0.0]]))
    assert degrees[0] == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum())


def test_degrees_of_freedom_count_the_errors_that_points_share():
    """T5: five budgets that share .5 % tell less of beta than as many that share nothing."""
    rng = np.random.default_rng(2)
    x, size, run = line(6, 2, 3)
    w = rng.uniform(0.5, 2, 36)
    errors, groups = (
        Components(shared={"sizes": 0.5, "runs": 0.2}, point=0.3, degrees=9.0),
        Groups(sizes=size, runs=run),
    )
    design, contrast = linear_design(x, w), np.array([0.0, 1.0])
    found = sandwich(design, rng.standard_normal(36), size, errors, groups)
    left = np.eye(36) - design.x @ design.weighted.T
    s = found.adjusted @ (contrast @ design.to_params)
    sums = np.stack([np.where(size == g, s, 0.0) for g in range(6)], axis=1)
    p = sums.T @ left @ errors.covariance(groups, 36) @ left.T @ sums
    assert found.of_contrasts(contrast[None])[1][0] == pytest.approx(np.trace(p) ** 2 / np.trace(p @ p))
    alone = sandwich(design, rng.standard_normal(36), size, Components(shared={}, point=0.3, degrees=9.0), Groups())
    assert alone.of_contrasts(contrast[None])[1][0] == pytest.approx(
        sandwich(design, rng.standard_normal(36), size).of_contrasts(contrast[None])[1][0]
    )


def test_the_covariance_of_a_weighted_fit_is_that_of_its_estimates():
    """S1: weights by compute were taken for precisions, and the variance told was .4 to .6 of the true one."""
    rng = np.random.default_rng(3)
    x, size, _ = line(8, 1, 6)
    w = np.exp(size - 4.0)
    design, told, estimates = linear_design(x, w), [], []
    for _ in range(400):
        y = rng.standard_normal(len(w))
        estimates.append(np.linalg.solve(x.T @ (w[:, None] * x), x.T @ (w * y)))
        found = components_of(design, residual_of(x, y, w), Groups())
        told.append([found.point**2, sandwich(design, residual_of(x, y, w), size).of_contrasts(np.eye(2))[0][1] ** 2])
    points, slopes = np.mean(told, axis=0)
    assert points == pytest.approx(1.0, rel=0.05)
    assert slopes == pytest.approx(np.var(estimates, axis=0)[1], rel=0.15)


def _falling(x, t):
    return 1.0, -x["L"]


def test_points_alone_give_the_exact_t_interval_and_sizes_that_of_their_means():
    rng = np.random.default_rng(1)
    x = np.linspace(1, 2, 12)
    df = pd.DataFrame({"L": x, "acc": 0.9 - 0.3 * x + 0.01 * rng.standard_normal(12)})
    linear = tuple(laws.Parameter(name=name, bounds=(-np.inf, np.inf)) for name in ("c", "s"))
    law = laws.Law(name="line", formula="acc = c - s L", variables=("L",), linear=linear, nonlinear=(), basis=_falling)
    result = fit(df, law, y="acc", objective="lsq")
    residual = result.data["residual"].to_numpy()
    half = student.ppf(0.975, 10) * np.sqrt(np.sum(residual**2) / 10 / np.sum((x - x.mean()) ** 2))
    i = result.intervals["s"]
    assert (i.high - i.low) / 2 == pytest.approx(half, rel=0.25)  # HC2 holds without equal variances
    design, size, _ = line(8, 1, 20)
    y = 3.0 * rng.standard_normal(8)[size] + 0.1 * rng.standard_normal(160)
    found = sandwich(linear_design(design, np.ones(160)), residual_of(design, y, np.ones(160)), size)
    _, (degrees,) = found.of_contrasts(np.array([[1.0, 0.0]]))
    assert degrees == pytest.approx(7, abs=1.5)


def test_components_are_those_that_made_the_table():
    rng, found = np.random.default_rng(5), []
    x, size, run = line(12, 3, 4)
    groups = Groups(sizes=size, budgets=np.tile(np.arange(4), 36), runs=run)
    design = linear_design(x, np.ones(144))
    for _ in range(200):
        y = 0.5 * rng.standard_normal(12)[size] + 0.3 * rng.standard_normal(36)[run] + 0.2 * rng.standard_normal(144)
        y += 0.4 * rng.standard_normal(4)[groups["budgets"]]
        found.append(components_of(design, residual_of(x, y, np.ones(144)), groups))
    names = ("sizes", "budgets", "runs")
    variances = np.mean([[*(c.shared[n] ** 2 for n in names), c.point**2] for c in found], axis=0)
    assert variances == pytest.approx([0.25, 0.16, 0.09, 0.04], rel=0.12)


def test_groups_are_told_from_the_table_and_only_where_they_show():
    n = np.repeat([1e5, 1e6, 1e7], 4)
    rows = pd.DataFrame({"run_id": [f"r{i // 2}" for i in range(12)]})
    found = groups_of(rows, {"N": n})
    assert found.counts == {"sizes": 3, "runs": 6}
    assert "runs" not in groups_of(rows.assign(run_id=range(12)), {"N": n})
    assert "runs" not in groups_of(rows.assign(run_id=np.repeat(["a", "b", "c"], 4)), {"N": n})  # runs that are sizes
    assert groups_of(rows[[]], {"N": n}).counts == {"sizes": 3}
    d = np.tile([1e6, 2e6, 4e6, 8e6], 3)
    assert groups_of(rows, {"N": n, "D": d}).counts == {"sizes": 3, "budgets": 4, "runs": 6}
    assert "budgets" not in groups_of(rows, {"N": n, "D": 1e14 / n}), "one budget of compute"
    assert groups_of(rows, {"N": n, "D": np.tile([1e14, 2e14, 4e14, 8e14], 3) / n}).counts["budgets"] == 4
    assert "budgets" not in groups_of(rows, {"N": n, "D": np.exp(np.arange(12.0))})
    bent = np.column_stack([np.ones(12), np.log(n), np.log(n) ** 2])
    left = visible_groups(found, bent)
    assert (set(left), left.unseen) == ({"runs"}, ("sizes",))
    sizes, budgets = np.meshgrid(np.arange(7), np.arange(4))
    law = np.column_stack([np.ones(28), *(v.ravel() ** k for v in (sizes, budgets) for k in (1, 2))])
    seen = visible_groups(Groups(sizes=sizes.ravel(), budgets=budgets.ravel()), law)
    assert (seen.unseen, seen.few) == ((), ("budgets",))


@pytest.mark.parametrize("jitter", [0.0, 0.001, 0.01, 0.03])
def test_rows_of_a_size_or_a_budget_are_told_by_the_grids_own_spacing(jitter):
    """H2: only D equal to 1e-3 and N equal to 1e-9 counted as one; a D rounded by 1 % left 36 % of betas inside."""
    rng = np.random.default_rng(0)
    for axes in ({"sizes": (1e5, 1e7, 7)}, {"sizes": (1e5, 1e7, 9)}):
        df = law_grid(**axes, budgets=(1e5, 3e6, 5))
        for _ in range(20):
            x = {v: (df[v] * np.exp(jitter * rng.standard_normal(len(df)))).to_numpy() for v in ("N", "D")}
            assert groups_of(df[[]], x).counts == {"sizes": axes["sizes"][2], "budgets": 5}
    for num in (20, 35, 100):  # a D of its own for every row, by design
        n = np.tile(np.geomspace(1e5, 1e7, 5), num // 5)
        for _ in range(20):
            x = {"N": n, "D": np.exp(rng.uniform(12, 15, num))}
            assert groups_of(pd.DataFrame(index=range(num)), x).counts == {"sizes": 5}


def test_a_held_out_size_is_all_of_its_rows_however_they_are_rounded():
    rng = np.random.default_rng(0)
    df = law_grid(sizes=(1e5, 1e7, 7), budgets=(1e5, 3e6, 5), noise=0.003, rng=rng)
    df["N"] *= np.exp(0.003 * rng.standard_normal(len(df)))
    assert held_out(fit(df, "chinchilla"), df, by="N").num_test == 5


def test_a_user_names_what_groups_rows(tmp_path):
    df = law_grid(sizes=(1e5, 1e7, 7), budgets=(1e5, 3e6, 5), noise=0.003).assign(series=np.repeat(list("abcaa"), 7))
    assert fit(df).estimate.groups.counts == {"sizes": 7, "budgets": 5}
    assert fit(Runs(df).with_groups({"budgets": "series"})).estimate.groups.counts == {"sizes": 7, "budgets": 3}
    df["D"] *= np.exp(0.001 * np.arange(35))
    assert "budgets" not in fit(Runs(df).with_groups({"budgets": 1e-6})).estimate.groups
    df.to_csv(tmp_path / "theirs.csv", index=False)
    read = read_tables(tmp_path / "theirs.csv", {"L": "val_loss"}, groups={"sizes": "series"}, where=["N>2e5"])
    assert forecaster(read).points.groups.counts["sizes"] == 3
    for wrong in ({"sizes": 3.0}, {"size": "series"}):
        with pytest.raises(AnalysisError, match="sizes or budgets"):
            Runs(df).with_groups(wrong)
    with pytest.raises(AnalysisError, match="serie"):
        fit(Runs(df).with_groups({"sizes": "serie"}))


def test_too_few_sizes_are_said(grid):
    small = grid[grid["params_total"] < 4e5]
    result = fit(small.assign(run_id=small["size"]), laws.CHINCHILLA, fixed={"E": 0.2})
    assert ("unseen", "sizes") in [(flag.kind, flag.subject) for flag in result.flags]
    assert "sizes" not in result.estimate.groups.counts


def test_intervals_hold_where_the_rows_of_a_budget_share_an_error():
    """S0: with sizes alone for clusters, 95 % intervals held beta in 40 % of such tables."""
    rng, held, wide = np.random.default_rng(4), [], []
    truth = laws.CHINCHILLA.reported(KNOWN)
    for shared in (0.005, 0.0):
        for _ in range(25):
            df = law_grid(sizes=(1e5, 1e7, 7), budgets=(1e5, 3e6, 5), noise=0.003, rng=rng)
            codes = np.unique(df["D"], return_inverse=True)[1]
            df["val_loss"] *= np.exp(shared * rng.standard_normal(5))[codes]
            found = fit(df, "chinchilla", is_tested=False).intervals["beta"]
            held.append(found.low < truth["beta"] < found.high)
            wide.append(found.high - found.low)
    assert np.mean(held[:25]) > 0.8
    assert np.mean(held[25:]) > 0.9
    assert np.median(wide[25:]) < 0.7 * np.median(wide[:25])  # no wider than the rows say


def test_no_sum_of_errors_leaves_a_narrower_interval_than_one_of_them():
    """T5: where the errors of two of five budgets' degrees looked small, those of seven sizes lent their degrees."""
    by = {
        "sizes": KnownErrors(loadings=np.array([[1.0], [3.0]]), degrees=50.0),
        "budgets": KnownErrors(loadings=np.array([[1.0], [0.1]]), degrees=2.0),
    }
    alone = half_width(*by["budgets"].of_contrasts(np.eye(2)))
    plain, least = (half_width(*Covariance(by=by, least=names).of_contrasts(np.eye(2))) for names in ((), (*by,)))
    assert plain[0] < 0.95 * alone[0]
    assert least[0] == pytest.approx(alone[0])
    assert least[1] == pytest.approx(plain[1])
    estimate = fit(law_grid(noise=0.003), "chinchilla", is_tested=False).estimate
    assert estimate.covariance.least == ("sizes", "budgets")


def test_nothing_depends_on_a_columns_name_or_the_rows_order(grid):
    """S8: intervals were read from draws whose seed was the loss column's name."""
    plain = fit(grid, "chinchilla")
    other = grid.sample(frac=1, random_state=0).rename(columns={"val_loss": "theirs"})
    moved = fit(other, "chinchilla", y="theirs")
    for name, i in plain.intervals.items():
        assert [moved.intervals[name].low, moved.intervals[name].high] == pytest.approx([i.low, i.high], rel=1e-6)


def test_what_a_forecast_fits_a_user_can_fit(grid):
    """S26: laws are weighted by compute in forecasts, and `fit` took no weights."""
    law = fit(grid, "chinchilla", weights="compute", objective="log_lsq")
    far = {"N": np.array([1e8]), "D": np.array([1e8]), "C": np.array([1e17])}
    of_forecast = forecaster(grid, law="chinchilla").fits["chinchilla"]
    assert np.exp(expect(of_forecast, far)[0]) == pytest.approx(law.predict(far)["value"].to_numpy(), rel=1e-6)
    assert law.estimate.num_runs == pytest.approx(of_forecast.estimate.num_runs)
    assert law.estimate.num_runs < len(grid) / 2
    alike = fit(grid.assign(weight=2.0), "chinchilla", weights="weight")
    assert dict(alike.params) == pytest.approx(dict(fit(grid, "chinchilla").params))
    with pytest.raises(AnalysisError, match="weight"):
        fit(grid.assign(weight=0.0), "chinchilla", weights="weight")
