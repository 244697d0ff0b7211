"""Variance components against statsmodels' REML, degrees of freedom that follow the evidence, groups by one rule."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

from aimscale.analysis import fit, laws
from aimscale.analysis.coverage.designs import Design, measured
from aimscale.analysis.inference.groups import groups_of, with_spread
from aimscale.analysis.inference.mixed import mixed_model, simulated_errors


def line(sizes: int, runs: int, points: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Design of a straight line in a covariate that sizes share, with numbers of sizes and runs."""
    size = np.repeat(np.arange(sizes), runs * points)
    run = np.repeat(np.arange(sizes * runs), points)
    return np.column_stack([np.ones(len(size)), size - size.mean()]), size, run


def test_components_are_those_of_statsmodels_reml():
    statsmodels = pytest.importorskip("statsmodels.formula.api")
    rng = np.random.default_rng(5)
    design, size, run = line(12, 3, 4)
    y = design @ [1.0, 0.1] + 0.5 * rng.standard_normal(12)[size] + 0.3 * rng.standard_normal(36)[run]
    y = y + 0.2 * rng.standard_normal(len(y))
    df = pd.DataFrame({"y": y, "x": design[:, 1], "size": size, "run": run})
    theirs = statsmodels.mixedlm("y ~ x", df, groups="size", vc_formula={"run": "0 + C(run)"}, re_formula="1").fit()
    estimate = np.linalg.lstsq(design, y, rcond=None)[0]
    ours = mixed_model(design, y - design @ estimate, np.ones(len(y)), size, run, num_draws=4000, rng=rng).estimated
    assert ours.size**2 == pytest.approx(float(theirs.cov_re.iloc[0, 0]), rel=0.25)  # the grid is that coarse
    assert ours.run**2 == pytest.approx(float(theirs.vcomp[0]), rel=0.25)
    assert ours.point**2 == pytest.approx(theirs.scale, rel=0.02)


def test_degrees_of_freedom_are_those_of_points_or_of_sizes():
    rng = np.random.default_rng(0)
    design, size, _ = line(8, 1, 20)
    for shared, spare in ((0.0, None), (3.0, 8 - 2)):
        y = shared * rng.standard_normal(8)[size] + 0.1 * rng.standard_normal(160)
        estimate = np.linalg.lstsq(design, y, rcond=None)[0]
        found = mixed_model(design, y - design @ estimate, np.ones(160), size, None, num_draws=20000, rng=rng)
        half = np.percentile(np.abs(found.shift[:, 1]), 95)
        if spare is None:
            assert half < 2 * student.ppf(0.975, 158) * 0.1 / np.sqrt(np.sum(design[:, 1] ** 2))
        else:
            means = np.bincount(size, y) / 20
            x = np.unique(design[:, 1])
            rest = means - np.polyval(np.polyfit(x, means, 1), x)
            exact = student.ppf(0.975, spare) * np.sqrt(np.sum(rest**2) / spare / np.sum(x**2))
            assert half == pytest.approx(exact, rel=0.05)
            assert found.degrees == pytest.approx(spare, abs=1.5)


def test_few_draws_do_not_make_degrees_of_freedom():
    rng = np.random.default_rng(0)
    design = np.column_stack([np.ones(12), np.arange(12.0)])
    found = [
        mixed_model(design, rng.standard_normal(12), np.ones(12), None, None, num_draws=5, rng=rng) for _ in range(20)
    ]
    assert max(each.degrees for each in found) <= 10


def test_points_alone_give_the_exact_t_interval():
    rng = np.random.default_rng(1)
    x = np.linspace(1, 2, 12)
    df = pd.DataFrame({"L": x, "acc": 0.9 - 0.3 * x + 0.01 * rng.standard_normal(12)})
    result = fit(laws.LINK_LINEAR, df, y="acc", objective="lsq", resamples=20000)
    residual = result.data["residual"].to_numpy()
    half = student.ppf(0.975, 10) * np.sqrt(np.sum(residual**2) / 10 / np.sum((x - x.mean()) ** 2))
    i = result.intervals["s"]
    assert (i.high - i.low) / 2 == pytest.approx(half, rel=0.03)
    assert "mixed model (REML) of errors of points" in i.method


def test_simulated_errors_share_what_their_groups_share():
    rng = np.random.default_rng(2)
    design, size, run = line(6, 2, 3)
    y = rng.standard_normal(6)[size] + 0.1 * rng.standard_normal(36)
    drawn = mixed_model(design, y, np.ones(36), size, run, num_draws=2000, rng=rng).drawn
    errors = simulated_errors(drawn, np.ones(36), size, run, rng)
    assert np.corrcoef(errors[:, 0], errors[:, 1])[0, 1] > np.corrcoef(errors[:, 0], errors[:, 35])[0, 1] + 0.5


