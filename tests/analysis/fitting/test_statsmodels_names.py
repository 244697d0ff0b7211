"""Names under which users of statsmodels look for things: intervals, covariance, residuals, likelihood; and pickles."""

import pickle
import re

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.stats import t as student

from aimscale.analysis import at_level, contrast, correlate, fit, forecast, held_out, laws
from aimscale.analysis.display import latex
from aimscale.analysis.errors import AnalysisError


def test_intervals_and_covariance_are_those_of_the_table_and_predictions_take_keywords(grid):
    law = fit(grid, "coupled", fixed={"c": 1.0})
    ends = law.conf_int()
    assert [list(ends), "c" in ends.index] == [["lower", "upper"], False]
    assert ends.loc["a"].tolist() == [law.intervals["a"].low, law.intervals["a"].high]
    assert law.cov.loc["alpha", "alpha"] == pytest.approx(law.estimate.error_of(lambda p: p["alpha"])[1][0] ** 2)
    assert law.cov.loc["a", "b"] == pytest.approx(-law.cov.loc["a", "a"])
    assert law.predict(N=[1e6, 1e7], D=1e7).equals(law.predict({"N": [1e6, 1e7], "D": [1e7, 1e7]}))
    with pytest.raises(AnalysisError, match="give N, D"):
        law.predict(N=1e6)
    flat = fit(grid.assign(val_loss=1 + 1e-3 * np.sin(grid.index)), "chinchilla")
    assert flat.conf_int().loc["alpha"].isna().all()
    assert "alpha" not in flat.cov


def test_residuals_and_likelihood_are_those_of_statsmodels(grid):
    law, log_y = fit(grid, "power:N", objective="log_lsq"), np.log(grid["val_loss"])
    theirs = sm.OLS(log_y, sm.add_constant(np.log(grid["params_total"]))).fit()
    np.testing.assert_allclose(law.resid, theirs.resid, atol=1e-7)
    assert law.nobs == theirs.nobs
    ours = np.array([law.llf, law.aic]) + log_y.sum() * np.array([1, -2])  # theirs is of ln y
    assert ours == pytest.approx([theirs.llf, theirs.aic])
    with pytest.raises(AnalysisError, match="log_lsq"):
        _ = fit(grid, "power:N").aic


def test_the_rest_of_statsmodels_names_and_any_function_of_the_parameters(grid):
    law, log_y = fit(grid, "power:N", objective="log_lsq"), np.log(grid["val_loss"])
    theirs = sm.OLS(log_y, sm.add_constant(np.log(grid["params_total"]))).fit()
    np.testing.assert_allclose(law.fittedvalues, np.exp(theirs.fittedvalues))
    assert law.bic - law.aic == pytest.approx(theirs.bic - theirs.aic)
    joint = fit(grid, "chinchilla")
    assert isinstance(joint.params, pd.Series)
    assert joint.bse["alpha"] == pytest.approx(joint.cov.loc["alpha", "alpha"] ** 0.5)
    inside = joint.predict()
    np.testing.assert_allclose(inside["value"], joint.fittedvalues)
    np.testing.assert_allclose(inside["se"], inside["value"] * inside["se_log"])
    ratio = joint.interval(lambda p: np.stack([p["alpha"] / p["beta"], p["alpha"]], axis=-1))
    assert ratio["value"].tolist() == pytest.approx(
        [joint.params["alpha"] / joint.params["beta"], joint.params["alpha"]]
    )
    assert (ratio["lower"] < ratio["value"]).all()
    predictions = held_out(joint, grid, by="N").predictions
    drawn = held_out(joint, grid, by="N").plot().axes[0]
    heights = {round(y, 9) for line in drawn.lines for y in np.ravel(line.get_ydata())}
    assert {round(each, 9) for each in predictions["predicted"]} <= heights


