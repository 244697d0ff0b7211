"""What speaks against a law is said: replicates, patterns, the smallest scale, a badly tuned size."""

import numpy as np
import pandas as pd
import pytest

from aimscale.analysis import fit, laws
from aimscale.analysis.coverage.designs import Design, measured
from aimscale.analysis.inference.lackoffit import replicate_test


def flags_of(df: pd.DataFrame, y: str = "val_loss", law: str = "chinchilla") -> list[str]:
    return list(fit(law, df, y=y, resamples=300).flags)


def noisy_grid(rng: np.random.Generator, sizes: int = 6, budgets: int = 5) -> pd.DataFrame:
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e5, 1e7, sizes), np.geomspace(1e5, 3e6, budgets)))
    loss = (0.2 + 30 * n**-0.4 + 40 * d**-0.5) * np.exp(0.003 * rng.standard_normal(n.size))
    return pd.DataFrame({"size": [f"s{v:.0f}" for v in n], "N": n, "D": d, "val_loss": loss})


@pytest.mark.parametrize(("sizes", "budgets"), [(5, 4), (6, 5)])
def test_a_size_ten_percent_off_is_named_and_none_of_a_sound_table(sizes, budgets):
    rng, named, falsely = np.random.default_rng(0), 0, 0
    for k in range(25):
        df = noisy_grid(rng, sizes, budgets)
        falsely += any(flag.startswith("Size ") for flag in flags_of(df))
        bad = df["size"].unique()[k % sizes]
        df.loc[df["size"] == bad, "val_loss"] *= 1.1
        named += any(flag.startswith(f"Size {bad} lies ") and "above the law" in flag for flag in flags_of(df))
    assert named >= 23
    assert falsely <= 2


def test_the_f_test_is_exact_for_a_straight_line():
    rng = np.random.default_rng(1)
    x, cells = np.repeat(np.arange(8.0), 3), np.repeat(np.arange(8), 3)
    design = np.column_stack([np.ones(24), x])
    p_values = []
    for _ in range(400):
        y = rng.standard_normal(24)
        residual = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
        p_values.append(replicate_test(residual, design, np.ones(24), cells).p_value)
    assert np.mean(np.array(p_values) < 0.1) == pytest.approx(0.1, abs=0.05)
    assert replicate_test(residual, design, np.ones(24), np.arange(24)) is None


def test_replicate_seeds_tell_lack_of_fit_from_noise_of_runs():
    rng = np.random.default_rng(2)
    said = {}
    for errors in ("run", "size"):
        design = Design(sizes=7, budgets=5, seeds=3, errors=errors)
        tables = [measured(design.scales(), errors, rng) for _ in range(8)]
        said[errors] = sum("scatter more than replicate seeds" in " ".join(flags_of(df, "loss")) for df in tables)
    assert said["run"] <= 1  # seeds of a run share their error over budgets: the test knows
    assert said["size"] >= 6


def test_without_replicates_a_wrong_form_shows_in_its_residuals():
    rng = np.random.default_rng(3)
    df = noisy_grid(rng)
    df["val_loss"] = 1.0 * (df["N"] / 1e5) ** -0.2 * (df["D"] / 1e5) ** -0.3 * np.exp(0.003 * rng.standard_normal(30))
    assert any("its residuals follow ln N x ln D" in flag for flag in flags_of(df))


def test_an_exponent_that_hangs_on_the_smallest_scale_is_told():
    rng = np.random.default_rng(4)
    df = noisy_grid(rng)
    df.loc[df["D"] == df["D"].min(), "val_loss"] *= 1.06
    said = [flag for flag in flags_of(df) if flag.startswith("beta hangs on the smallest D: it is ")]
    assert said
    assert fit(laws.CHINCHILLA, df, resamples=0).params["beta"] > 0.55
