"""The law of repeated data: R_D is recovered where it is bounded, and said to have no end where it has none."""

import numpy as np
import pytest

from aimscale.analysis.effects.repetition import repeats
from aimscale.analysis.errors import AnalysisError

GRID = {"sizes": ["s3", "s5"], "uniques": [1000, 4000, 16000, 64000], "seeds": [0, 1], "seed_sd": 0.001}


def test_a_known_worth_of_repeats_is_recovered(known_study):
    found = repeats(known_study(GRID))
    i = found.fit.intervals["R_D"]
    assert i.low < 6.0 < i.high
    assert not found.is_unbounded
    assert found.max_epochs == 64
    row = found.table.set_index("epochs").loc[4]
    fourth = 6 * (np.exp(-2 / 6) - np.exp(-3 / 6))
    assert row["worth"] == pytest.approx(fourth, abs=0.08)
    assert row["worth_low"] < fourth < row["worth_high"]
    assert row["effective"] == pytest.approx(1 + 6 * (1 - np.exp(-0.5)), abs=0.15)


def test_repeats_as_good_as_new_have_no_upper_end_but_a_worth(known_study):
    df = known_study(GRID | {"uniques": [16000, 64000]})
    truth = 0.2 + 8 * df["params_total"] ** -0.4 + 12 * df["images_seen"] ** -0.5
    df["val_loss"] = truth * np.exp(0.001 * np.random.default_rng(0).standard_normal(len(df)))
    found = repeats(df)
    assert found.is_unbounded
    assert "no upper end" in found.headline()
    second = found.table.set_index("epochs").loc[2]
    assert second["worth_low"] > 0.5  # what a repeat is worth is known though R_D is not
    assert second["worth_high"] > 0.99


def test_at_one_size_the_data_half_alone_is_fitted(known_study):
    found = repeats(known_study(GRID | {"sizes": ["s5"]}))
    assert "alpha" not in found.fit.params
    assert found.fit.params["R_D"] == pytest.approx(6, rel=0.2)


def test_tables_without_repeats_are_refused(known_study):
    with pytest.raises(AnalysisError, match="unique_images"):
        repeats(known_study({"seeds": [0]}))
    with pytest.raises(AnalysisError, match="most passes: 1"):
        repeats(known_study({"seeds": [0], "uniques": [64000, 128000]}))
    with pytest.raises(AnalysisError, match="U"):
        repeats(known_study({"seeds": [0]}).drop(columns="unique_images"))
