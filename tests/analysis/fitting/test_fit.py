"""Fits of known laws and of the published Chinchilla measurements; what is fitted, refused and left out."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from aimscale.analysis import fit, laws
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.problem import HUBER_LOG, global_minimum, huber_log, make_problem, minimise
from aimscale.analysis.laws import Columns, Law, coefficient, exponent

BOARD = Path(__file__).parents[2] / "board"
PAPER = {"A": 482.01, "B": 2085.43, "E": 1.8169, "alpha": 0.3478, "beta": 0.3659}
"""Besiroglu et al. 2024, table 1: a Huber likelihood whose scale is fitted too; its limit is least absolute values."""

REPEATS = {"E": 0.2, "A": 8.0, "B": 12.0, "alpha": 0.4, "beta": 0.5, "R_D": 6.0}


def test_epoch_huber_optimum_is_at_or_below_the_published_one(epoch):
    result = fit(epoch, laws.CHINCHILLA, y="loss", objective="huber_log")
    assert result.objective_value <= 1.0182740346e-3
    published = {"A": 477.842, "B": 2143.864, "E": 1.817236, "alpha": 0.347313, "beta": 0.367183}
    for name, value in published.items():
        assert result.params[name] == pytest.approx(value, rel=3e-4)
    # their bootstrap resamples rows; ours knows that points of a size and of a budget share what the law misses
    for name, resampled in (("alpha", 0.0154), ("beta", 0.0206)):
        _, (error,), _ = result.estimate.error_of(lambda params, name=name: params[name])
        assert 0.8 < error / resampled < 2.5


def test_epochs_printed_set_is_the_limit_of_narrow_zones(epoch):
    result = fit(epoch, laws.CHINCHILLA, y="loss", objective="huber_log:1e-8")
    for name, value in PAPER.items():
        assert result.params[name] == pytest.approx(value, rel=2e-4)
    assert huber_log().loss(result.data["residual"].to_numpy()).sum() == pytest.approx(1.0186447e-3, rel=1e-6)


def test_variable_projection_least_squares_on_217_points(epoch):
    df = epoch[epoch["C"] < 1e21].assign(N=lambda d: d["N"] / 1e6, D=lambda d: d["D"] / 1e9)
    result = fit(df, laws.CHINCHILLA, y="loss", objective="lsq")
    assert result.num_points == 217
    published = {"E": 1.9051, "A": 4.0005, "B": 1.0509, "alpha": 0.3511, "beta": 0.4587}
    assert {k: round(result.params[k], 4) for k in published} == published


def test_no_random_start_finds_a_lower_minimum(chinchilla):
    x, y = {"N": chinchilla["N"].to_numpy(), "D": chinchilla["D"].to_numpy()}, chinchilla["loss"].to_numpy()
    problem = make_problem(laws.CHINCHILLA, x, y, HUBER_LOG)
    rng = np.random.default_rng(0)
    low, high = [0, 0, 0, np.log(0.05), np.log(0.05)], [2, 1, 1, np.log(2), np.log(2)]
    totals = [problem.total(minimise(problem, start)) for start in rng.uniform(low, high, (20, 5))]
    assert min(totals) >= problem.total(global_minimum(problem)) * (1 - 1e-9)
    problem = make_problem(laws.COUPLED.centred(Columns(x)), x, y, HUBER_LOG)
    low, high = np.maximum(problem.lower, -3), np.minimum(problem.upper, 3)
    totals = [problem.total(minimise(problem, start)) for start in rng.uniform(low, high, (10, len(low)))]
    assert min(totals) >= problem.total(global_minimum(problem)) * (1 - 1e-6)


def test_the_default_finds_the_lowest_minimum_of_its_own_zone():
    """The lowest of the narrow zone that its scale is found with is another valley's on this table."""
    df = pd.read_csv(BOARD / "own-photographs.csv", comment="#")
    result, rng = fit(df, "coupled", y="loss", is_tested=False), np.random.default_rng(0)
    problem = result.estimate.problem
    low, high = np.maximum(problem.lower, -3), np.minimum(problem.upper, 3)
    totals = [problem.total(minimise(problem, start)) for start in rng.uniform(low, high, (15, len(low)))]
    assert min(totals) >= result.objective_value * (1 - 1e-3)


def test_an_outlier_neither_ruins_the_default_nor_makes_it_forget_the_mean(grid):
    truth = fit(grid, laws.CHINCHILLA, objective="log_lsq")
    assert fit(grid, laws.CHINCHILLA).params["alpha"] == pytest.approx(truth.params["alpha"], abs=0.01)
    grid.loc[17, "val_loss"] *= 1.3
    robust = fit(grid, laws.CHINCHILLA)
    squares = fit(grid, laws.CHINCHILLA, objective="log_lsq")
    assert abs(robust.params["alpha"] - 0.4) < 0.03 < abs(squares.params["alpha"] - 0.4)
    assert robust.intervals["alpha"].low < 0.4 < robust.intervals["alpha"].high


