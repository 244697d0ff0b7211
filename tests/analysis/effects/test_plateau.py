"""The first plateau of a training curve: found on a measured one, and never on what only falls."""

import numpy as np
import pandas as pd
import pytest
from commands import answer

from aimscale.analysis.effects.plateau import first_plateau
from aimscale.analysis.table.schema import OF_CURVES, results_table, write_table

# w48-d1 on CIFAR-10 (batch 32): training losses, means over equal factors of images
IMAGES = np.array([
    1280, 1536, 1920, 2560, 3328, 4224, 5376, 6912, 8960, 11648, 15104, 19456, 25088, 32384, 41856, 54016, 69760, 90112,
])  # fmt: skip
LOSSES = np.array([
    0.9074, 0.8696, 0.8012, 0.7591, 0.7439, 0.7237, 0.7136, 0.7040, 0.6732, 0.6550, 0.6010, 0.5703, 0.5574, 0.5440,
    0.5360, 0.5282, 0.5209, 0.5177,
])  # fmt: skip


@pytest.mark.parametrize("some", [slice(None), slice(None, None, -1), slice(3, None), slice(1, None, 2)])
def test_a_measured_plateau_is_found(some):
    for noise in (0.0, 0.003):
        noisy = LOSSES * np.exp(noise * np.random.default_rng(0).standard_normal(len(LOSSES)))
        found = first_plateau(IMAGES[some], noisy[some])
        assert found is not None
        assert found.start < 6000 < 6900 <= found.stop < 13_000 < 15_000 < found.settled < 33_000


def test_a_run_that_has_not_left_it_has_none_yet():
    assert first_plateau(IMAGES[:9], LOSSES[:9]) is None
    assert first_plateau(IMAGES[5:9], LOSSES[5:9]) is None
    assert first_plateau(IMAGES[8:], LOSSES[8:]) is None


def falling(rng: np.random.Generator, kind: str, noise: float) -> tuple[np.ndarray, np.ndarray]:
    num, top = rng.choice([6, 10, 20, 50, 100, 300]), 10 ** rng.uniform(4, 9)
    low = top / 10 ** rng.uniform(1, 3)
    x = np.geomspace(low, top, num) if rng.random() < 0.5 else np.linspace(top / num, top, num)
    b, done = rng.uniform(0.05, 0.8), x / top
    y = rng.uniform(0, 3) + rng.uniform(0.1, 3) * (x / x[num // 2]) ** -b
    rate = {"power": 0.0, "cosine": 0.5 + 0.5 * np.cos(np.pi * done), "decay": np.clip(4 * (1 - done), 0, 1)}[kind]
    return x, y * (1 + 0.06 * rate) * np.exp(noise * rng.standard_normal(num))


@pytest.mark.parametrize("kind", ["power", "cosine", "decay"])
def test_what_only_falls_has_none(kind):
    rng = np.random.default_rng(0)
    for noise, most in ((0.0, 0), (0.003, 0), (0.01, 6)):
        assert sum(first_plateau(*falling(rng, kind, noise)) is not None for _ in range(150)) <= most


@pytest.fixture
def sweep(known_study, tmp_path):
    """A sweep's folder with budgets and points during training; its smallest size leaves the plateau at 20,000."""
    budgets = known_study({"seeds": (0,)})
    points = known_study({"seeds": (0,), "budgets": tuple(IMAGES.tolist())}).assign(status="during", lr=1e-3)
    small = (points["size"] == points["size"].iloc[0]).to_numpy()
    points.loc[small, "val_loss"] = LOSSES
    points["val_loss"] *= np.where(small, 1.0, 1.05)  # undecayed
    for name, frame in (("results", budgets), ("curves", points)):
        table = results_table(frame.to_dict("records"), OF_CURVES if name == "curves" else ())
        for suffix in ("parquet", "csv"):
            write_table(table, tmp_path / f"{name}.{suffix}")
    return tmp_path


def test_budgets_inside_the_plateau_of_their_size_are_flagged(sweep):
    [flag] = [flag for flag in answer("fit", sweep)["flags"] if flag["kind"] == "in_plateau"]
    smallest = pd.read_parquet(sweep / "results.parquet")["size"].iloc[0]
    assert (flag["number"], flag["subject"]) == (3, smallest)  # 4,000, 8,000 and 16,000
    chosen = answer("fit", sweep, "--where", "D>=32000")["flags"]
    assert not any(flag["kind"] == "in_plateau" for flag in chosen)


def test_points_during_training_are_fitted_by_themselves_and_never_mixed_without_a_word(sweep):
    alone = answer("fit", sweep / "curves.csv", "--where", "D>=32000")
    assert [flag["kind"] for flag in alone["flags"] if "during" in flag["kind"]] == ["during"]
    assert any("over 6 sizes" in sentence for sentence in alone["sentences"])  # points of a run are one cluster
    both = answer("fit", sweep / "curves.csv", sweep / "results.csv")["flags"]
    assert [flag["number"] for flag in both if flag["kind"] == "during_mixed"] == [6 * len(IMAGES)]
    assert not any("during" in flag["kind"] for flag in answer("fit", sweep)["flags"])
