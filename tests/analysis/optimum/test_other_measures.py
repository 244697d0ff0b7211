"""The best size by a probe's error, and by laws other than Chinchilla's."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tables import law_grid

from aimscale.analysis import fit, laws
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.optimum.approaches import frontier
from aimscale.analysis.optimum.frontier import NoFrontier, parametric_frontier
from aimscale.analysis.optimum.isoflop import isoflop_frontier
from aimscale.analysis.table.groups import Cost
from aimscale.analysis.table.measures import to_minimise
from aimscale.analysis.table.runs import Runs

BOARD = Path(__file__).parents[2] / "board"
OF_LOSS = {"E": 0.2, "A": 30.0, "B": 40.0, "alpha": 0.40, "beta": 0.40}
OF_ERROR = {"E": 0.1, "A": 40.0, "B": 5.0, "alpha": 0.40, "beta": 0.30}


def line_of(p: dict[str, float], cost: Cost) -> tuple[float, float]:
    """ln k and a of N*(C) where the derivative of A N^-alpha + B (C / kappa)^-beta N^((1+s) beta) is nil."""
    grow = (1 + cost.s) * p["beta"]
    a = p["beta"] / (p["alpha"] + grow)
    return np.log(p["alpha"] * p["A"] / (grow * p["B"])) / (p["alpha"] + grow) - a * np.log(cost.kappa), a


@pytest.fixture
def probed() -> pd.DataFrame:
    """A grid whose loss wants N ~ C^0.50 and whose probe wants N ~ C^0.43, from larger sizes."""
    rng, axis = np.random.default_rng(0), (1e5, 1e8, 9)
    rows, errors = (law_grid(truth, sizes=axis, budgets=axis, noise=0.002, rng=rng) for truth in (OF_LOSS, OF_ERROR))
    probe = {"task": "pets", "kind": "linear", "chance": 0.03}
    return rows.assign(probes=[[probe | {"top1": 1 - error}] for error in errors["val_loss"]])


def test_a_probe_has_an_optimum_of_its_own(probed):
    df, y = to_minimise(Runs(probed), "pets:linear")
    np.testing.assert_allclose(df[y], [1 - row[0]["top1"] for row in probed["probes"]])
    by_error, by_loss = frontier(df, y=y), frontier(df)
    assert by_error.measure == "linear-probe error on pets"
    for found, truth in ((by_error, OF_ERROR), (by_loss, OF_LOSS)):
        last, (log_k, a) = found.frontiers[-1], line_of(truth, Cost(kappa=6.0, s=0.0))
        assert last.exponent_interval.low < a < last.exponent_interval.high
        at = last.at(1e14).iloc[0]
        assert at["N_lo"] < np.exp(log_k + a * np.log(1e14)) < at["N_hi"] < 1.5 * at["N_lo"]


def test_what_y_may_be(probed):
    assert to_minimise(Runs(probed), "L")[1] == "val_loss"
    assert to_minimise(Runs(probed), "top1:pets:linear")[1] == to_minimise(Runs(probed), "pets:linear")[1]
    with pytest.raises(AnalysisError, match="pets:linear"):
        to_minimise(Runs(probed), "pets:knn")
    percents = probed.assign(probes=[[{**row[0], "top1": 100 * row[0]["top1"]}] for row in probed["probes"]])
    with pytest.raises(AnalysisError, match="fractions"):
        to_minimise(Runs(percents), "pets:linear")


def grid_of(law: laws.Law, params: dict[str, float]) -> pd.DataFrame:
    return law_grid(params, law, sizes=(1e6, 1e10, 9), budgets=(1e8, 1e12, 9), noise=1e-3, rng=1)


def test_laws_are_lowest_where_their_closed_form_says():
    # (A N^-alpha + B D^-beta)^c is lowest where its inner sum is
    df = grid_of(laws.COUPLED, {"E": 1.5, "K": 8.0, "w": 2.0, "alpha": 0.5, "beta": 0.45, "c": 0.6})
    coupled = fit(df, laws.COUPLED)
    line = parametric_frontier(coupled, Runs(df))
    assert line.exponent == pytest.approx(0.45 / 0.95, abs=0.01)
    log_k, a = line_of(coupled.params, line.cost)
    np.testing.assert_allclose(line.optimum(np.array([1e18, 1e20]))[0], log_k + a * np.log([1e18, 1e20]), atol=1e-7)
    assert line.exponent_interval.low < a < line.exponent_interval.high
    # Kaplan's inner sum has the exponents aN / aD and 1
    df = grid_of(laws.KAPLAN, {"K": 2.0, "aN": 0.07, "aD": 0.1, "w": 1e3})
    line = parametric_frontier(fit(df, laws.KAPLAN), Runs(df))
    assert line.exponent == pytest.approx(1 / 1.7, abs=0.02)
    assert np.ptp(np.diff(line.optimum(np.geomspace(*line.range, 3))[0])) < 1e-6  # a power of C
    assert line.exponent_interval.low < 1 / 1.7 < line.exponent_interval.high


def test_a_sample_that_costs_more_than_its_size_moves_the_optimum():
    """C = k N^1.2 D: less is spent on size than by 6 N D."""
    df = grid_of(laws.CHINCHILLA, {"E": 1.5, "A": 400.0, "B": 500.0, "alpha": 0.34, "beta": 0.3})
    dear = df.assign(C=3 * df["N"] ** 1.2 * df["D"])
    found = parametric_frontier(fit(dear, "chinchilla"), Runs(dear))
    assert (found.cost.kappa, found.cost.s) == (pytest.approx(3), pytest.approx(0.2))
    assert found.exponent == pytest.approx(0.3 / (0.34 + 1.2 * 0.3), abs=0.02)
    at = found.at(1e22).iloc[0]
    assert 3 * at["N"] ** 1.2 * at["D"] == pytest.approx(1e22)
    assert found.cost.flops(at["N"], at["D"]) == pytest.approx(
        1e22
    )  # forecasts place runs, and `next` prices them, by it
    assert found.exponent < parametric_frontier(fit(df, "chinchilla"), Runs(df)).exponent - 0.02


def test_an_exponent_that_a_law_cannot_change_has_no_interval():
    df = grid_of(laws.OVERTRAINED, {"E": 1.5, "a": 300.0, "b": 900.0, "h": 0.15})
    found = frontier(df, law="overtrained")
    last = found.frontiers[-1]
    assert (last.approach, last.exponent) == (3, pytest.approx(0.5, abs=1e-3))
    assert not last.exponent_interval.is_known
    at = last.at(1e20).iloc[0]
    assert at["D"] / at["N"] == pytest.approx((900 / 300) ** (1 / 0.3), rel=0.1)
    assert at["N_lo"] < at["N"] < at["N_hi"]


def test_every_law_finds_the_same_optimum_of_farseers_table():
    """404 published runs; farseer's frontier is no power of C, and lies on its minima."""
    df = pd.read_csv(BOARD / "farseer.csv", comment="#").rename(columns={"loss": "val_loss"})
    names = ("chinchilla", "coupled", "kaplan", "overtrained", "farseer")
    lines = {name: parametric_frontier(fit(df, name), Runs(df)) for name in names}
    ends = np.geomspace(*lines["farseer"].range, 3)
    bends = {name: np.ptp(np.diff(line.optimum(ends)[0])) for name, line in lines.items()}
    assert max(bends, key=bends.__getitem__) == "farseer"
    assert bends.pop("farseer") > 0.05 > 1e-6 > max(bends.values())
    sizes = [float(line.at(1e20)["N"].iloc[0]) for line in lines.values()]
    assert max(sizes) / min(sizes) < 1.06
    curved, best = lines["farseer"], sizes[-1]
    n = np.geomspace(best / 3, best * 3, 20001)
    loss = curved.law.law.value({"N": n, "D": curved.cost.samples(1e20, n)}, curved.law.estimate.params)
    assert n[np.argmin(loss)] == pytest.approx(best, rel=2e-3)


def test_a_law_without_an_optimum_says_so(probed):
    rising = fit(probed, laws.OVERTRAINED, fixed={"a": 0.0})  # the more data a parameter, the better
    with pytest.raises(NoFrontier) as refused:
        parametric_frontier(rising, Runs(probed))
    flag = refused.value.flags[0]
    assert (flag.kind, flag.subject, flag.number) == ("no_minimum", "overtrained", pytest.approx(probed["C"].min()))
    with pytest.raises(AnalysisError, match="N and D"):
        frontier(probed, law="power_offset:C")


def test_failures_are_data(known_study):
    with pytest.raises(NoFrontier) as refused:
        isoflop_frontier(Runs(known_study({"sizes": ["s1", "s2"], "seeds": [0]})))
    assert refused.value.flags[0].kind == "few_minima"
    found = frontier(known_study({"seeds": [0]}))
    assert [(k, flags[0].kind) for k, flags in found.failures.items()] == [(2, "few_minima")]
    assert found.to_dict()["failures"]["2"][1]["kind"] == "few_sizes"
