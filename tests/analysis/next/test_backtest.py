"""A law is chosen by what it predicts on scales it has not seen, with the error of the differences."""

import numpy as np
import pandas as pd
import pytest

from aimscale.analysis import fit
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.next.backtest import choose


def log_rmse(result, test: pd.DataFrame) -> float:
    return float(np.sqrt(np.mean(np.log(result.predict(test)["value"].to_numpy() / test["loss"].to_numpy()) ** 2)))


def curve(limit: float) -> pd.DataFrame:
    x = np.geomspace(1e3, 1e7, 60)
    noise = 0.003 * np.random.default_rng(1).standard_normal(60)
    return pd.DataFrame({"x": x, "loss": (limit + 9 * x**-0.3) * np.exp(noise)})


def test_the_simplest_of_equals_is_taken():
    found = choose("auto:x", curve(0.0), y="loss", objective="huber_log", share=0.3, resamples=50)
    table = found.table.set_index("law")
    assert table["mean_error"].idxmin() == "power_offset"  # by luck: it holds the true law and has a parameter more
    assert table.loc[["power", "power_offset"], "as_good"].all()
    assert found.best.law.name == "power"
    assert found.best.intervals  # options go to the fit of the chosen law


def test_worse_laws_are_ranked_with_the_error_of_the_difference():
    found = choose("auto:x", curve(0.5), y="loss", share=0.3, resamples=0)
    table = found.table.set_index("law")
    assert not table.loc["power", "as_good"]
    assert table.loc["power", "difference"] > 3 * table.loc["power", "difference_se"] > 0
    assert found.best.params["E"] == pytest.approx(0.5, abs=0.01)
    assert (found.by, found.num_train, found.num_test) == ("x", 42, 18)


def test_a_law_that_the_points_cannot_carry_is_named_and_not_ranked(grid):
    found = choose("auto", grid.iloc[:22], resamples=0)
    reason = found.table.set_index("law")["reason"]
    assert "17 scales" in reason["farseer"]
    assert "5 points" in reason["coupled"]
    assert reason["chinchilla"] == ""
    seeds = pd.concat([grid.iloc[:14].assign(seed=s) for s in range(3)], ignore_index=True)
    tripled = choose("auto", seeds, resamples=0).table.set_index("law")["reason"]
    assert "11 scales" in tripled["coupled"]
    with pytest.raises(AnalysisError, match="largest 5"):
        choose("auto", grid.iloc[:5], resamples=0)
    with pytest.raises(AnalysisError, match="rung"):
        choose("auto", grid, by="rung", resamples=0)


def test_data_without_a_column_of_compute_are_held_out_by_six_n_d(grid):
    large = grid.assign(params_total=(1e5 * grid["params_total"]).astype("int64"), images_seen=grid["images_seen"])
    large["images_seen"] = (1e5 * large["images_seen"]).astype("int64")  # 6 N D of these overflows an int64
    large["flops_train"] = 6.0 * large["params_total"] * large["images_seen"]
    grid, bare = large, large.drop(columns="flops_train")
    ours, theirs = (choose("auto", df, resamples=0).table["mean_error"] for df in (bare, grid))
    assert ours.equals(theirs)


def test_the_top_of_farseers_compute_is_forecast_by_the_chosen_law(measurements):
    df = measurements("scalebench/farseer.parquet")
    compute = df["N"] * df["D"]
    top = compute >= compute.quantile(0.9)
    found = choose("auto", df[~top], y="loss", resamples=0)
    assert log_rmse(found.best, df[top]) < 0.0049 * 1.1
    assert not found.table.set_index("law").loc["chinchilla", "as_good"]


@pytest.mark.parametrize("cut", [1e21, 3e20, 1e20])
@pytest.mark.parametrize("objective", ["robust", "huber_log"])
def test_one_rule_serves_every_cut_through_chinchillas_points(epoch, cut, objective):
    epoch = epoch.assign(C=6 * epoch["N"] * epoch["D"])
    below, above = epoch[epoch["C"] < cut], epoch[epoch["C"] >= cut]
    found = choose("auto", below, y="loss", objective=objective, resamples=0)
    forms = [fit(law, below, y="loss", objective=objective, resamples=0) for law in ("chinchilla", "coupled")]
    assert log_rmse(found.best, above) < 1.05 * min(log_rmse(form, above) for form in forms)


@pytest.mark.parametrize("objective", ["huber_log", "robust"])
def test_pools_seen_many_times_get_a_law_that_overfits(measurements, objective):
    names = {"unique_tokens": "U", "params": "N", "tokens": "D"}
    df = measurements("scalebench/data_constrained.parquet").rename(columns=names)
    top = df["D"].rank(method="first") > 0.9 * len(df)
    found = choose("auto", df[~top], y="loss", objective=objective, resamples=0)
    miss = df.loc[top, "loss"] - found.best.predict(df[top])["value"].to_numpy()
    r2 = 1 - (miss**2).sum() / ((df.loc[top, "loss"] - df.loc[top, "loss"].mean()) ** 2).sum()
    assert found.best.law.name == "overfitting"
    assert r2 > 0.97