def test_groups_are_told_from_the_table_and_only_where_they_show():
    n = np.repeat([1e5, 1e6, 1e7], 4)
    rows = pd.DataFrame({"run_id": [f"r{i // 2}" for i in range(12)]})
    found = groups_of(rows, {"N": n})
    assert found.words == "errors of 3 sizes, 6 runs and points"
    assert groups_of(rows.assign(run_id=range(12)), {"N": n}).runs is None
    assert groups_of(rows.assign(run_id=np.repeat(["a", "b", "c"], 4)), {"N": n}).runs is None  # runs that are sizes
    assert groups_of(rows[[]], {"N": n}).words == "errors of 3 sizes and points"
    bent = np.column_stack([np.ones(12), np.log(n), np.log(n) ** 2])
    left, unseen = with_spread(found, bent)
    assert (left.sizes, unseen) == (None, ("sizes",))
    assert left.runs is not None


def test_too_few_sizes_are_said(grid):
    small = grid[grid["params_total"] < 4e5]
    result = fit(laws.CHINCHILLA, small.assign(run_id=small["size"]), fixed={"E": 0.2}, resamples=50)
    assert any(flag.startswith("There are too few sizes to see the errors") for flag in result.flags)
    assert "errors of points" in result.interval_method


def test_an_outlier_neither_ruins_the_default_nor_makes_it_forget_the_mean(grid):
    truth = fit(laws.CHINCHILLA, grid, objective="log_lsq", resamples=0)
    assert fit(laws.CHINCHILLA, grid, resamples=0).params["alpha"] == pytest.approx(truth.params["alpha"], abs=0.01)
    grid.loc[17, "val_loss"] *= 1.3
    robust = fit(laws.CHINCHILLA, grid, resamples=300)
    squares = fit(laws.CHINCHILLA, grid, objective="log_lsq", resamples=0)
    assert abs(robust.params["alpha"] - 0.4) < 0.03 < abs(squares.params["alpha"] - 0.4)
    assert robust.intervals["alpha"].low < 0.4 < robust.intervals["alpha"].high
    assert robust.intervals["alpha"].high - robust.intervals["alpha"].low < 0.2
    assert "squares up to 2 robust standard deviations (delta" in robust.objective.label


def test_weights_enter_prediction_intervals(grid):
    grid["weight"] = np.where(grid.index % 2 == 0, 1.0, 25.0)
    rng = np.random.default_rng(0)
    clean = 0.2 + 30 * grid["params_total"] ** -0.4 + 40 * grid["images_seen"] ** -0.5
    grid["val_loss"] = clean * np.exp(0.01 * rng.standard_normal(30) / np.sqrt(grid["weight"]))
    for intervals in ("mixed", "bootstrap"):
        result = fit(laws.CHINCHILLA, grid, objective="log_lsq", weights="weight", resamples=1000, intervals=intervals)
        rows = pd.DataFrame({"N": [1e6, 1e6], "D": [1e6, 1e6], "weight": [1.0, 25.0]})
        width = (lambda p: p["pi_hi"] - p["pi_lo"])(result.predict(rows))
        assert width[0] > 2 * width[1]


@pytest.mark.parametrize("errors", ["independent", "run"])
def test_a_law_that_does_not_fit_makes_no_errors_of_sizes(errors):
    design = Design(sizes=7, budgets=4, seeds=3, errors=errors)
    scales, rng = design.scales(), np.random.default_rng(8)
    n, d = (np.log(scales[v]) - np.log(scales[v]).mean() for v in ("N", "D"))
    for _ in range(5):
        df = measured(scales, errors, rng)
        df["loss"] *= np.exp(0.006 * n * d / (n.std() * d.std()))  # no term of the law does that
        result = fit(laws.CHINCHILLA, df, y="loss", resamples=200)
        assert result.errors.estimated.size < 0.02  # 0.04 before, four times what the table scatters
        assert not {"alpha", "beta"} & result.not_identified
        assert "The law does not fit" in " ".join(result.flags)
        assert ("scales" in result.interval_method) == (errors == "independent")


def test_seeds_that_share_the_laws_departure_are_not_taken_for_independent():
    rng = np.random.default_rng(0)
    once = pd.DataFrame({"D": np.geomspace(1e3, 1e6, 10)})
    once["loss"] = (1 + 40 * once["D"] ** -0.5) * np.exp(0.02 * rng.standard_normal(10))
    seeds = [once.assign(seed=s, run_id=f"r{s}-" + once.index.astype(str)) for s in range(4)]
    df = pd.concat(seeds, ignore_index=True)
    df["loss"] *= np.exp(0.002 * rng.standard_normal(40))
    power = laws.find_law("power_offset:D")
    four, one = (fit(power, each, y="loss", resamples=1000) for each in (df, df[df["seed"] == 0]))
    width = [fitted.intervals["a"].high - fitted.intervals["a"].low for fitted in (four, one)]
    assert width[0] > 0.7 * width[1]  # half of it if forty points counted
    assert "10 scales and points" in four.interval_method
