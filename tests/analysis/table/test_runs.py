"""`Runs`: made once, never changed, and all that is known of a table is asked of it."""

import pickle

import numpy as np
import pandas as pd
import pytest
from tables import law_grid

from aimscale.analysis import Runs, fit, forecast, frontier, read_table
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.table.points import usable_rows
from aimscale.analysis.table.select import select

NAMES = {"N": "params", "D": "images", "L": "loss", "C": "6 * N * D"}


@pytest.fixture
def theirs() -> pd.DataFrame:
    """Seven sizes by five budgets under other names, one row of which diverged."""
    df = law_grid(sizes=(1e5, 1e7, 7), budgets=(1e5, 3e6, 5), noise=0.003)
    df = df[["N", "D", "val_loss"]].set_axis(["params", "images", "loss"], axis=1).astype({"loss": object})
    df.loc[3, "loss"] = "diverged"
    return df


def test_a_frame_and_its_file_are_the_same_runs(theirs, tmp_path):
    theirs.to_csv(tmp_path / "theirs.csv", index=False)
    made, read = Runs(theirs, columns=NAMES), read_table(tmp_path / "theirs.csv", NAMES)
    pd.testing.assert_frame_equal(made.frame, read.frame)
    assert (made.names, made.exclusions) == (read.names, read.exclusions)
    assert fit(made).params.equals(fit(read).params)
    with pytest.raises(AnalysisError, match="the table has no column parms that columns names"):
        Runs(theirs, columns={"N": "parms"})


def test_it_says_what_it_holds_and_what_it_left_out(theirs):
    runs = select(Runs(theirs, columns=NAMES), ["N>2e5"])
    words = f"{len(runs)} rows, 6 sizes, 5 budgets, 1 experiment; left out: 1 row with 'diverged' in loss, "
    words += f'{34 - len(runs)} rows not chosen by where=["N>2e5"]'
    assert runs.summary() == words
    assert repr(runs).startswith(words)
    assert "<table" in runs._repr_html_()
    mixed = runs.assign(prefix=np.where(np.arange(len(runs)) % 2, "none", "paired"))
    assert mixed.design_columns() == ["prefix"]
    assert "2 experiments" in mixed.summary()


def test_nothing_changes_it_and_what_is_made_of_it_shares_what_is_known(theirs):
    runs = Runs(theirs, columns=NAMES)
    before = runs.frame
    mine = runs.frame
    mine["val_loss"] = 0.0
    other = runs.assign(val_loss=1.0).with_groups({"budgets": 0.03})
    pd.testing.assert_frame_equal(runs.frame, before)
    assert (runs.grouping, other.grouping) == ({}, {"budgets": 0.03})
    assert (other.names, other.exclusions) == (runs.names, runs.exclusions)
    assert Runs(other).grouping == other.grouping
    again = pickle.loads(pickle.dumps(other))
    pd.testing.assert_frame_equal(again.frame, other.frame)
    assert (again.names, again.exclusions, again.grouping) == (other.names, other.exclusions, other.grouping)


def test_groups_are_printed_and_corrected():
    df = law_grid(sizes=(1e5, 1e7, 7), budgets=(1e5, 3e6, 5), noise=0.003, rng=np.random.default_rng(0))
    df["D"] *= np.exp(0.01 * np.random.default_rng(1).standard_normal(len(df)))  # as rounded, or read off a figure
    runs = Runs(df)
    assert runs.groups.nunique().to_dict() == {"size": 7, "budget": 5}
    assert runs.with_groups({"budgets": 1e-6}).groups.nunique()["budget"] == 35
    counts = fit(runs).estimate.groups.counts
    assert counts == {"sizes": 7, "budgets": 5}
    assert fit(df).params.equals(fit(runs).params)


def test_every_estimator_takes_runs_and_a_frame_alike(grid):
    at = {"N": 1e7, "D": 1e6}
    for estimate in (lambda t: fit(t).table, lambda t: frontier(t).table, lambda t: forecast(t, at).table):
        pd.testing.assert_frame_equal(estimate(grid), estimate(Runs(grid)))
    assert len(usable_rows(Runs(grid)).rows) == len(grid)
