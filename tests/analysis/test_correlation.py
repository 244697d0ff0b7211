"""Correlation coefficients against scipy, coverage of their intervals, what comes first, refusals."""

import numpy as np
import pandas as pd
import pytest
from commands import say
from scipy import stats

from aimscale.analysis import correlate


@pytest.fixture
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(1)
    c = np.exp(rng.normal(size=60))
    x = np.log(c) + rng.normal(size=60)
    return pd.DataFrame({"c": c, "x": x.round(1), "y": (np.log(c) + rng.normal(size=60)).round(1)})


def test_the_verb_draws_coefficients_under_the_names_given(frame, tmp_path):
    frame.to_csv(tmp_path / "table.csv", index=False)
    asked = ["correlate", tmp_path / "table.csv", "--x", "x", "--y", "y", "--figure", tmp_path / "drawn"]
    say(*asked, "--label", "x=Cost of a run")
    assert "Cost of a run" in (tmp_path / "drawn.svg").read_text()


def test_coefficients_equal_scipys_with_ties(frame):
    pearson, spearman = correlate(frame, x="x", y="y")
    assert pearson.value == pytest.approx(stats.pearsonr(frame.x, frame.y)[0])
    assert spearman.value == pytest.approx(stats.spearmanr(frame.x, frame.y)[0])
    assert pearson.low < pearson.value < pearson.high


def test_what_differs_only_between_groups_vanishes_within_them():
    rng = np.random.default_rng(0)
    level = np.repeat(np.arange(6.0), 10)
    df = pd.DataFrame({"size": level, "x": level + rng.normal(size=60), "y": level + rng.normal(size=60)})
    (plain,), (inside,) = (correlate(df, x="x", y="y", methods=["pearson"], within=by) for by in (None, "size"))
    assert plain.low > 0.2  # six sizes tell it
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
    runs, truth = np.arange(60) // 4, {"pearson": rho, "spearman": 6 / np.pi * np.arcsin(rho / 2)}
    for _ in range(100):
        own, shared = (rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], n) for n in (60, 5))
        pair = np.sqrt(0.1) * own + np.sqrt(0.9) * shared[sizes]
        df = pd.DataFrame({"x": pair[:, 0], "y": pair[:, 1], "run_id": runs.astype(str), "params_total": 10.0**sizes})
        found = [*correlate(df, x="x", y="y", methods=list(truth))]
        held.append([each.low < truth[each.method] < each.high for each in found])
    assert found[0].cluster == "params_total"
    few = df.assign(x=df["x"].where(sizes < 3))
    assert next(iter(correlate(few, x="x", y="y"))).cluster == "run_id"  # three sizes with both columns are too few
    assert (np.mean(held, axis=0) > 0.9).all()


@pytest.mark.parametrize("shared_by", ["nothing", "budgets", "sizes and budgets"])
def test_budgets_that_share_errors_are_clusters_beside_sizes(shared_by):
    """Clustered by sizes alone, intervals held 83 to 86 % of true correlations where budgets share errors."""
    rng, held = np.random.default_rng(4), []
    n, d = (each.ravel() for each in np.meshgrid(np.geomspace(1e5, 1e7, 5), np.geomspace(1e6, 1e8, 4)))
    codes = {name: np.unique(each, return_inverse=True)[1] for name, each in {"budgets": d, "sizes": n}.items()}
    for _ in range(100):
        pair = rng.multivariate_normal([0, 0], [[1, 0.9], [0.9, 1]], 20)
        for name in (name for name in codes if name in shared_by):
            pair += rng.multivariate_normal([0, 0], [[1, 0.9], [0.9, 1]], 5)[codes[name]]
        df = pd.DataFrame({"N": n, "D": d, "x": pair[:, 0], "y": pair[:, 1]})
        (found,) = correlate(df, x="x", y="y", methods=["pearson"])
        held.append(found.low < 0.9 < found.high)
    assert np.mean(held) >= 0.94
    assert (found.num_clusters, found.num_budgets) == (5, 4)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_unrelated_columns_whose_runs_repeat_themselves_show_nothing_within_a_size(share):
    """Runs of a size whose rows share errors; a level of its own in every size."""
    rng, shown = np.random.default_rng(3), []
    sizes, runs = np.arange(60) // 12, np.arange(60) // 4
    for _ in range(150):
        own, shared = rng.standard_normal((60, 2)), rng.standard_normal((15, 2))[runs]
        pair = np.sqrt(1 - share) * own + np.sqrt(share) * shared + 3.0 * sizes[:, None]
        df = pd.DataFrame({"x": pair[:, 0], "y": pair[:, 1], "size": sizes, "run_id": runs})
        shown.append([c.is_significant for c in correlate(df, x="x", y="y", within="size")])
    assert (np.mean(shown, axis=0) <= 0.08).all()
    (found, _) = correlate(df, x="x", y="y", within="size")
    assert (found.cluster, found.num_clusters, found.degrees) == ("run_id", 15, 10)


