"""Correlation coefficients against scipy, partial correlation, refusals."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from aimscale.analysis import correlate
from aimscale.analysis.errors import AnalysisError


@pytest.fixture
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(1)
    c = np.exp(rng.normal(size=60))
    x = np.log(c) + rng.normal(size=60)
    return pd.DataFrame({"c": c, "x": x.round(1), "y": (np.log(c) + rng.normal(size=60)).round(1)})


def test_coefficients_equal_scipys_with_ties(frame):
    pearson, spearman, kendall = correlate(frame, x="x", y="y", resamples=200)
    assert pearson.value == pytest.approx(stats.pearsonr(frame.x, frame.y)[0])
    assert spearman.value == pytest.approx(stats.spearmanr(frame.x, frame.y)[0])
    assert kendall.value == pytest.approx(stats.kendalltau(frame.x, frame.y)[0])
    assert pearson.low < pearson.value < pearson.high


def test_what_comes_from_compute_alone_vanishes_when_compute_is_regressed_out(frame):
    plain = correlate(frame, x="x", y="y", methods=["pearson"], resamples=500)[0]
    partial = correlate(frame, x="x", y="y", methods=["pearson"], partial="c", resamples=500)[0]
    assert plain.low > 0.2
    assert partial.low < 0 < partial.high
    assert "log c regressed out" in partial.sentence()


def test_what_differs_only_between_groups_vanishes_within_them():
    rng = np.random.default_rng(0)
    level = np.repeat(np.arange(6.0), 10)
    df = pd.DataFrame({"size": level, "x": level + rng.normal(size=60), "y": level + rng.normal(size=60)})
    assert correlate(df, x="x", y="y", methods=["pearson"], resamples=200)[0].low > 0.5
    inside = correlate(df, x="x", y="y", methods=["pearson"], within="size", resamples=200)[0]
    assert inside.low < 0 < inside.high
    assert "within size" in inside.sentence()


def test_useless_columns_are_refused(frame):
    with pytest.raises(AnalysisError, match="same in all"):
        correlate(frame.assign(y=1.0), x="x", y="y")
    with pytest.raises(AnalysisError, match="no column 'z'"):
        correlate(frame, x="x", y="z")
