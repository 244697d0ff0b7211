"""Names under which users of statsmodels look for things: intervals, covariance, residuals, likelihood; and pickles."""

import pickle
import re

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from tables import law_grid

from aimscale.analysis import fit, laws
from aimscale.analysis.errors import AnalysisError


def test_intervals_errors_and_covariance_are_those_of_the_table():
    law = fit(law_grid(noise=0.003), "coupled", fixed={"c": 1.0})
    ends = law.conf_int()
    assert [list(ends), "c" in ends.index] == [["lower", "upper"], False]
    assert ends.loc["a"].tolist() == [law.intervals["a"].low, law.intervals["a"].high]
    _, (error,), _ = law.estimate.error_of(lambda p: p["alpha"])
    assert law.bse["alpha"] == pytest.approx(error)
    assert law.cov.loc["a", "b"] == pytest.approx(-law.cov.loc["a", "a"])
    flat = fit(law_grid(noise=0.003).assign(val_loss=lambda d: 1 + 1e-3 * np.sin(d.index)), "chinchilla")
    assert flat.conf_int().loc["alpha"].isna().all()
    assert "alpha" not in flat.cov


def test_residuals_and_likelihood_are_those_of_statsmodels(grid):
    law = fit(grid, "power:N", objective="log_lsq")
    log_n, log_y = np.log(grid["params_total"]), np.log(grid["val_loss"])
    theirs = sm.OLS(log_y, sm.add_constant(log_n)).fit()
    np.testing.assert_allclose(law.resid, theirs.resid, atol=1e-7)
    np.testing.assert_allclose(np.log(law.fittedvalues), theirs.fittedvalues, atol=1e-7)
    assert law.nobs == theirs.nobs
    shift = log_y.sum()  # theirs is of ln y
    assert [law.llf, law.aic, law.bic] == pytest.approx(
        [theirs.llf - shift, theirs.aic + 2 * shift, theirs.bic + 2 * shift]
    )
    with pytest.raises(AnalysisError, match="log_lsq"):
        _ = fit(grid, "power:N").aic


def test_scales_are_keywords_or_a_table(grid):
    law = fit(grid, "chinchilla")
    pd.testing.assert_frame_equal(law.predict(N=[1e6, 1e7], D=1e7), law.predict({"N": [1e6, 1e7], "D": [1e7, 1e7]}))


@pytest.mark.parametrize("name", [name for name in laws.LAWS if name not in ("repeated_both", "link_sigmoid")])
def test_a_fit_is_pickled_with_its_intervals(grid, name):
    table = grid.assign(U=grid["images_seen"] / 4)
    law = fit(table, f"{name}:N" if "x" in laws.LAWS[name].variables else name, is_tested=False)
    again = pickle.loads(pickle.dumps(law))
    assert again.intervals == law.intervals or again.conf_int().equals(law.conf_int())
    scale = {v: 2 * high for v, (_, high) in law.ranges.items()}
    pd.testing.assert_frame_equal(again.predict(**scale), law.predict(**scale))


def test_errors_name_what_works(grid):
    with pytest.raises(AnalysisError, match=r"give the table first, as in fit\(table, 'chinchilla'\)"):
        fit("chinchilla", grid)
    theirs = grid.rename(columns={"val_loss": "loss"})
    with pytest.raises(AnalysisError, match=re.escape('columns={"L": "THEIRS"}')):
        fit(theirs, "chinchilla")
    assert fit(theirs, "chinchilla", columns={"L": "loss"}).params == fit(grid, "chinchilla").params


def test_a_table_of_latex(grid):
    rows = fit(grid.assign(params_total=grid["params_total"] * 1e20), "kaplan").to_latex()
    assert r"\toprule" in rows
    assert re.search(r"\$\\times\$\$10\^\{\d+\}\$", rows)
    assert "95 \\% interval" in rows
