"""Names under which users of statsmodels look for things: intervals, covariance, residuals; and pickles."""

import pickle
import re

import numpy as np
import pytest
import statsmodels.api as sm

from aimscale.analysis import fit, laws
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


def test_residuals_are_those_of_statsmodels(grid):
    law, log_y = fit(grid, "power:N", objective="log_lsq"), np.log(grid["val_loss"])
    theirs = sm.OLS(log_y, sm.add_constant(np.log(grid["params_total"]))).fit()
    np.testing.assert_allclose(law.resid, theirs.resid, atol=1e-7)


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
    with pytest.raises(AnalysisError, match=re.escape('columns={"L": "THEIRS"}')):
        fit(theirs, "chinchilla")
    assert fit(theirs, "chinchilla", columns={"L": "loss"}).params == fit(grid, "chinchilla").params
    large = fit(grid.assign(params_total=grid["params_total"] * 1e20), "kaplan")
    assert re.search(r"\\times\$\$10\^\{\d+\}\$", large.to_latex())