def test_equal_compute_comes_first_and_all_rows_second(frame):
    df = frame.rename(columns={"c": "flops_train"})
    found = correlate(df, x="x", y="y")
    assert [c.partial_on for c in found] == ["flops_train"] * 2 + [None] * 2
    assert found.table["compared"].tolist() == ["at equal flops_train"] * 2 + ["over all rows"] * 2
    assert "both may follow compute" in found.summary()
    assert [c.partial_on for c in correlate(df, x="x", y="y", partial="flops_train")] == ["flops_train"] * 2
    for without in (df.assign(flops_train=np.nan), df.assign(flops_train=1e18)):
        assert [c.partial_on for c in correlate(without, x="x", y="y")] == [None] * 2
    assert [c.partial_on for c in correlate(df, x="x", y="C")] == [None] * 2


@pytest.mark.parametrize(("gain", "is_told"), [(0.0, True), (0.1, False)])
def test_accuracies_at_chance_are_called_so(gain, is_told):
    """A trend of one image in a hundred, which the test images' own error exceeds, was "significant" without a word."""
    loss = np.linspace(1, 2, 30)
    top1 = 0.1 + 0.015 * (2 - loss) - 0.01 + gain
    probes = [[{"task": "pets", "kind": "knn", "top1": float(v), "chance": 0.1, "n": 1000}] for v in top1]
    df = pd.DataFrame({"val_loss": loss, "probes": probes})
    for sizes in (True, False):
        known = df if sizes else df.assign(probes=[[{**e, "n": None} for e in each] for each in probes])
        found = correlate(known)
        assert next(iter(found)).is_significant
        assert ("chance (10 %)" in found.summary()) == (is_told and sizes)
        assert ("all at chance" in found.table["verdict"][0]) == (is_told and sizes)


def test_an_infinite_accuracy_is_left_out_by_name():
    loss = np.linspace(1, 2, 12)
    probes = [[{"task": "pets", "kind": "knn", "top1": 1 - v / 4}] for v in loss]
    probes[3][0]["top1"] = 1e999
    (found, _) = correlate(pd.DataFrame({"val_loss": loss, "probes": probes}))
    assert (found.num_points, found.exclusions[0].number, found.exclusions[0].subject) == (11, 1, "top1")
    huge = pd.DataFrame({"x": [1e308, -1e308, 1.0, 2.0, 5e307], "y": [1.0, 3.0, 2.0, 2.5, 1e-320]})
    assert all(np.isfinite(c.value) for c in correlate(huge, x="x", y="y"))


def test_where_one_cluster_is_all_that_varies_nothing_is_known():
    df = pd.DataFrame({"x": [0.0] * 16 + [1, 2, 3, 4], "y": np.arange(20.0), "size": np.arange(20) // 4})
    assert [(c.low, c.high) for c in correlate(df, x="x", y="y")] == [(-1, 1)] * 2


def test_more_clusters_than_are_left_out_in_turn_have_the_interval_of_independent_rows():
    x, y = np.random.default_rng(0).multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 3000).T
    (found,) = correlate(pd.DataFrame({"x": x, "y": y}), x="x", y="y", methods=["pearson"])
    low, high = stats.pearsonr(x, y).confidence_interval()
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.006)


def test_an_interval_is_never_narrower_than_that_of_independent_rows():
    """Without any one of five equal clusters the coefficient is the same: a jackknife alone knows it exactly."""
    x, y = np.random.default_rng(0).multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 6).T
    df = pd.DataFrame({"x": np.tile(x, 5), "y": np.tile(y, 5), "params_total": np.repeat(10.0 ** np.arange(5), 6)})
    (found,) = correlate(df, x="x", y="y", methods=["pearson"])
    assert found.num_clusters == 5
    assert (found.low, found.high) == pytest.approx(tuple(stats.pearsonr(df.x, df.y).confidence_interval()))


def test_ranks_that_agree_but_for_two_neighbours_have_a_narrow_interval():
    """Without one of the two the order is perfect, which is infinitely far on Fisher's scale."""
    x = np.arange(20.0)
    y = -x
    y[[9, 10]] = y[[10, 9]]
    (found,) = correlate(pd.DataFrame({"x": x, "y": y}), x="x", y="y", methods=["spearman"])
    assert -1 < found.low < found.value < found.high < -0.8
    (perfect,) = correlate(pd.DataFrame({"x": x, "y": -x}), x="x", y="y", methods=["spearman"])
    assert (perfect.low, perfect.value) == pytest.approx((-1, -1))
    assert -1 < perfect.high < -0.9