def test_intervals_of_another_level_are_those_of_student_everywhere(grid):
    """A level other than 95 % was a TypeError."""
    law = fit(grid, "chinchilla")
    with at_level(0.68):
        narrow = fit(grid, "chinchilla")
        told = forecast(grid, "N=1e9,D=1e9"), contrast(grid, by="images_seen"), correlate(grid, y="images_seen")
    assert narrow.level == 0.68
    assert law.conf_int(0.68).equals(narrow.conf_int())
    assert narrow.conf_int(0.95).equals(law.conf_int())
    assert law.predict(N=1e8, D=1e8, level=0.68).equals(narrow.predict(N=1e8, D=1e8))
    assert all("68 % interval" in row for row in narrow.cells())
    assert all("68 %" in each.summary() and "95 % interval" not in each.summary() for each in told)
    assert narrow.not_identified == law.not_identified
    assert narrow.flags == law.flags
    wide = law.conf_int(0.99)
    assert (np.diff(wide) > np.diff(law.conf_int())).all()
    half, reach = (np.diff(np.log(each.loc["alpha"]))[0] for each in (law.conf_int(), wide))
    degrees = law.estimate.error_of(lambda p: np.log(p["alpha"]))[2]
    assert reach / half == pytest.approx((student.ppf(0.995, degrees) / student.ppf(0.975, degrees))[0])
    with pytest.raises(AnalysisError, match=r"such as 0\.9"), at_level(95):
        pass


@pytest.mark.parametrize("name", [name for name in laws.LAWS if name not in ("repeated_both", "link_sigmoid")])
def test_a_fit_is_pickled_with_its_intervals(grid, name):
    table = grid.assign(U=grid["images_seen"] / 4)
    law = fit(table, f"{name}:N" if "x" in laws.LAWS[name].variables else name, is_tested=False)
    again, scale = pickle.loads(pickle.dumps(law)), {v: 2 * high for v, (_, high) in law.ranges.items()}
    assert again.conf_int().equals(law.conf_int())
    assert again.predict(**scale).equals(law.predict(**scale))


def test_errors_name_what_works_and_parameters_are_a_table_of_latex(grid):
    with pytest.raises(AnalysisError, match=r"give the table first, as in fit\(table, 'chinchilla'\)"):
        fit("chinchilla", grid)
    theirs = grid.rename(columns={"val_loss": "loss"})
    with pytest.raises(AnalysisError, match=re.escape('columns={"L": "loss"}')):
        fit(theirs, "chinchilla")
    assert fit(theirs, "chinchilla", columns={"L": "loss"}).params.equals(fit(grid, "chinchilla").params)
    large = fit(grid.assign(params_total=grid["params_total"] * 1e20), "kaplan")
    assert re.search(r"\$\\times10\^\{\d+\}\$", large.to_latex())


def test_a_table_of_latex_is_one_of_a_paper(grid):
    fitted = fit(grid.assign(val_loss=grid["val_loss"] * 1000), "chinchilla")
    shown = fitted.summary()
    text = fitted.to_latex()
    assert r"$\alpha$ & " in text
    assert "$E$ & " in text
    assert not re.search(r"\d[kMBT]\b", text)
    assert fitted.summary() == shown  # sentences that were made for LaTeX are not kept for the terminal
    assert latex("1.2×10⁻³ at 95 % of a_b") == r"1.2$\times10^{-3}$ at 95 \% of a\_b"


def test_of_many_cautions_the_worst_stands_before_the_table(grid):
    sizes, budgets = (sorted(grid[name].unique())[:2] for name in ("params_total", "images_seen"))
    few = grid[grid["params_total"].isin(sizes) | grid["images_seen"].isin(budgets[:1])]
    few = few.assign(seed=range(len(few)), colour=["red", "blue", "green"] * (len(few) // 3) + ["red"] * (len(few) % 3))
    few = few.assign(val_loss=few["val_loss"] * few["colour"].map({"red": 1.3, "blue": 1.0, "green": 0.8}))
    fitted = fit(few, "chinchilla")
    before, table, *after = fitted.summary().split("\n\n")
    cautions = [text for key, text in fitted.facts() if key == "caution"]
    assert len(cautions) > 2
    assert before.count("caution ") == 1
    assert f"{len(cautions) - 1} more cautions below the table" in before
    assert table.startswith("parameter")
    assert all(text in "\n\n".join(after) for text in cautions[1:])
    assert "not identified" in cautions[0]
