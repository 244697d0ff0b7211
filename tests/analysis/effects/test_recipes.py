"""Two recipes as laws: coverage of the gain by compute, false alarms, trends, crossovers, refusals."""

from __future__ import annotations

from pathlib import Path

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
    rng, held, trend = np.random.default_rng(0), [], []
    for _ in range(ROUNDS):
        (found,) = recipes(two_recipes(rng, coefficient, alpha), by="recipe", baseline="old")
        rows = found.table.itertuples()
        held += [row.low <= true_gain(row.N, row.D, coefficient, alpha) <= row.high for row in rows]
        trend.append(found.trend_p <= 0.01 and found.trend[0] > 1)
    assert np.mean(held) >= 0.9
    assert np.mean(trend) > 0.7 if alpha != 0.38 else np.mean(trend) < 0.1


def test_a_recipe_that_only_pays_at_scale_crosses_over_where_it_does() -> None:
    table = two_recipes(np.random.default_rng(1), 2.2, 0.44)
    (found,) = recipes(table, by="recipe", baseline="old")
    assert found.table["gain"].iloc[0] < 1 < found.table["gain"].iloc[-1]
    row = found.table.iloc[0]
    ratio = row["D"] / row["N"]
    at = brentq(lambda c: np.log(true_gain(c, ratio * c, 2.2, 0.44)), 1e4, 1e8)
    assert np.log(found.crossover / (6 * ratio * at**2)) == pytest.approx(0, abs=0.5)
    assert "crosses over  at " in found.summary()


@pytest.mark.filterwarnings("error::RuntimeWarning")
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
    plain = recipes(table, by="recipe", baseline="old")[0]
    assert "time_gain" not in plain.table
    assert "no crossover up to" in plain.summary(), "the gain is above 1 at every compute"


def test_runs_that_would_decide_a_gain_are_named() -> None:
    """A gain that is not told yet has its runs named, one that is told needs none."""
    table = two_recipes(np.random.default_rng(0), 0.99, 0.38)
    (found,) = recipes(table, by="recipe", baseline="old")
    assert found.table["low"].iloc[4] < 1 < found.table["high"].iloc[4]
    assert found.decision.endswith("which tell a gain of 1.02 from 1 with probability 0.8")
    (clear,) = recipes(two_recipes(np.random.default_rng(0), 0.8, 0.38), by="recipe", baseline="old")
    assert clear.decision == "nothing more: at the table's largest compute the gain is above 1"
    assert ("to decide", clear.decision) in clear.facts()


def test_rows_of_another_design_are_left_out_by_name() -> None:
    """Of two designs that with most sizes and budgets is compared, though the other has more rows."""
    table = two_recipes(np.random.default_rng(0), 0.9, 0.38)
    other = pd.concat([table[table["N"] == table["N"].min()]] * 8).assign(prefix="none")
    other["val_loss"] *= 1 + 0.01 * np.random.default_rng(1).standard_normal(len(other))
    both = pd.concat([table.assign(prefix="paired"), other], ignore_index=True)
    (found,) = recipes(both, by="recipe", baseline="old")
    assert found.law is not None
    assert found.law.num_points == 20
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


BOARD = Path(__file__).parents[2] / "board"


def public(*names: str) -> pd.DataFrame:
    """Read tables of the board as one of two recipes."""
    tables = [pd.read_csv(BOARD / f"{name}.csv", comment="#").assign(recipe=name) for name in names]
    return pd.concat(tables, ignore_index=True)[["N", "D", "C", "loss", "recipe"]]


def test_a_gain_that_shrinks_with_compute_is_told_as_it_was_measured_at_every_budget() -> None:
    """Porian's short warm-up against a long one: joint laws of one E and shared exponents said 2.4 everywhere."""
    pair = ("porian-rw-2-head-counted", "porian-rw-3-short-warmup")
    both = public(*pair)
    (found,) = recipes(both, by="recipe", baseline=pair[0], y="loss")
    free = [3.03, 2.74, 2.36, 2.02, 1.74, 1.50, 1.37, 1.24, 1.12, 1.03, 1.05, 0.99]  # by the lowest losses alone
    inside = found.table[~found.table["beyond"]]
    assert inside["measured"].to_numpy() == pytest.approx(free, abs=0.006)
    assert sum(low <= each <= high for low, each, high in zip(inside["low"], free, inside["high"], strict=True)) >= 11
    assert found.trend[2] < 0.6
    assert found.trend_p < 0.001
    assert not found.decision.startswith("nothing more")
    cheap = both[both["C"] < 5e17]
    (ahead,) = recipes(cheap, by="recipe", baseline=pair[0], y="loss", beyond=both["C"].max() / cheap["C"].max())
    assert ahead.table["low"].iloc[-1] < 0.99 < ahead.table["high"].iloc[-1]


def test_compute_is_the_tables_own() -> None:
    """Counted FLOPs of one image are 16 times 6 N D here: the gain at equal N and D is told at these."""
    table = two_recipes(np.random.default_rng(2), 0.9, 0.38)
    counted = table.assign(flops_train=96 * table["N"] * table["D"])
    plain, (found,) = recipes(table, by="recipe", baseline="old")[0], recipes(counted, by="recipe", baseline="old")
    assert found.table["C"].to_numpy() == pytest.approx(16 * plain.table["C"].to_numpy())
    assert found.table["gain"].to_numpy() == pytest.approx(plain.table["gain"].to_numpy(), rel=1e-6)


def test_a_gain_is_not_told_by_a_law_that_two_amounts_of_data_do_not_identify() -> None:
    """Three sizes by two amounts: "worth 2.12 [1.82, 2.48]; grows x 1.95" of a gain of 1.5 everywhere, no caution."""
    table = two_recipes(np.random.default_rng(0), 0.8, 0.38)
    few = table[table["N"].isin(sorted(table["N"].unique())[::2]) & table["D"].isin(sorted(table["D"].unique())[::3])]
    (found,) = recipes(few, by="recipe", baseline="old")
    assert found.table[["gain", "low", "high"]].isna().all(axis=None)
    assert "not known" in found.headline()
    assert "beta is not identified" in found.decision
    assert any(flag.kind == "few_values" for flag in found.flags)
    assert np.isnan(found.crossover)
    assert "trend" not in dict(found.facts())
