"""How exponents follow from what is counted: a change of units does nothing, another power of N does what it must."""

import numpy as np
import pytest

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.frontier.definitions import by_definition


def test_proportional_counts_share_one_exponent(known_study):
    found = by_definition(known_study({"seeds": [0, 1]}), resamples=60)
    assert list(found.table["N"].unique()) == ["total", "trunk", "trunk and patches", "head"]
    assert list(found.table["C"].unique()) == ["counted", "executed", "6ND"]
    assert np.ptp(found.table["alpha"]) < 1e-3
    assert np.ptp(found.table["exponent"]) < 2e-3
    assert (found.table["alpha_low"] < found.table["alpha"]).all()
    assert "6 sizes" in found.interval_method


def test_a_trunk_that_grows_as_a_power_of_the_whole_has_the_exponent_over_that_power(known_study):
    df = known_study({"seeds": [0], "seed_sd": 0.0, "row_sd": 1e-4})
    df["params_trunk"] = 0.01 * df["params_total"] ** 1.25
    df = df.drop(columns=["params_head", "params_preprocessor"])
    table = by_definition(df, resamples=60).table.set_index(["N", "C"])
    total, trunk = table.loc[("total", "counted")], table.loc[("trunk", "counted")]
    assert trunk["alpha"] == pytest.approx(total["alpha"] / 1.25, rel=0.02)
    # N*(C) of the trunk is the whole's, to the power: at the same C the same model is best
    assert trunk["exponent"] == pytest.approx(1.25 * total["exponent"], rel=0.05)
    # 6ND with the trunk's N is another C
    assert table.loc[("trunk", "6ND"), "exponent"] != pytest.approx(trunk["exponent"], rel=0.05)
    assert total["alpha"] == pytest.approx(fit("chinchilla", df, resamples=0).params["alpha"])


def test_an_exponent_that_is_not_identified_has_no_digits(known_study):
    df = known_study({"seeds": [0, 1]})
    rng = np.random.default_rng(0)
    df["val_loss"] = (0.3 + 12 * df["images_seen"] ** -0.5) * np.exp(0.002 * rng.standard_normal(len(df)))
    found = by_definition(df, resamples=60)
    assert found.table["alpha"].isna().all()
    assert "not identified" in found.sentence()


def test_it_draws_and_refuses(known_study):
    df = known_study({"seeds": [0]})
    found = by_definition(df, resamples=40)
    assert len(found.table) == 12
    assert len(found.plot().axes) == 3
    with pytest.raises(AnalysisError, match="params_trunk"):
        by_definition(df.drop(columns=["params_trunk", "params_head"]))
