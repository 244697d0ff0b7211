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
    assert len(found.gains) == 1, found.left_out
    assert found.gains[0].sentence() in found.summary()
    return found.gains[0]


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
