"""A few rungs of two recipes that grow in N and D: the gate by which many projects decide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import refused, say

from aimscale.analysis import AnalysisError, at_level, recipes
from aimscale.analysis.effects.ladder import fit_ladder

BOARD = Path(__file__).parents[2] / "board"


def ladder(rng: np.random.Generator, gain: float, *, num_rungs: int = 4, noise: float = 0.002) -> pd.DataFrame:
    """Make losses of two recipes, one of which needs 1 / gain of the other's compute, at 20 samples a parameter."""
    n = 1e8 * 2.5 ** np.arange(num_rungs)
    tables = []
    for recipe, factor in (("old", 1.0), ("new", gain)):
        d = 20 * n * np.exp(0.02 * rng.normal(size=num_rungs))
        loss = 1.6 + 2 * (factor * 6 * n * d / 1e18) ** -0.1
        tables.append(pd.DataFrame({"N": n, "D": d, "C": 6 * n * d, "recipe": recipe, "loss": loss}))
    table = pd.concat(tables, ignore_index=True)
    return table.assign(loss=table["loss"] * np.exp(noise * rng.normal(size=len(table))))


@pytest.mark.parametrize(("gain", "num_rungs"), [(1.0, 4), (1.08, 3), (1.5, 4)])
def test_intervals_hold_the_gain_and_equal_recipes_are_not_told_apart(gain: float, num_rungs: int) -> None:
    rng, num_tables, inside, wrong = np.random.default_rng(3), 40, 0, 0
    for _ in range(num_tables):
        table = ladder(rng, gain, num_rungs=num_rungs)
        result = fit_ladder(table.assign(G=table["recipe"].map({"old": 1.0, "new": 2.0}), y=table["loss"]))
        error = result.log_gain - np.log(gain)
        inside += abs(error) <= result.half
        wrong += abs(result.log_gain) > result.half and gain == 1.0
    assert inside >= 0.85 * num_tables
    assert wrong <= 0.15 * num_tables


def test_four_rungs_are_compared_by_one_law_and_say_what_would_decide() -> None:
    table = ladder(np.random.default_rng(0), 1.3)
    (result,) = recipes(table, by="recipe", baseline="old", columns={"L": "loss"})
    row = result.table.iloc[0]
    assert row["low"] < 1.3 < row["high"]
    assert len({*result.table["gain"]}) == 1
    assert result.probability > 0.99
    assert "one_gain" in {flag.kind for flag in result.flags}
    assert result.table["measured"].iloc[:4].to_numpy() == pytest.approx(np.full(4, 1.3), rel=0.15)
    (unclear,) = recipes(ladder(np.random.default_rng(0), 1.02), by="recipe", baseline="old", y="loss")
    assert "more seed" in unclear.decision or "another rung" in unclear.decision
    assert 0.05 < unclear.probability < 0.95


def test_rungs_at_the_best_size_of_their_budget_are_a_ladder() -> None:
    """Marin's: N and D do not move in one line; all 170 rows at their seven budgets tell 1.23 to 1.27 there."""
    tables = [BOARD / f"marin-{name}.csv" for name in ("dclm", "nemotron")]
    rows = pd.concat([pd.read_csv(path, comment="#").assign(recipe=path.stem) for path in tables], ignore_index=True)
    best = rows.sort_values("loss").groupby(["recipe", rows["C"].round(-16)]).head(1)
    for budgets in ([9e18, 1.8e19, 3e19, 9e19], [9e18, 3e19, 9e19]):
        (gate,) = recipes(best[best["C"].round(-16).isin(budgets)], by="recipe", baseline="marin-dclm", y="loss")
        row = gate.table.iloc[0]
        assert row["low"] < 1.25 < row["high"]
        assert row["low"] > 1
        assert gate.probability > 0.99


def test_a_gain_that_changes_with_compute_is_not_carried_on() -> None:
    rng = np.random.default_rng(0)
    table = ladder(rng, 1.3, num_rungs=5, noise=0.0002)
    assert "one_gain" in {flag.kind for flag in recipes(table, by="recipe", baseline="old", y="loss")[0].flags}
    more = np.where(table["recipe"] == "new", (table["C"] / table["C"].min()) ** -0.02, 1.0)
    (result,) = recipes(table.assign(loss=table["loss"] * more), by="recipe", baseline="old", y="loss")
    (flag,) = [flag for flag in result.flags if flag.kind == "gain_changes"]
    assert flag.number > 1.2
    assert flag.p < 0.01


def test_the_law_and_a_held_loss_may_be_named_and_others_are_refused(tmp_path) -> None:
    path = tmp_path / "gate.csv"
    ladder(np.random.default_rng(0), 1.3).to_csv(path, index=False)
    words = ("contrast", path, "--by", "recipe=old", "--columns", "L=loss")
    assert "1.3" in say(*words, "--as-law", "--fix", "E=1.6", "--law", "power_offset:C")
    assert "power:C" in refused(*words, "--as-law", "--law", "chinchilla")
    assert "--as-law" in refused(*words, "--law", "power:C")


def test_a_forecast_of_few_rungs_names_the_law_that_can_be_fitted(tmp_path) -> None:
    path = tmp_path / "gate.csv"
    ladder(np.random.default_rng(0), 1.0).to_csv(path, index=False)
    words = ("forecast", path, "--where", "recipe=old", "--columns", "L=loss")
    assert "--law auto:C" in refused(*words, "--at", "N=1e10,D=2e11")
    assert "C = 10²²" in say(*words, "--at", "C=1e22", "--law", "auto:C")
    with pytest.raises(AnalysisError, match="give at least"):
        recipes(ladder(np.random.default_rng(0), 1.3, num_rungs=2), by="recipe", y="loss")


def test_the_probability_is_the_same_at_any_level_of_the_intervals() -> None:
    """Of a grid it was read off a 95 % interval, whatever the level that was asked for."""
    rng, tables = np.random.default_rng(0), []
    for recipe, factor in (("old", 1.0), ("new", 1.02)):
        n, d = (each.ravel() for each in np.meshgrid(np.geomspace(1e5, 1e7, 5), np.geomspace(1e6, 1e8, 4)))
        loss = 0.3 + 20 * (factor * n) ** -0.38 + 60 * (factor * d) ** -0.4
        loss *= np.exp(0.003 * rng.normal(size=len(n)))
        tables.append(pd.DataFrame({"N": n, "D": d, "loss": loss, "recipe": recipe}))
    grid = pd.concat(tables, ignore_index=True)
    for table in (grid, ladder(rng, 1.02)):
        (usual,) = recipes(table, by="recipe", baseline="old", y="loss")
        with at_level(0.8):
            (narrow,) = recipes(table, by="recipe", baseline="old", y="loss")
        assert narrow.table["low"].iloc[0] > usual.table["low"].iloc[0]
        assert narrow.probability == pytest.approx(usual.probability, abs=1e-3)
