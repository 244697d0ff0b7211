"""Profiles, influence, choice by prediction, the benchmark: what keeps a fit honest."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from aimscale.analysis import fit, laws
from aimscale.analysis.bench import built_in_table, log_sum_exp_objective, run
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.influences import influence, with_influence_flags
from aimscale.analysis.fitting.profiles import profile, with_profile_flags


def test_profile_of_a_straight_line_is_the_exact_t_interval():
    rng = np.random.default_rng(0)
    x = np.linspace(1, 2, 40)
    df = pd.DataFrame({"L": x, "acc": 0.9 - 0.3 * x + 0.01 * rng.standard_normal(40)})
    result = fit(laws.LINK_LINEAR, df, y="acc", objective="lsq", resamples=200)
    found = profile(result, "s", num=81)
    residual = result.data["residual"].to_numpy()
    half = stats.t.ppf(0.975, 38) * np.sqrt(np.sum(residual**2) / 38 / np.sum((x - x.mean()) ** 2))
    assert found.low == pytest.approx(result.params["s"] - half, rel=2e-3)
    assert found.high == pytest.approx(result.params["s"] + half, rel=2e-3)
    assert found.closed == (True, True)


@pytest.mark.parametrize("objective", ["lsq", "log_lsq", "huber_log", "lad"])
def test_without_noise_every_other_value_is_ruled_out(objective):
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e5, 1e7, 6), np.geomspace(1e5, 3e6, 5)))
    df = pd.DataFrame({"N": n, "D": d, "y": 0.2 + 30 * n**-0.4 + 40 * d**-0.5})
    with np.errstate(all="raise", under="ignore"):
        found = profile(fit("chinchilla", df, y="y", objective=objective, resamples=0), "alpha", num=9)
    assert found.low == pytest.approx(0.4, rel=0.05)
    assert found.high == pytest.approx(0.4, rel=0.05)
    assert found.closed == (True, True)


def test_a_flat_profile_is_said_in_words(grid):
    grid["val_loss"] = 1 + 0.01 * np.random.default_rng(0).standard_normal(len(grid))
    result = with_profile_flags(fit(laws.CHINCHILLA, grid, resamples=0))
    assert "beta" in result.not_identified
    assert any(flag.startswith("beta is not identified: its profile is flat") for flag in result.flags)


def test_a_badly_tuned_rung_is_named(grid):
    bad = grid["size"].unique()[3]
    grid.loc[grid["size"] == bad, "val_loss"] *= 1.1
    result = with_influence_flags(fit(laws.CHINCHILLA, grid, objective="log_lsq", resamples=300), grid)
    table = influence(result, grid).set_index("size")
    assert table.loc[bad, "alpha"] == pytest.approx(0.4, abs=0.05)
    assert table["num_points"].sum() == 30
    clean = fit(laws.CHINCHILLA, grid[grid["size"] != bad], objective="log_lsq", resamples=300)
    noise = replace(result, draws=clean.draws)  # measured in the spread of a clean fit, the rung stands out
    flags = with_influence_flags(noise, grid).flags
    assert any(f"size {bad} " in flag and "the fit hinges on it" in flag for flag in flags)
    with pytest.raises(AnalysisError, match="no column 'rung'"):
        influence(result, grid, by="rung")


def test_the_benchmark_compares_equal_jobs():
    table = built_in_table()
    found = run(table, grid_starts=45, num_bootstraps=200)
    assert found["no_worse_than_peers"]
    assert found["start_grid"]["starts_run"] == 45
    assert found["start_grid"]["ratio"] > 1
    value, gradient = log_sum_exp_objective(table)(np.array([6.2, 7.7, 0.6, 0.35, 0.37]))
    for k in range(5):
        step = np.zeros(5)
        step[k] = 1e-6
        at = np.array([6.2, 7.7, 0.6, 0.35, 0.37])
        up, down = (log_sum_exp_objective(table)(at + s * step)[0] for s in (1, -1))
        assert gradient[k] == pytest.approx((up - down) / 2e-6, rel=1e-3, abs=1e-6 * abs(value))
