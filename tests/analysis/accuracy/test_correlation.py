"""Correlation coefficients against scipy, partial correlation, refusals."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from aimscale.analysis import correlate


@pytest.fixture
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(1)
    c = np.exp(rng.normal(size=60))
    x = np.log(c) + rng.normal(size=60)
    return pd.DataFrame({"c": c, "x": x.round(1), "y": (np.log(c) + rng.normal(size=60)).round(1)})


def test_coefficients_equal_scipys_with_ties(frame):
    pearson, spearman, kendall = correlate(frame, x="x", y="y")
    assert pearson.value == pytest.approx(stats.pearsonr(frame.x, frame.y)[0])
    assert spearman.value == pytest.approx(stats.spearmanr(frame.x, frame.y)[0])
    assert kendall.value == pytest.approx(stats.kendalltau(frame.x, frame.y)[0])
    assert pearson.low < pearson.value < pearson.high


def test_what_differs_only_between_groups_vanishes_within_them():
    rng = np.random.default_rng(0)
    level = np.repeat(np.arange(6.0), 10)
    df = pd.DataFrame({"size": level, "x": level + rng.normal(size=60), "y": level + rng.normal(size=60)})
    (plain,), (inside,) = (correlate(df, x="x", y="y", methods=["pearson"], within=by) for by in (None, "size"))
    assert plain.low > 0.3  # six sizes tell it
    assert inside.low < 0 < inside.high


@pytest.mark.parametrize("noise", [0.0, 0.0003, 0.003])
def test_two_unrelated_power_laws_of_compute_show_nothing(noise):
    """A straight line in ln C leaves two bends that correlate with r = -.99."""
    rng, shown = np.random.default_rng(0), 0
    for _ in range(40):
        c = 6 * np.outer(np.geomspace(1e5, 1e7, 7), np.geomspace(1e5, 3e6, 5)).ravel()
        loss = (0.2 + 30 * c**-0.15) * np.exp(noise * rng.standard_normal(35))
        error = (0.1 + 200 * c**-0.25) * np.exp(noise * rng.standard_normal(35))
        df = pd.DataFrame({"flops_train": c, "val_loss": loss, "top1": 1 - error})
        (found,) = correlate(df, x="val_loss", y="top1", methods=["pearson"], partial="flops_train")
        shown += found.low > 0 or found.high < 0
    assert shown <= 4


def test_rows_of_equal_compute_are_compared_within_their_groups():
    rng = np.random.default_rng(1)
    c, n = (v.ravel() for v in np.meshgrid(np.geomspace(1e15, 1e17, 5), np.arange(6.0)))
    shared = rng.standard_normal(30)
    df = pd.DataFrame({"flops_train": c, "params_total": 10**n, "x": np.log(c) + shared, "y": -np.log(c) + shared})
    (found,) = correlate(df, x="x", y="y", methods=["pearson"], partial="flops_train")
    assert found.value > 0.99
    assert found.num_groups == 5


@pytest.mark.parametrize("rho", [0.6, 0.99])
def test_seeds_of_a_size_that_share_errors_count_as_one(rho):
    """Clustered by runs, 15 of them in five sizes, intervals held 64 to 74 % of true correlations."""
    rng, sizes, held = np.random.default_rng(8), np.repeat(np.arange(5), 12), []
    runs, truth = np.arange(60) // 4, {"pearson": rho, "kendall": 2 / np.pi * np.arcsin(rho)}
    for _ in range(100):
        own, shared = (rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], n) for n in (60, 5))
        pair = np.sqrt(0.1) * own + np.sqrt(0.9) * shared[sizes]
        df = pd.DataFrame({"x": pair[:, 0], "y": pair[:, 1], "run_id": runs.astype(str), "params_total": 10.0**sizes})
        found = [*correlate(df, x="x", y="y", methods=list(truth))]
        held.append([each.low < truth[each.method] < each.high for each in found])
    assert found[0].cluster == "params_total"
    few = df.assign(x=df["x"].where(sizes < 3))
    assert next(iter(correlate(few, x="x", y="y"))).cluster == "run_id"  # three sizes with both columns are too few
    assert (np.mean(held, axis=0) > 0.88).all()


@pytest.mark.parametrize("method", ["spearman", "kendall"])
def test_ranks_that_agree_but_for_two_neighbours_have_a_narrow_interval(method):
    """Without one of the two the order is perfect, which is infinitely far on Fisher's scale."""
    x = np.arange(20.0)
    y = -x
    y[[9, 10]] = y[[10, 9]]
    (found,) = correlate(pd.DataFrame({"x": x, "y": y}), x="x", y="y", methods=[method])
    assert -1 < found.low < found.value < found.high < -0.8
    (perfect,) = correlate(pd.DataFrame({"x": x, "y": -x}), x="x", y="y", methods=[method])
    assert (perfect.low, perfect.value) == pytest.approx((-1, -1))
    assert -1 < perfect.high < -0.9