def test_a_users_law_of_ten_lines_needs_no_gradient():
    law = Law(
        name="exponential",
        formula="y = E + A exp(-k x)",
        variables=("x",),
        linear=(coefficient("E"), coefficient("A")),
        nonlinear=(exponent("k"),),
        basis=lambda x, t: (1.0, np.exp(-t["k"] * x["x"])),
    )
    x = np.linspace(1, 5, 12)
    result = fit(pd.DataFrame({"x": x, "y": 1 + 3 * np.exp(-0.7 * x)}), law, y="y", objective="lsq")
    assert dict(result.params) == pytest.approx({"E": 1, "A": 3, "k": 0.7}, rel=1e-6)


@pytest.mark.parametrize("name", laws.LAWS)
def test_every_law_recovers_planted_parameters(grid, name):
    """Those that a fit to a noisy table gives are planted into a table without noise."""
    law = laws.find_law(f"{name}:N" if laws.LAWS[name].variables == ("x",) else name)
    table = grid.assign(U=np.where(np.arange(len(grid)) % 2, 1e5, 4e5), V=1e4 * grid["params_total"] ** 0.3)
    if "U" in law.variables:  # a repeat is worth less than a new image
        at = {v: table[name].to_numpy() for v, name in (("N", "params_total"), ("D", "images_seen"), ("U", "U"))}
        table["val_loss"] *= laws.REPEATED.value(at, REPEATS) / laws.CHINCHILLA.value(at, REPEATS)
    y = "accuracy" if "L" in law.variables else "val_loss"
    table["accuracy"] = 0.1 + 0.6 / (1 + np.exp(8 * (table["val_loss"] - table["val_loss"].median())))
    found = fit(table, law, y=y, is_tested=False)
    again = fit(table.assign(**{y: found.predict()["value"].to_numpy()}), law, y=y, is_tested=False)
    assert again.data["residual"].abs().max() < 1e-4
    identified = [each for each in found.params.index if each not in found.not_identified]
    assert identified, f"nothing of {name} can be told from 6 sizes and 5 budgets: plant its parameters in a test here"
    for each in identified:
        assert again.params[each] == pytest.approx(found.params[each], rel=0.05), each


def test_fixed_and_bounded_parameters(grid):
    held = {"E": 0.1, "beta": 0.45}
    result = fit(grid, laws.CHINCHILLA, fixed=held, bounds={"alpha": (0.1, 0.2)})
    assert [result.params[k] for k in ("E", "beta", "alpha")] == pytest.approx([0.1, 0.45, 0.2])
    assert result.shown("alpha") == "not identified"
    assert result.shown("E") == "0.1 (held)"
    assert set(result.intervals) == {"A", "B", "alpha", "a", "b"}
    assert result.table.set_index("parameter").loc["E", "note"] == "held"


@pytest.mark.parametrize(("bounds", "told"), [((0.3, 1.0), "lower bound 0.3"), ((0.01, 0.05), "upper bound 0.05")])
def test_a_coefficient_on_a_bound_of_its_own_is_told(grid, bounds, told):
    result = fit(grid, laws.CHINCHILLA, bounds={"E": bounds})
    assert result.params["E"] in bounds
    assert f"E lies on its {told}." in [flag.text for flag in result.flags]


def test_rows_are_left_out_by_name_never_silently(grid):
    grid.loc[0, "val_loss"] = np.nan
    grid.loc[1, "val_loss"] = -1.0
    grid.loc[2, "status"] = "diverged"
    doubled = pd.concat([grid, grid.iloc[[5]]], ignore_index=True)
    result = fit(doubled, laws.CHINCHILLA)
    assert (result.num_points, result.num_rows) == (27, 31)
    left_out = {(each.kind, each.subject): each.number for each in result.exclusions}
    assert left_out == {("status", ""): 1, ("not positive", "val_loss"): 2, ("repeat", ""): 1}


@pytest.mark.parametrize(
    ("change", "options", "subject"),
    [
        (lambda df: df.assign(images_seen=1e6), {}, "images_seen"),
        (lambda df: df.head(5), {}, "5 free parameters"),
        (lambda df: df.drop(columns="params_total"), {}, '"N": "THEIRS"'),
        (lambda df: df, {"fixed": {"alpha": -1.0}}, "alpha"),
        (lambda df: df, {"fixed": {"gamma": 1.0}}, "gamma"),
        (lambda df: df, {"bounds": {"alpha": (0.5, 0.1)}}, "alpha"),
        (lambda df: df, {"objective": "mse"}, "mse"),
        (lambda df: df, {"objective": "huber_log:wide"}, "wide"),
    ],
)
def test_what_cannot_be_fitted_is_refused(grid, change, options, subject):
    with pytest.raises(AnalysisError, match=subject):
        fit(change(grid), laws.CHINCHILLA, **options)
