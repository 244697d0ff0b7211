"""Every law of the catalogue is recovered from its own values, and its gradient is right."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from aimscale.analysis import fit, laws
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.problem import LSQ, make_problem
from aimscale.analysis.laws import Columns

BOARD = Path(__file__).parents[1] / "board"
X = {"x": np.geomspace(1e3, 1e8, 40)}
N, D = (a.ravel() for a in np.meshgrid(np.geomspace(1e6, 1e9, 7), np.geomspace(1e8, 1e11, 6)))
U = np.array([1e8, 1e9, 1e10])[np.arange(N.size) % 3]
CHINCHILLA = {"E": 1.7, "A": 400.0, "B": 2000.0, "alpha": 0.34, "beta": 0.36}
FARSEER = {"E": 1.9, "B": 0.4, "d": 0.3, "s1": -0.18, "alpha": -0.15, "s2": -0.2, "beta": -0.17}
FARSEER |= {"s3": 0.11, "gamma": 0.1}
PENALISED = CHINCHILLA | {"G": 0.002}
TRUTHS = [
    ("power_offset", X, {"E": 0.1, "A": 3, "a": 0.3}),
    ("power", X, {"A": 3, "a": 0.3}),
    ("chinchilla", {"N": N, "D": D}, CHINCHILLA),
    ("kaplan", {"N": N, "D": D}, {"K": 2.0, "aN": 0.2, "aD": 0.25, "w": 0.8}),
    ("coupled", {"N": N, "D": D}, {"E": 1.5, "K": 0.9, "alpha": 0.4, "beta": 0.45, "c": 0.6, "w": 1.3}),
    ("farseer", {"N": N, "D": D}, FARSEER),
    ("overtrained", {"N": N, "D": D, "C": 6 * N * D}, {"E": 1.8, "a": 100.0, "b": 200.0, "h": 0.15}),
    ("repeated", {"N": N, "D": D, "U": U}, CHINCHILLA | {"R_D": 15.0}),
    ("repeated_both", {"N": N, "D": D, "U": U, "V": U / 20}, CHINCHILLA | {"R_D": 15.0, "R_N": 5.0}),
    ("penalised", {"N": N, "D": D, "U": U}, PENALISED),
    ("link_sigmoid", {"L": np.linspace(2, 4, 30)}, {"floor": 0.25, "height": 0.6, "k": 4.0, "L0": 2.8}),
]


@pytest.mark.parametrize(("name", "x", "truth"), TRUTHS, ids=[t[0] for t in TRUTHS])
def test_a_law_is_recovered_from_its_own_values(name, x, truth):
    law = laws.find_law(name)
    law = law.centred(Columns(x))  # the truth is written around the data's centre
    df = pd.DataFrame({**x, "y": law.value(x, truth)})
    result = fit(df, law, y="y", objective="lsq" if name.startswith("link") else "log_lsq")
    assert result.estimate.params == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize(("name", "x", "truth"), [t for t in TRUTHS if t[0] in ("coupled", "farseer")])
def test_the_printed_parameters_are_those_of_the_formula(name, x, truth):
    law = laws.find_law(name).centred(Columns(x))
    p = law.reported(truth)
    if name == "farseer":
        power = np.exp(p["a1"] * N ** p["alpha"] + p["b1"])
        written = np.exp(p["a3"] * N ** p["gamma"] + p["b3"]) + np.exp(p["a2"] * N ** p["beta"] + p["b2"]) * D**-power
    else:
        written = p["E"] + (p["A"] * N ** -p["alpha"] + p["B"] * D ** -p["beta"]) ** p.get("c", 1.0)
    assert law.value(x, truth) == pytest.approx(written, rel=1e-9)


def test_a_penalty_is_found_where_the_mean_scale_has_no_repeats():
    rare = np.where(np.arange(N.size) % 5 == 0, 1e8, 1e12)
    x = {"N": N, "D": D, "U": rare}
    written = 1.7 + 400 * N**-0.34 + 2000 * D**-0.36 + 0.002 * N / 1e8 * np.where(rare == 1e8, D / 1e8 - 1, 0)
    assert laws.PENALISED.value(x, PENALISED) == pytest.approx(written)
    result = fit(pd.DataFrame({**x, "y": written}), "penalised", y="y", objective="log_lsq")
    assert dict(result.params) == pytest.approx(PENALISED, rel=1e-4)
    assert not result.flags


def test_at_one_size_the_data_half_of_the_law_of_repeats_is_fitted():
    truth = {"E": 1.7, "B": 2000.0, "beta": 0.36, "R_D": 15.0}
    law = laws.repeated(sizes=False)
    df = pd.DataFrame({"D": D, "U": U, "y": law.value({"D": D, "U": U}, truth)})
    assert dict(fit(df, law, y="y", objective="log_lsq").params) == pytest.approx(truth, rel=1e-5)


def test_the_full_law_of_repeats_is_muennighoffs_and_no_valley_of_theirs_is_missed():
    published = {"E": 1.87, "A": 521.0, "B": 1488.0, "alpha": 0.353, "beta": 0.353, "R_D": 15.4, "R_N": 5.31}
    # 4 B parameters, 200 B tokens of 20 B: with 1.02 B parameters for these and R_N = 2.92, R_D = 9
    size = 1.02e9 * (1 + 5.31 * (1 - np.exp(-(4 / 1.02 - 1) / 5.31)))
    data = 20e9 * (1 + 15.4 * (1 - np.exp(-9 / 15.4)))
    one = {"N": [4e9], "D": [200e9], "U": [20e9], "V": [1.02e9]}
    assert laws.REPEATED_BOTH.value(one, published) == pytest.approx(1.87 + 521 * size**-0.353 + 1488 * data**-0.353)
    df = pd.read_csv(BOARD / "data-constrained-all.csv", comment="#")  # their runs
    df["V"] = 0.051 * df["U"]
    found = fit(df, "repeated_both", y="loss", objective="huber_log")
    near = {name: (value / 2, value * 2) for name, value in published.items()}
    theirs = fit(df, "repeated_both", y="loss", objective="huber_log", bounds=near)
    assert found.objective_value <= theirs.objective_value * (1 + 1e-6)


@pytest.mark.parametrize(("name", "x", "truth"), TRUTHS, ids=[t[0] for t in TRUTHS])
def test_gradients_agree_with_differences(name, x, truth):
    law = laws.find_law(name)
    problem = make_problem(law, x, np.ones(len(next(iter(x.values())))), LSQ)
    nonlinear = [np.log(truth[p.name]) if p.log else truth[p.name] for p in law.nonlinear]
    vector = np.array([*np.ones(len(law.linear)), *nonlinear])
    _, jacobian = problem.predict_and_jacobian(vector)
    for row, step in zip(jacobian, 1e-6 * np.eye(len(vector)), strict=True):
        up, down = problem.predict(np.stack([vector + step, vector - step]))
        np.testing.assert_allclose(row, (up - down) / 2e-6, rtol=1e-5, atol=1e-7 * np.max(np.abs(up)))


def test_kaplans_published_constants_come_back():
    a_n, a_d, n_c, d_c = 0.076, 0.095, 8.8e13, 5.4e13
    df = pd.DataFrame({"N": N, "D": D, "y": ((n_c / N) ** (a_n / a_d) + d_c / D) ** a_d})
    result = fit(df, laws.KAPLAN, y="y", objective="log_lsq")
    assert dict(result.params) == pytest.approx({"aN": a_n, "aD": a_d, "Nc": n_c, "Dc": d_c}, rel=1e-6)


def test_a_law_in_x_goes_on_any_column():
    df = pd.DataFrame({"flops": X["x"], "y": 2 * X["x"] ** -0.2})
    assert fit(df, "power:flops", y="y").params["a"] == pytest.approx(0.2)
    with pytest.raises(AnalysisError, match="powr"):
        laws.find_law("powr")
