"""Intervals hold the truth about as often as they say, on tables simulated from a known law."""

import pytest

from aimscale.analysis.coverage.designs import Design
from aimscale.analysis.coverage.laws import fit_coverage, held_out_coverage, verdict_coverage


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "errors"), [(1, "run"), (3, "size")])
def test_intervals_of_a_fit_cover_where_sizes_err(seeds, errors):
    found = fit_coverage(Design(sizes=5, budgets=4, seeds=seeds, errors=errors), 60, resamples=300).table()
    found = found.set_index("interval")
    # two degrees of freedom between five sizes: the least of 400 tables is A's 89 %, and 60 tables err by 4
    assert (found["coverage"] > 0.81).all()
    assert found.loc["alpha, beta and a identified", "coverage"] > 0.95
    assert found.loc["alpha", "width"] < 1.7  # resampling runs gives 1.9 to 2.7


def test_a_held_out_size_lies_inside_about_as_often_as_said():
    found = held_out_coverage(Design(sizes=7, budgets=5, seeds=3, errors="run"), 40, resamples=200).table()
    assert found["coverage"].iloc[0] > 0.85


@pytest.mark.slow
def test_what_cannot_be_identified_is_not_said_to_be():
    assert (verdict_coverage(40).table()["coverage"] >= 0.95).all()
