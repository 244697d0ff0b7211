"""What a change is worth in compute."""

import numpy as np
import pandas as pd
import pytest

from aimscale.analysis.effects.contrasts import contrast
from aimscale.analysis.effects.gains import gains

TRUTH = {"E": 0.2, "A": 8.0, "B": 12.0, "alpha": 0.4, "beta": 0.5}


def faster(gain: float, cost: float = 1.0, noise: float = 0.0005, seed: int = 0, level: str = "none") -> pd.DataFrame:
    """5 sizes x 5 budgets x 2 seeds at two settings; the second learns from D images what the first learns from
    gain D, and an image costs it `cost` times as much."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, n in enumerate(np.geomspace(2e4, 6e6, 5)):
        for s in (0, 1):
            for d in np.geomspace(4e3, 1e6, 5):
                for prefix, factor, price in (("paired", 1.0, 1.0), (level, gain, cost)):
                    loss = TRUTH["E"] + TRUTH["A"] * n ** -TRUTH["alpha"] + TRUTH["B"] * (factor * d) ** -TRUTH["beta"]
                    row = {"run_id": f"{i} {s} {prefix}", "size": f"s{i}", "seed": s, "prefix": prefix}
                    row |= {"images_seen": d, "params_total": n, "flops_train": 6 * n * d * price, "status": "complete"}
                    rows.append({**row, "val_loss": loss * np.exp(noise * rng.standard_normal())})
    df = pd.DataFrame(rows)
    return df[(df["prefix"] == "paired") | df["images_seen"].between(1e4, 3e5)]


def gains_in(df: pd.DataFrame, by: str = "prefix"):
    return gains(contrast(df, by=by, measures=["val_loss"]))


def test_a_constant_gain_comes_back_with_an_interval():
    held = 0
    for seed in range(5):
        (gain,) = gains_in(faster(1.5, noise=0.002, seed=seed))
        held += gain.low < 1.5 < gain.high
        assert gain.factor == pytest.approx(1.5, rel=0.05)
        assert gain.low > 1
    assert held >= 4
    (dear,) = gains_in(faster(1.5, cost=2.0, noise=1e-6))
    assert dear.factor == pytest.approx(0.75, rel=0.05)


def test_a_gain_reaches_as_far_as_the_sizes_that_it_is_from():
    df = faster(1.5)
    (gain,) = gains_in(df)
    assert "at 5 sizes" in str(gain)
    (gain,) = gains_in(df[df["size"].isin(["s1", "s2"])])
    assert "for these two sizes" in str(gain)
    one_seed = df[df["size"].isin(["s1", "s2"]) & (df["seed"] == 0)]
    (unknown,) = gains_in(one_seed)
    assert "not known from 2 pairs" in str(unknown)


def test_losses_outside_the_baselines_budgets_or_beside_a_curve_that_rises_are_left_out_by_name():
    rising = faster(1.5)
    last = (rising["prefix"] == "paired") & (rising["images_seen"] == rising["images_seen"].max())
    rising.loc[last & (rising["seed"] == 0), "val_loss"] = 9
    for df in (faster(100), rising):
        found = gains_in(df)
        assert [(flag.kind, flag.subject) for flag in found] == [("no_gain_outside", "none")]


def test_two_budgets_are_no_curve():
    df = faster(1.5)
    assert gains_in(df[df["images_seen"].between(1e4, 7e4)]) == ()


def test_losses_of_other_orders_are_no_ground_for_a_gain():
    df = faster(1.2, level="hashed").rename(columns={"prefix": "patch_order"})
    (flag,) = gains_in(df.replace({"patch_order": {"paired": "raster"}}), by="patch_order")
    assert flag.kind == "no_gain_asks"
