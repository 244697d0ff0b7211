"""Noise components: known spreads are recovered, and what is not known is said."""

from pathlib import Path

import numpy as np
import pytest

from aimscale.analysis.effects.noise_sources import noise
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.table.read import read_tables


def of_kind(found, kind):
    return next((each for each in found.itertuples() if each.kind == kind), None)


def test_the_seeds_spread_is_recovered_and_its_interval_counts_runs(known_study):
    df = known_study({"seeds": list(range(12)), "seed_sd": 0.01, "row_sd": 0.002})
    found = noise(df)
    seeds = of_kind(found, "seeds")
    assert seeds.value == pytest.approx(np.hypot(0.01, 0.002), rel=0.2)
    assert seeds.low < np.hypot(0.01, 0.002) < seeds.high
    assert seeds.basis.startswith("66 ")


def test_what_the_table_does_not_hold_is_said(known_study):
    rows = known_study({"sizes": ["s1", "s3"], "seeds": [0, 1, 2], "budgets": [8000, 32000]})
    rows["val_loss_se"] = 0.02 * rows["val_loss"]
    assert of_kind(noise(rows), "images").value == pytest.approx(0.02)
    assert of_kind(noise(rows[rows["seed"] == 0]), "seeds") is None
    with pytest.raises(AnalysisError, match="run more seeds"):
        noise(rows[rows["seed"] == 0].drop(columns="val_loss_se"))
    with pytest.raises(AnalysisError, match="'loss'"):
        noise(rows, y="loss")
    with pytest.raises(AnalysisError, match="val_loss"):
        noise(rows.assign(status="failed"))


@pytest.mark.parametrize("setting", ["lr_peak", "batch_size", "optimiser.weight_decay"])
def test_seeds_that_differ_in_a_setting_as_well_are_no_replicates(known_study, setting):
    rows = known_study({"sizes": ["s1", "s3"], "seeds": [0, 1, 2], "budgets": [8000, 32000]}).assign(val_loss_se=0.01)
    tuned = rows.assign(**{setting: rows["seed"].map({0: 1.0, 1: 2.0, 2: 4.0})})
    assert of_kind(noise(tuned), "seeds") is None


def test_scatter_about_a_law_that_does_not_fit_is_less_than_the_whole_spread():
    table = read_tables([Path(__file__).parents[3] / "docs/study/published/cifar/data/cifar.parquet"])
    scatter = of_kind(noise(table), "law")
    assert 0.004 < scatter.value < 0.008  # misfit passed for errors of sizes of 16 %


def test_what_sizes_share_is_told_apart_from_the_scatter_of_points(known_study):
    """Three seeds do not average a misfit of sizes away, which a law's intervals take for an error of sizes."""
    df = known_study({"seeds": [0, 1, 2], "seed_sd": 0.001, "row_sd": 0.001})
    off = df["size"].map({size: 0.02 * (-1) ** i for i, size in enumerate(df["size"].unique())})
    found = noise(df.assign(val_loss=df["val_loss"] * np.exp(off)))
    assert of_kind(found, "sizes").value == pytest.approx(0.02, rel=0.5)
    assert of_kind(found, "seeds").value < 0.003
    assert "a size" in of_kind(found, "sizes").source
    sound = noise(df)
    assert (of_kind(sound, "sizes") or of_kind(sound, "seeds")).value < 0.003
