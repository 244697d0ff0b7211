"""Extrapolation tests against a naive baseline."""

import numpy as np
import pytest

from aimscale.analysis import fit, held_out, laws
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.holdout import largest


def test_the_largest_scales_stay_together():
    scale = np.repeat(np.geomspace(1, 100, 10), 4)
    assert largest(scale).sum() == 8  # 15 % of 40 are 6: two values
    assert largest(scale, share=0.3).sum() == 12
    assert largest(scale, num_values=3).sum() == 12
    assert largest(np.arange(1.0, 11)).sum() == 5
    for few, options in ((np.arange(1.0, 6), {}), (np.ones(20), {}), (scale, {"num_values": 9}), (scale - 1, {})):
        with pytest.raises(AnalysisError, match="rung"):
            largest(few, name="rung", **options)


def test_the_true_law_beats_the_naive_line_on_the_largest_size(grid):
    test = held_out(fit(laws.CHINCHILLA, grid, resamples=0), grid, by="N")
    assert (test.num_train, test.num_test) == (25, 5)
    assert test.mean_abs_relative_error < 0.02
    assert test.log_rmse < test.naive_log_rmse
    assert test.num_inside >= 3
    assert np.all(test.predictions["N"] == 1e7)


def test_the_naive_line_is_drawn_at_the_same_budget(grid):
    """A pure power of N at every D, with a level that depends on D: the naive line at the same D is exact."""
    grid["val_loss"] = 3 * grid["params_total"] ** -0.2 * grid["images_seen"] ** -0.1
    test = held_out(fit("chinchilla", grid, resamples=0), grid, by="N", resamples=0)
    assert test.naive_log_rmse < 1e-9
    assert (test.others, test.num_own) == ("D", 5)
    # with a single size at most budgets the best loss over all budgets is what is left
    sparse = grid[(grid["images_seen"] == grid["images_seen"].max()) | (grid["params_total"] < 3e5)]
    again = held_out(fit("chinchilla", sparse, resamples=0), sparse, by="D", num_values=2, resamples=0)
    assert again.num_own < again.num_test


def test_each_held_out_point_says_whether_it_is_inside(grid):
    test = held_out(fit("chinchilla", grid, resamples=0), grid, by="N")
    rows = test.predictions
    assert (rows["inside"] == ((rows["measured"] >= rows["pi_lo"]) & (rows["measured"] <= rows["pi_hi"]))).all()
    assert test.num_inside == rows["inside"].sum()
    assert held_out(fit("chinchilla", grid, resamples=0), grid, by="N", resamples=0).num_inside == 0


def test_prediction_intervals_hold_the_held_out_size_as_often_as_they_say(known_study):
    """Runs share an error: over many studies the largest size is inside about 95 % of the time, not 50 %."""
    inside = total = 0
    for trial in range(12):
        df = known_study({"seeds": [3 * trial, 3 * trial + 1], "seed_sd": 0.004, "row_sd": 0.002})
        test = held_out(fit("chinchilla", df, resamples=0), df, by="N", resamples=150)
        inside, total = inside + test.num_inside, total + test.num_test
    assert inside / total > 0.8
