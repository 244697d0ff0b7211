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


@pytest.mark.parametrize("some", [slice(None), slice(None, None, -1), slice(3, None)])
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
@pytest.mark.parametrize("spike", [False, True])
def test_what_only_falls_has_none(kind, spike):
    """However it scatters, and though one loss spikes."""
    rng = np.random.default_rng(0)
    for noise, most in ((0.0, 0), (0.003, 1), (0.01, 3), (0.03, 8)):
        found = 0
        for _ in range(150):
            images, losses = falling(rng, kind, noise)
            losses[rng.integers(1, len(losses) - 1)] *= 1.05 if spike else 1.0
            found += first_plateau(images, losses) is not None
        assert found <= most


def test_a_long_plateau_is_found_through_noise():
    octaves = np.linspace(0, 9, 27)
    log_loss = -np.interp(octaves, [0, 2, 4.5, 6, 9], [0, 0.24, 0.29, 0.59, 0.77])
    noisy = np.exp(log_loss + 0.01 * np.random.default_rng(0).standard_normal((40, 27)))
    found = [first_plateau(1000 * 2**octaves, each) for each in noisy]
    stops = [np.log2(each.stop / 1000) for each in found if each]
    assert len(stops) >= 38
    assert np.median(stops) == pytest.approx(4.5, abs=0.6)


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
