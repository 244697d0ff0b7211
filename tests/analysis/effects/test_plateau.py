"""First plateaus: found at a size's smallest budgets, and never on what only falls."""

import numpy as np
import pandas as pd
import pytest
from commands import answer

from aimscale.analysis.effects.plateau import plateau_flags
from aimscale.analysis.table.schema import OF_CURVES, results_table, write_table

MEASURED = (0.725, 0.686, 0.595, 0.544, 0.523)
"""Losses of w48-d1 on CIFAR-10 (batch 32) at 4,000 to 64,000 images."""
DURING = (32_000, 40_000, 64_000)


def test_what_only_falls_has_none():
    rng, budgets, found = np.random.default_rng(0), np.geomspace(4000, 64_000, 5), 0
    for _ in range(200):
        loss = rng.uniform(0, 3) + rng.uniform(0.1, 3) * (budgets / 16_000) ** -rng.uniform(0.05, 0.8)
        noisy = loss * np.exp(0.01 * rng.standard_normal(5))
        found += len(plateau_flags(pd.DataFrame({"size": "s", "images_seen": budgets, "val_loss": noisy})))
    assert found <= 2


@pytest.fixture
def sweep(known_study, tmp_path):
    """A sweep's folder with budgets, of which the smallest size's first two lie on a plateau, and points during
    training."""
    budgets = known_study({"seeds": (0,)})
    small = budgets["size"] == budgets["size"].iloc[0]
    budgets.loc[small, "val_loss"] = MEASURED
    points = known_study({"seeds": (0,), "budgets": DURING}).assign(status="during", lr=1e-3)
    points["val_loss"] *= 1.05  # undecayed
    for name, frame in (("results", budgets), ("curves", points)):
        table = results_table(frame.to_dict("records"), OF_CURVES if name == "curves" else ())
        for suffix in ("parquet", "csv"):
            write_table(table, tmp_path / f"{name}.{suffix}")
    return tmp_path


def test_budgets_inside_the_plateau_of_their_size_are_flagged(sweep):
    [flag] = [flag for flag in answer("fit", sweep)["flags"] if flag["kind"] == "in_plateau"]
    smallest = pd.read_parquet(sweep / "results.parquet")["size"].iloc[0]
    assert (flag["number"], flag["subject"]) == (2, smallest)  # 4,000 and 8,000
    chosen = answer("fit", sweep, "--where", "D>=16000")["flags"]
    assert not any(flag["kind"] == "in_plateau" for flag in chosen)


def test_points_during_training_are_fitted_by_themselves_and_never_mixed_without_a_word(sweep):
    alone = answer("fit", sweep / "curves.csv", "--where", "D>=32000")
    assert [flag["kind"] for flag in alone["flags"] if "during" in flag["kind"]] == ["during"]
    assert any("over 6 sizes" in sentence for sentence in alone["sentences"])  # points of a run are one cluster
    both = answer("fit", sweep / "curves.csv", sweep / "results.csv")["flags"]
    assert [flag["number"] for flag in both if flag["kind"] == "during_mixed"] == [6 * len(DURING)]
    assert not any("during" in flag["kind"] for flag in answer("fit", sweep)["flags"])
