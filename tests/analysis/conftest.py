"""Published measurements of Chinchilla, and tables made from known laws."""

import itertools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tables import law_grid

from aimscale.analysis.laws import effective

EPOCH = Path(__file__).parents[3] / "shared" / "data" / "epoch_chinchilla" / "svg_extracted_data.csv"
"""Epoch's points, beside the project: their repository has no licence, so they are in none of ours."""


@pytest.fixture
def epoch() -> pd.DataFrame:
    """The 240 points of Epoch's replication of Chinchilla: the five largest losses dropped, D = C / 6N."""
    if not EPOCH.exists():
        pytest.skip(f"{EPOCH} is not here (github epoch-research/analyzing-chinchilla, data/svg_extracted_data.csv)")
    df = pd.read_csv(EPOCH).rename(columns={"Model Size": "N", "Training FLOP": "C"})
    df["D"] = df["C"] / (6 * df["N"])
    return df[df["loss"] < np.sort(df["loss"])[-5]]


@pytest.fixture
def chinchilla() -> pd.DataFrame:
    """The 234 points that Kyo Takano read off Chinchilla's Figure 4."""
    return pd.read_csv(Path(__file__).parents[1] / "board" / "chinchilla-kyo.csv", comment="#")


@pytest.fixture
def grid() -> pd.DataFrame:
    """6 sizes x 5 budgets of a known Chinchilla law with 0.3 % noise, as a results table."""
    rows = law_grid(noise=0.003, rng=3).rename(columns={"N": "params_total", "D": "images_seen", "C": "flops_train"})
    rows.insert(0, "run_id", [f"r{i}" for i in range(len(rows))])
    rows.insert(1, "size", [f"s{n:.0f}" for n in rows["params_total"]])
    return rows.assign(status="complete")


TRUTH = {"E": 0.2, "A": 8.0, "B": 12.0, "alpha": 0.4, "beta": 0.5, "R_D": 6.0}
SIZES = {"s1": 2e4, "s2": 6e4, "s3": 2e5, "s4": 6e5, "s5": 2e6, "s6": 6e6}


def study_rows(
    *,
    sizes: Sequence[str] = tuple(SIZES),
    budgets: Sequence[int] = (4000, 8000, 16000, 32000, 64000),
    seeds: Sequence[int] = (0, 1, 2),
    uniques: Sequence[int] = (64000,),
    seed_sd: float = 0.004,
    row_sd: float = 0.001,
    effect: float = 0.0,
    **design: object,
) -> list[dict[str, Any]]:
    """Rows of a known study: E + A N^-alpha + B D'^-beta, times an effect, a run's own error and a row's.

    A run's error depends on its size and seed alone, as a trunk's does: paired runs share it.
    """
    rows = []
    for size, seed, unique in itertools.product(sizes, seeds, uniques):
        n = SIZES[size]
        key = zlib.crc32(f"{size} {seed}".encode())
        run_error = seed_sd * np.random.default_rng(key).standard_normal()
        rng = np.random.default_rng(zlib.crc32(f"{size} {seed} {unique} {sorted(design.items())}".encode()))
        for seen in budgets:
            worth = effective(np.array(min(unique, seen)), np.array(seen), np.array(TRUTH["R_D"]))
            loss = TRUTH["E"] + TRUTH["A"] * n ** -TRUTH["alpha"] + TRUTH["B"] * float(worth) ** -TRUTH["beta"]
            loss *= float(np.exp(effect + run_error + row_sd * rng.standard_normal()))
            tag = "_".join(str(value) for value in design.values())
            rows.append(
                {"sweep": "known", "run_id": f"{size}_u{unique}_s{seed}_{tag}", "status": "complete", "size": size,
                 "seed": seed, "images_seen": seen, "unique_images": unique, "batch_size": 32, "lr_peak": 1e-3,
                 "params_trunk": 0.6 * n, "params_head": 0.35 * n, "params_preprocessor": 0.05 * n, "params_total": n,
                 "flops_train": 6 * n * 64 * seen, "flops_6nd": 6 * n * 64 * seen, "flops_executed": 4 * n * 64 * seen,
                 "prefix": "paired", "target": "normalised", "patch_order": "raster", "head_rule": "proportional",
                 "val_loss": loss, "val_loss_se": 0.01 * loss, "val_num_images": 500, "epochs": seen / unique}
                | design
            )  # fmt: skip
    return rows


def study_frame(*parts: dict[str, Any]) -> pd.DataFrame:
    """`study_rows` of every part as a data frame, as `read_table` would give it."""
    return pd.DataFrame([row for part in parts or ({},) for row in study_rows(**part)])


@pytest.fixture(scope="session")
def known_study():
    """Maker of known studies."""
    return study_frame
