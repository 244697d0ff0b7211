"""Extrapolation tests against a naive baseline."""

import numpy as np
import pytest

from analysis import fit, held_out, laws
from analysis.errors import AnalysisError


def test_the_true_law_beats_the_ruler_on_the_largest_size(grid):
    result = fit(laws.CHINCHILLA, grid, resamples=0)
    test = held_out(result, grid, by="N")
    assert (test.num_train, test.num_test) == (25, 5)
    assert test.mean_abs_relative_error < 0.02
    assert test.log_rmse < test.naive_log_rmse
    assert test.coverage >= 0.6
    assert np.all(test.predictions["N"] == 1e7)


def test_too_few_values_to_hold_out_are_refused(grid):
    result = fit(laws.CHINCHILLA, grid, resamples=0)
    with pytest.raises(AnalysisError, match="too few"):
        held_out(result, grid, by="D", num_values=4)
