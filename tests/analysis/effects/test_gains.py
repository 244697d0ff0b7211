"""What a change is worth in compute."""

import numpy as np
import pandas as pd
import pytest

from aimscale.analysis.effects.contrasts import contrast
from aimscale.analysis.effects.gains import with_gains

TRUTH = {"E": 0.2, "A": 8.0, "B": 12.0, "alpha": 0.4, "beta": 0.5}
EXPONENT = 1 / (1 / 0.4 + 1 / 0.5)


def table(gain, noise: float = 0.0005, seed: int = 0) -> pd.DataFrame:
    """5 sizes x 5 budgets x 2 seeds at two settings; the second is worth gain(N) times the compute."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, n in enumerate(np.geomspace(2e4, 6e6, 5)):
        for s in (0, 1):
            for d in np.geomspace(4e3, 1e6, 5):
                for level in ("paired", "none"):
                    excess = TRUTH["A"] * n ** -TRUTH["alpha"] + TRUTH["B"] * d ** -TRUTH["beta"]
                    excess *= gain(n) ** -EXPONENT if level == "none" else 1.0
                    loss = (TRUTH["E"] + excess) * np.exp(noise * rng.standard_normal())
                    row = {"run_id": f"{i} {s} {level}", "size": f"s{i}", "seed": s, "prefix": level, "images_seen": d}
                    rows.append({**row, "params_total": n, "val_loss": loss, "status": "complete"})
    return pd.DataFrame(rows)


def gain_in(df: pd.DataFrame):
    found = with_gains(contrast(df, by="prefix", measures=["val_loss"]), df)
    by_law = [each for each in found.gains if not each.at_one_size]
    assert len(by_law) == 1, found.left_out
    assert by_law[0].sentence() in found.summary()
    return by_law[0]


def at_one_size(df: pd.DataFrame):
    """Gain and reasons why there is none."""
    found = with_gains(contrast(df, by="prefix", measures=["val_loss"]), df)
    return next((each for each in found.gains if each.at_one_size), None), found.left_out


def faster(gain: float, cost: float = 1.0, noise: float = 0.0005) -> pd.DataFrame:
    """A level that learns from D images what the baseline learns from gain D; an image costs `cost` times as much."""
    df = table(lambda n: 1.0, noise=noise)
    is_level, n, d = df["prefix"] == "none", df["params_total"], df["images_seen"]
    excess = TRUTH["A"] * n ** -TRUTH["alpha"] + TRUTH["B"] * (gain * d) ** -TRUTH["beta"]
    noise_of = df["val_loss"] / (TRUTH["E"] + TRUTH["A"] * n ** -TRUTH["alpha"] + TRUTH["B"] * d ** -TRUTH["beta"])
    df.loc[is_level, "val_loss"] = (noise_of * (TRUTH["E"] + excess))[is_level]
    df["flops_train"] = 6 * n * d * np.where(is_level, cost, 1.0)
    return df[~is_level | df["images_seen"].between(1e4, 3e5)]


def test_a_constant_gain_comes_back_with_an_interval_and_no_trend():
    held = 0
    for seed in range(5):
        gain = gain_in(table(lambda n: 1.2, seed=seed))
        held += gain.low < 1.2 < gain.high
        assert gain.factor == pytest.approx(1.2, abs=0.03)
        assert gain.low > 1
    assert held >= 4
    assert "none is worth 1." in gain.sentence()


def test_a_gain_that_grows_or_shrinks_with_size_is_said_to():
    grows = gain_in(table(lambda n: 1.1 * (n / 2e4) ** 0.1))
    assert grows.growth_low < 10**0.1 < grows.growth_high
    assert "grows with size" in grows.sentence()
    assert "shrinks with size" in gain_in(table(lambda n: 1.8 * (n / 2e4) ** -0.1)).sentence()
    assert "not shown to change with size" in gain_in(table(lambda n: 1.5, noise=0.002)).sentence()


def test_without_a_law_the_gain_is_left_out_by_name():
    df = table(lambda n: 1.2)
    one = df[df["size"] == "s2"]
    found = with_gains(contrast(one, by="prefix", measures=["val_loss"]), one)
    assert found.gains == ()
    assert any(line.startswith("Compute-equivalent gains are left out") for line in found.left_out)


def test_at_one_size_the_baselines_own_budgets_say_what_a_level_is_worth():
    gain, _ = at_one_size(faster(1.5, noise=0.003))
    assert gain.factor == pytest.approx(1.5, rel=0.05)
    assert 1 < gain.low < 1.5 < gain.high < 2
    assert "none is worth 1.5" in gain.sentence()
    assert "compute of paired at the same size" in gain.sentence()
    dear, _ = at_one_size(faster(1.5, cost=2.0, noise=1e-6))
    assert dear.factor == pytest.approx(0.75, rel=0.05)


def test_a_loss_outside_the_baselines_budgets_is_left_out_by_name():
    gain, left_out = at_one_size(faster(100))
    assert gain is None
    assert any("at the same size is left out: 30 of 30 losses lie outside" in line for line in left_out)


def test_a_curve_that_rises_is_no_curve():
    df = faster(1.5)
    df.loc[
        (df["prefix"] == "paired") & (df["images_seen"] == df["images_seen"].max()) & (df["seed"] == 0), "val_loss"
    ] = 9
    gain, left_out = at_one_size(df)
    assert gain is None
    assert any("do not fall from budget to budget" in line for line in left_out)


def test_two_budgets_are_no_curve():
    df = faster(1.5)
    gain, left_out = at_one_size(df[df["images_seen"].between(1e4, 7e4)])
    assert gain is None
    assert not any("at the same size" in line for line in left_out)


def test_losses_of_other_orders_are_no_ground_for_a_gain():
    df = table(lambda n: 1.2).rename(columns={"prefix": "patch_order"}).replace({"patch_order": {"paired": "raster"}})
    found = with_gains(contrast(df, by="patch_order", measures=["val_loss"]), df)
    assert found.gains == ()
    assert any("differ in what is asked" in line for line in found.left_out)
