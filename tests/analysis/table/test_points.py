"""Which rows are points of a fit, and what is said of those that are not."""

import numpy as np
import pandas as pd
import pytest

from aimscale.analysis import correlate, fit, read_table
from aimscale.analysis.table.points import compute_points, usable_rows
from aimscale.analysis.table.runs import Runs
from aimscale.analysis.table.select import most_passes, passes_flags


@pytest.mark.parametrize("status", [None, np.nan])
def test_a_missing_status_counts_as_complete_everywhere(grid, status):
    grid["status"] = grid["status"].astype(object).where(grid.index % 2 == 0, status)
    grid["seed"] = grid.index % 2
    grid.loc[3, "status"] = "diverged"
    assert len(Runs(grid).complete()) == len(grid) - 1
    assert fit(grid, "chinchilla").num_points == len(grid) - 1
    assert len(compute_points(Runs(grid), "val_loss")) == len(grid) - 1
    assert len(usable_rows(Runs(grid)).rows) == len(grid) - 1
    assert "1 row not complete (status)" in map(str, fit(grid, "chinchilla").exclusions)
    assert correlate(pd.DataFrame({"x": [1, 2, 3, 4.0], "y": [1, 2, 3, 5.0]}), x="x", y="y").table["num_points"][0] == 4


def test_labels_of_rows_may_stand_twice(grid, tmp_path):
    """Frames that were joined keep their labels; rows looked up by them came back more than once, so rows are numbered
    anew."""
    joined = pd.concat([grid.iloc[:10], grid.iloc[10:].set_axis(range(len(grid) - 10))])
    joined.to_parquet(tmp_path / "joined.parquet")
    again = read_table(tmp_path / "joined.parquet")
    assert fit(again, "chinchilla").params.equals(fit(grid, "chinchilla").params)
    assert fit(joined, "chinchilla").params.equals(fit(grid, "chinchilla").params)
    named = grid.assign(run_id=[f"run-{i}" for i in range(len(grid))]).set_index("run_id")
    named.to_parquet(tmp_path / "named.parquet")
    assert list(read_table(tmp_path / "named.parquet")["run_id"]) == list(named.index)


def test_a_scale_beyond_the_passes_that_rows_saw_is_flagged(known_study):
    def times(df, **at):
        return [round(flag.number) for flag in passes_flags(df, "D", at)]

    worn = known_study({"uniques": [2000]})
    assert most_passes(worn) == 32
    assert times(worn, D=64_000) == []
    assert times(worn, D=100_000) == [50]
    assert times(worn, N=1e6, D=100_000, U=100_000) == []
    assert times(worn, D=100_000, U=1000) == [100]
    assert times(worn, C=1e9) == []
    own = worn.assign(unique_images=worn["images_seen"])
    assert times(own, D=1e9) == []  # every budget has a pool of its own
    assert times(worn.drop(columns="unique_images"), D=1e9) == []
    once = worn.assign(unique_images=64_000)
    assert times(once, D=640_000) == [10]
