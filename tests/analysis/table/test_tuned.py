"""Rows that differ in a tuned column alone: the best of each cell makes a law, all of them a contrast."""

import numpy as np
import pandas as pd
import pytest
from commands import say

from aimscale.analysis import contrast, fit, read_table
from aimscale.analysis.table.points import usable_rows
from aimscale.analysis.table.runs import Runs

RATES = (0.25, 0.5, 1.0, 2.0, 4.0)


@pytest.fixture
def rates(known_study) -> pd.DataFrame:
    """Six sizes x five budgets x five multiples of a rate that follows the size; off the best one losses are worse."""
    frames = []
    for factor in RATES:
        frame = known_study({"seeds": [0], "seed_sd": 0.0, "row_sd": 0.0, "lr_multiplier": factor})
        lr = 1e-3 * factor * (frame["params_total"] / 1e6) ** -0.5
        frames.append(frame.assign(lr_peak=lr, val_loss=frame["val_loss"] * (1 + 0.01 * np.log2(factor) ** 2)))
    return pd.concat(frames, ignore_index=True)


def kinds(flags):
    return [(flag.kind, flag.subject, flag.number) for flag in flags]


@pytest.mark.parametrize("dropped", ["lr_peak", "lr_multiplier"])
def test_a_law_is_fitted_to_the_best_rate_of_every_cell(rates, dropped):
    """Fitted to all of them, E was .205 where it is .2, and nothing was said."""
    df = rates.drop(columns=dropped)
    (tuned,) = {"lr_peak", "lr_multiplier"} - {dropped}
    result = fit(df, "chinchilla")
    assert (result.num_points, result.num_rows) == (30, 150)
    assert [(e.kind, e.subject, e.number) for e in result.exclusions] == [("best of", tuned, 120)]
    assert result.params["E"] == pytest.approx(0.2, abs=1e-4)
    assert kinds(usable_rows(Runs(df), best_by="val_loss").flags) == [("tuned", tuned, 30)]


def test_two_names_of_one_rate_are_said_once_and_the_edge_of_what_was_tried_is(rates):
    low = rates[rates["lr_multiplier"] < 1]
    found = usable_rows(Runs(low), best_by="val_loss")
    assert len(found.rows) == 30
    assert kinds(found.flags) == [("tuned", "lr_multiplier", 30), ("tuned_edge", "lr_multiplier", 30)]
    assert "largest that was tried in 30 of 30 cells" in str(found.flags[1])


def test_a_rate_is_chosen_by_the_mean_of_its_seeds(rates):
    lucky = [rates.assign(seed=s, val_loss=rates["val_loss"] * (1 + 0.001 * s)) for s in range(3)]
    df = pd.concat(lucky, ignore_index=True)
    df.loc[(df["lr_multiplier"] == 2) & (df["seed"] == 1), "val_loss"] *= 0.985  # the lowest, of a worse rate
    found = usable_rows(Runs(df), best_by="val_loss")
    assert set(found.rows["lr_multiplier"]) == {1.0}
    assert found.rows.frame.groupby("seed").size().tolist() == [30, 30, 30]


def test_seeds_and_rates_that_follow_the_size_are_no_choice(rates, known_study):
    """Nor are contrasts, which need all rows."""
    one = rates[rates["lr_multiplier"] == 1]
    assert usable_rows(Runs(one), best_by="val_loss").rows.frame.equals(one)
    seeds = known_study({})
    assert len(usable_rows(Runs(seeds), best_by="val_loss").rows) == len(seeds)
    assert len(usable_rows(Runs(rates)).rows) == 150
    found = contrast(rates, by="lr_multiplier", baseline="1", measures=["val_loss"])
    assert {c.num_pairs for c in found.contrasts} == {30}


def test_rates_of_others_are_known_by_name_and_words_and_other_settings_are_experiments(rates, tmp_path):
    theirs = rates[["params_total", "images_seen", "val_loss"]].set_axis(["N", "D", "loss"], axis=1)
    peak = rates["lr_multiplier"]
    theirs = theirs.assign(**{"Learning rate": peak, "min_lr": peak, "width": peak, "optimizer": peak.astype(str)})
    assert Runs(theirs).tuned_columns() == ["Learning rate"]
    names = {"global_batch_size", "weight-decay", "wd", "BSZ", "peak_lr"}
    others = {"lr_end", "lr schedule", "lr_decay", "batch_index", "colour"}
    assert {*Runs(pd.DataFrame({name: [1, 2] for name in names | others})).tuned_columns()} == names
    path = tmp_path / "theirs.csv"
    theirs[["N", "D", "loss", "Learning rate"]].to_csv(path, index=False)
    out = say("fit", path, "--columns", "L=loss")
    assert "120 rows not the best Learning rate of their cell" in out
    assert fit(rates.assign(lr_multiplier=peak), "power:lr_multiplier").num_points == 150
    assert len(read_table(path, {"L": "loss"})) == 150


def test_names_of_runs_make_no_cells_and_other_experiments_do(rates):
    """A run of several budgets has a name of its own at every rate."""
    names = ["params_total", "images_seen", "val_loss", "lr_multiplier"]
    theirs = rates[names].rename(columns={"lr_multiplier": "lr"})
    theirs["run"] = [f"{row.params_total:.0f}-{row.lr}" for row in theirs.itertuples()]
    assert len(usable_rows(Runs(theirs), best_by="val_loss").rows) == 30
    both = [theirs.assign(optimizer=name, val_loss=theirs["val_loss"] * k) for name, k in (("adam", 1), ("muon", 0.9))]
    assert len(usable_rows(Runs(pd.concat(both, ignore_index=True)), best_by="val_loss").rows) == 60


def test_of_an_accuracy_the_best_is_the_highest(rates):
    df = rates.assign(accuracy=1 - rates["val_loss"])
    assert set(usable_rows(Runs(df), "accuracy", best_by="accuracy").rows["lr_multiplier"]) == {1.0}
