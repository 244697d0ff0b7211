"""How often `recipes` calls the same recipe different, sees a bad change, and decides between two recipes at scale.

False alarms and power are those of the studies' own tables: of every size two seeds, drawn at random, stand for two
recipes, as they are and with the losses of one raised. Decisions are those between tables of the board that differ in
their data or set-up: fitted to runs below a share of the largest compute, judged by the lowest losses near the largest.

    python tests/experiments/recipe_decisions.py NUM_DRAWS
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from aimscale.analysis import AnalysisError, read_table, recipes
from aimscale.analysis.table.select import fresh_part, main_part

ROOT = Path(__file__).parents[2]
STUDIES = ("main", "cifar")
RAISED = (0.0, 0.005, 0.01, 0.02)
SHARES = (4, 10, 30)
FAMILIES = (
    ("marin-comma", "marin-dclm", "marin-nemotron"),
    ("gadre-c4-trained-c4", "gadre-rpj-c4"),
    ("gadre-c4-trained-refinedweb", "gadre-rpj-refinedweb"),
    ("porian-rw-2-head-counted", "porian-rw-3-short-warmup", "porian-rw-4-decay-to-length", "porian-rw-5-tuned"),
)
"""Tables of the board whose losses are on the same text."""


def same_recipe_twice(study: str, rng: np.random.Generator) -> pd.DataFrame:
    """Take two seeds of every size that has them, under the names of two recipes."""
    table = fresh_part(main_part(read_table(next(ROOT.glob(f"docs/study/published/*/data/{study}.parquet"))))[0])[0]
    parts = []
    for _, rows in table.groupby("params_total"):
        seeds = rng.permutation(rows["seed"].unique())[:2]
        if len(seeds) == 2:
            parts += [rows[rows["seed"] == seed].assign(recipe=name) for seed, name in zip(seeds, "ab", strict=True)]
    return pd.concat(parts, ignore_index=True).drop(columns="seed")


def alarms(study: str, num_draws: int) -> pd.DataFrame:
    """Return how often the gain at the largest compute is called above or below 1, by how far one loss was raised."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(num_draws):
        table = same_recipe_twice(study, rng)
        for share in RAISED:
            raised = table["val_loss"] * np.where(table["recipe"] == "b", 1 + share, 1.0)
            (found,) = recipes(table.assign(val_loss=raised), by="recipe", baseline="a")
            row = found.table[~found.table["beyond"]].iloc[-1]
            rows.append({"raised": share, "worse": row["high"] < 1, "better": row["low"] > 1})
    return pd.DataFrame(rows).groupby("raised").mean().assign(study=study)


def decisions() -> pd.DataFrame:
    """Return the decisions between pairs of tables by their runs below shares of the largest compute of both."""
    rows = []
    pairs = [pair for family in FAMILIES for pair in itertools.combinations(family, 2)]
    for pair in pairs:
        tables = [pd.read_csv(ROOT / f"tests/board/{name}.csv", comment="#").assign(recipe=name) for name in pair]
        both = pd.concat([each[["N", "D", "loss", "recipe"]] for each in tables], ignore_index=True)
        compute = both["N"].astype(float) * both["D"]
        top = compute.groupby(both["recipe"]).max().min()
        lowest = np.log(both[compute.between(top / 1.5, 1.5 * top)].groupby("recipe")["loss"].min())
        for share in SHARES:
            below = both[compute <= 1.01 * top / share]
            try:
                (found,) = recipes(below, by="recipe", baseline=pair[0], y="loss")
            except AnalysisError:  # too few runs below
                continue
            ahead = found.table.iloc[(np.log(found.table["C"] / (6 * top))).abs().argmin()]
            gap = float(lowest[pair[1]] - lowest[pair[0]])
            is_told = ahead["low"] > 1 or ahead["high"] < 1
            rows.append({"pair": " ".join(pair), "share": share, "gap": gap, "is_told": is_told})
            rows[-1] |= {"is_right": (ahead["gain"] > 1) == (gap < 0)}
    return pd.DataFrame(rows)


if __name__ == "__main__":
    found = decisions()
    print(found.to_string())
    print(found.groupby(["share", "is_told"])["is_right"].agg(["mean", "size"]).to_string(), flush=True)
    for study in STUDIES:
        print(alarms(study, int(sys.argv[1])).to_string(), flush=True)
