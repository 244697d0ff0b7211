"""Extrapolation tests against a naive baseline."""

import dataclasses

import numpy as np
import pytest
from tables import law_grid

from aimscale.analysis import fit, held_out, laws
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import largest


def test_the_largest_values_stay_together_and_leave_two():
    scale = np.repeat(np.geomspace(1, 100, 10), 4)
    assert largest(scale, 3, "rung").sum() == 12
    for few, num in ((np.ones(20), 1), (scale, 9), (scale - 1, 1)):
        with pytest.raises(AnalysisError, match="rung"):
            largest(few, num, "rung")


def test_the_true_law_beats_the_naive_line_on_the_largest_size(grid):
    test = held_out(fit(grid, laws.CHINCHILLA), grid, by="N")
    assert (test.num_train, test.num_test) == (25, 5)
    assert test.mean_abs_relative_error < 0.02
    assert test.is_better
    assert test.predictions["inside"].sum() >= 3
    assert np.all(test.predictions["N"] == 1e7)


def test_the_mean_error_of_a_held_out_scale_is_told_beside_what_noise_explains():
    df = law_grid(sizes=(1e5, 1e7, 7), budgets=(1e5, 3e6, 6), noise=0.003)
    sound = held_out(fit(df, "chinchilla"), df, by="N")
    assert abs(sound.mean_error) < 2.5 * sound.mean_error_sd < 0.03
    df.loc[df["N"] == 1e7, "val_loss"] *= 1.05
    off = held_out(fit(df, "chinchilla"), df, by="N")
    assert off.mean_error == pytest.approx(sound.mean_error + np.log(1.05), abs=0.005)
    assert off.p < 0.01 < sound.p


def test_the_naive_line_is_drawn_at_the_same_budget(grid):
    """A pure power of N at every D, with a level that depends on D: the naive line at the same D is exact."""
    grid["val_loss"] = 3 * grid["params_total"] ** -0.2 * grid["images_seen"] ** -0.1
    test = held_out(fit(grid, "chinchilla"), grid, by="N")
    assert test.naive_mean_abs_relative_error < 1e-9


def test_prediction_intervals_hold_the_held_out_size_as_often_as_they_say(known_study):
    """Runs share an error: over many studies the largest size is inside about 95 % of the time, not 50 %."""
    inside = total = 0
    for trial in range(12):
        df = known_study({"seeds": [3 * trial, 3 * trial + 1], "seed_sd": 0.004, "row_sd": 0.002})
        test = held_out(fit(df, "chinchilla"), df, by="N")
        inside, total = inside + test.predictions["inside"].sum(), total + test.num_test
    assert inside / total > 0.8


def test_a_left_out_scale_whose_kind_shares_errors_that_few_others_tell_is_no_alarm():
    """Rows of a left-out budget err together; three budgets cannot tell by how much, and intervals assume nothing."""
    df = law_grid(sizes=(1e5, 1e7, 8), budgets=(1e5, 3e6, 4), noise=0.003)
    df.loc[df["D"] == df["D"].max(), "val_loss"] *= 1.02
    by_budget, by_size = (held_out(fit(df, "chinchilla"), df, by=v) for v in ("D", "N"))
    assert by_budget.is_blind
    assert not by_size.is_blind
    assert 2 * by_budget.num_far > by_budget.num_test
    assert "twice as far" not in by_budget.caution()
    assert "twice as far" in dataclasses.replace(by_budget, is_blind=False).caution()
