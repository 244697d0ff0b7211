"""Where the published measurements live, and a table made from a known law."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def measurements():
    """Reader of a published CSV beside the repository; skips where the folder is absent."""

    def read(name: str) -> pd.DataFrame:
        if not (SHARED / name).exists():
            pytest.skip(f"{SHARED / name} is not here")
        return pd.read_csv(SHARED / name)

    return read


@pytest.fixture
def epoch(measurements) -> pd.DataFrame:
    """The 240 points of Epoch's replication of Chinchilla: the five largest losses dropped, D = C / 6N."""
    df = measurements("epoch_chinchilla/svg_extracted_data.csv")
    df = df.rename(columns={"Model Size": "N", "Training FLOP": "C"})
    df["D"] = df["C"] / (6 * df["N"])
    return df[df["loss"] < np.sort(df["loss"])[-5]]


@pytest.fixture
def grid() -> pd.DataFrame:
    """6 sizes x 5 budgets of a known Chinchilla law with 0.3 % noise, as a results table."""
    rng = np.random.default_rng(3)
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e5, 1e7, 6), np.geomspace(1e5, 3e6, 5)))
    loss = (0.2 + 30 * n**-0.4 + 40 * d**-0.5) * np.exp(0.003 * rng.standard_normal(n.size))
    return pd.DataFrame(
        {
            "run_id": [f"r{i}" for i in range(n.size)],
            "size": [f"s{v:.0f}" for v in n],
            "params_total": n,
            "images_seen": d,
            "flops_train": 6 * n * d,
            "val_loss": loss,
            "status": "complete",
        }
    )
