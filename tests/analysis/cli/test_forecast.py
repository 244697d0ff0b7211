"""`aimscale forecast --law curve`: one curve over one column."""

import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from aimscale.analysis.errors import AnalysisError
from aimscale.sweeps.cli.main import verb


def run(*args: object):
    return CliRunner().invoke(verb("forecast"), [str(a) for a in args], catch_exceptions=False).output


def test_a_curve_is_extrapolated(tmp_path):
    x = np.geomspace(1e3, 1e6, 20)
    pd.DataFrame({"step": x, "err": 0.1 + 3 * x**-0.3}).to_csv(tmp_path / "curve.csv", index=False)
    asked = [tmp_path / "curve.csv", "--law", "curve", "--y", "err"]
    found = json.loads(run(*asked, "--at", "step=1e7", "--json"))["forecast"]
    assert found["value"] == pytest.approx(0.1 + 3 * 1e7**-0.3, rel=2e-3)
    assert found["ci_lo"] <= found["value"] <= found["ci_hi"]
    assert "at step = 1e+07, 10 times beyond" in run(*asked, "--at", "step=1e7")
    with pytest.raises(AnalysisError, match="one scale"):
        run(*asked, "--at", "step=1e7,N=3")
    with pytest.raises(AnalysisError, match="--register"):
        run(*asked, "--at", "step=1e7", "--register")
