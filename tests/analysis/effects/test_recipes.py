"""Two recipes as laws: coverage of the gain by compute, false alarms, trends, crossovers, refusals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import brentq

from aimscale.analysis import AnalysisError, recipes

ROUNDS = 12


def two_recipes(rng: np.random.Generator, coefficient: float, alpha: float) -> pd.DataFrame:
    """Simulate five sizes at four budgets under two recipes; sizes and budgets have errors for both."""
    n, d = (each.ravel() for each in np.meshgrid(np.geomspace(1e5, 1e7, 5), np.geomspace(1e6, 3e7, 4), indexing="ij"))
    shared = np.repeat(0.004 * rng.standard_normal(5), 4) + np.tile(0.004 * rng.standard_normal(4), 5)
    tables = []
    for name, a, power in (("old", 30.0, 0.38), ("new", 30.0 * coefficient, alpha)):
        loss = (0.3 + a * n**-power + 20 * d**-0.35) * np.exp(shared + 0.002 * rng.standard_normal(20))
        tables.append(pd.DataFrame({"N": n, "D": d, "val_loss": loss, "recipe": name}))
    return pd.concat(tables, ignore_index=True)


def true_gain(n: float, d: float, coefficient: float, alpha: float) -> float:
    """Solve for the factor of compute by which the old recipe reaches the new one's loss."""
    loss = 30 * coefficient * n**-alpha + 20 * d**-0.35

    def missing(log_gain: float) -> float:
        root = np.exp(log_gain / 2)
        return 30 * (n * root) ** -0.38 + 20 * (d * root) ** -0.35 - loss

    return float(np.exp(brentq(missing, -6, 6)))


@pytest.mark.parametrize(("coefficient", "alpha"), [(1.0, 0.38), (0.9, 0.38), (1.6, 0.42)])
def test_intervals_of_the_gain_hold_it_at_every_compute(coefficient: float, alpha: float) -> None:
    rng, held, own, trend = np.random.default_rng(0), [], [], []
    for _ in range(ROUNDS):
        (found,) = recipes(two_recipes(rng, coefficient, alpha), by="recipe", baseline="old")
        rows = found.table.itertuples()
        held += [row.low <= true_gain(row.N, row.D, coefficient, alpha) <= row.high for row in rows]
        own.append(found.has_own_exponents)
        trend.append(found.trend[1] > 1)
    assert np.mean(held) >= 0.8  # of 12 tables; of 30, 90 to 100 %
    steeper = alpha != 0.38
    assert np.mean(own) > 0.7 if steeper else np.mean(own) < 0.2
    assert np.mean(trend) > 0.7 if steeper else np.mean(trend) < 0.2


def test_a_recipe_that_only_pays_at_scale_crosses_over_where_it_does() -> None:
    table = two_recipes(np.random.default_rng(1), 1.8, 0.42)
    (found,) = recipes(table, by="recipe", baseline="old")
    assert found.table["gain"].iloc[0] < 1 < found.table["gain"].iloc[-1]
    row = found.table.iloc[0]
    ratio = row["D"] / row["N"]
    at = brentq(lambda c: np.log(true_gain(c, ratio * c, 1.8, 0.42)), 1e4, 1e8)
    assert np.log(found.crossover / (6 * ratio * at**2)) == pytest.approx(0, abs=1.0)
    assert "crosses over" in found.summary()


def test_the_same_runs_twice_gain_nothing() -> None:
    table = two_recipes(np.random.default_rng(2), 1.0, 0.38)
    old = table[table["recipe"] == "old"]
    (found,) = recipes(pd.concat([old, old.assign(recipe="new")], ignore_index=True), by="recipe")
    assert found.table["gain"].to_numpy() == pytest.approx(np.ones(len(found.table)), abs=1e-5)


def test_a_gain_in_time_counts_the_measured_speed() -> None:
    """The new recipe is worth more compute and half as fast; speeds scatter over sizes by 5 %."""
    rng = np.random.default_rng(3)
    table = two_recipes(rng, 0.8, 0.38)
    scatter = dict(zip(table["N"].unique(), np.exp(0.05 * rng.standard_normal(5)), strict=True))
    slower = table["recipe"].map({"old": 1.0, "new": 0.5}) * table["N"].map(scatter).where(table["recipe"] == "new", 1)
    (found,) = recipes(table.assign(images_per_s=1e9 / table["N"] * slower), by="recipe", baseline="old")
    faster = found.table["time_gain"] / found.table["gain"]
    assert faster.to_numpy() == pytest.approx(np.full(7, 0.5 * np.exp(np.mean(np.log([*scatter.values()])))))
    widths = [np.log(found.table[f"{kind}high"] / found.table[f"{kind}low"]) for kind in ("", "time_")]
    assert widths[1][2] > widths[0][2]  # where the gain in compute is known best
    assert "gain in time" in found.cells()[0]
    assert "time_gain" not in recipes(table, by="recipe")[0].table


def test_runs_that_would_decide_a_gain_are_named() -> None:
    """A gain that is not told yet has its runs named, one that is told needs none."""
    table = two_recipes(np.random.default_rng(2), 0.985, 0.38)
    (found,) = recipes(table, by="recipe", baseline="old")
    assert found.table["low"].iloc[-1] < 1
    assert found.decision == "2 more seeds of both at N = 100k, D = 1M, if the gain is 1.05"
    (clear,) = recipes(two_recipes(np.random.default_rng(0), 0.8, 0.38), by="recipe", baseline="old")
    assert clear.decision == "nothing more: at the largest compute the gain is above 1"
    assert ("to decide", clear.decision) in clear.facts()


def test_rows_of_another_design_are_left_out_by_name() -> None:
    """Of two designs that with most sizes and budgets is compared, though the other has more rows."""
    table = two_recipes(np.random.default_rng(0), 0.9, 0.38)
    other = pd.concat([table[table["N"] == table["N"].min()]] * 8).assign(prefix="none")
    other["val_loss"] *= 1 + 0.01 * np.random.default_rng(1).standard_normal(len(other))
    both = pd.concat([table.assign(prefix="paired"), other], ignore_index=True)
    (found,) = recipes(both, by="recipe", baseline="old")
    assert found.law.num_points == 40
    assert "64 rows of other designs than prefix paired are left out" in found.summary()


def test_what_cannot_be_compared_says_why() -> None:
    table = two_recipes(np.random.default_rng(0), 1.0, 0.38)
    with pytest.raises(AnalysisError, match="no level 'odl'; did you mean old"):
        recipes(table, by="recipe", baseline="odl")
    with pytest.raises(AnalysisError, match="All rows have recipe = old"):
        recipes(table[table["recipe"] == "old"], by="recipe")
    with pytest.raises(AnalysisError, match="prefix"):
        recipes(table, by="prefix")


def test_the_papers_level_is_the_baseline_unless_another_is_named() -> None:
    """As in a contrast of pairs, also where another level has more rows."""
    table = two_recipes(np.random.default_rng(0), 0.9, 0.38)
    table = table.assign(prefix=table["recipe"].map({"old": "paired", "new": "none"})).drop(columns="recipe")
    (found,) = recipes(table.drop(index=table.index[0]), by="prefix")
    assert (found.baseline, found.level) == ("paired", "none")
