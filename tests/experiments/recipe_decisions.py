"""How often `recipes` calls the same recipe different, sees a bad change, and decides between two recipes at scale.

False alarms and power are those of the studies' own tables: of every size two seeds, drawn at random, stand for two
recipes, as they are and with the losses of one raised. Decisions are those between tables of the board that differ in
their data or set-up: fitted to runs below a share of the largest compute, judged by the lowest losses near the largest.

    python tests/experiments/recipe_decisions.py 20
    python tests/experiments/recipe_decisions.py 40 --only simulated
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from aimscale.analysis import AnalysisError, read_table, recipes
from aimscale.analysis.effects.ladder import fit_ladder
from aimscale.analysis.table.select import fresh_part, main_part

ROOT = Path(__file__).parents[2]
PARTS = ("simulated", "ladders", "gates", "decisions", "alarms")
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
    path = next(ROOT.glob(f"tests/studies/*/{study}.parquet"))
    table = fresh_part(main_part(read_table(path))[0])[0].frame
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


def tables_of(pair: tuple[str, str]) -> pd.DataFrame:
    """Read two tables of the board as one of two recipes."""
    tables = [pd.read_csv(ROOT / f"tests/board/{name}.csv", comment="#").assign(recipe=name) for name in pair]
    return pd.concat([each[["N", "D", "C", "loss", "recipe"]] for each in tables], ignore_index=True)


def law_free(both: pd.DataFrame, pair: tuple[str, str]) -> pd.Series:
    """Return the gain at every C of the level that it lowers: by which factor more the baseline needs, on the line
    through its lowest losses in log-log; NaN where it does not reach that far."""
    lowest = [both[both["recipe"] == name].groupby("C")["loss"].min() for name in pair]
    falling = [each[each < each.cummin().shift(fill_value=np.inf)] for each in lowest]
    (c, y), (own, wanted) = ((np.log(each.index), np.log(each.to_numpy())) for each in falling)
    return pd.Series(np.exp(np.interp(-wanted, -y, c, np.nan, np.nan) - own), np.exp(own), name="free")


def decisions() -> pd.DataFrame:
    """Return the gains between pairs of tables beside those that no law is behind: at every budget from all rows, and
    at the largest of them from the rows below shares of the compute (and below the half of it, in logarithms)."""
    rows = []
    pairs = [pair for family in FAMILIES for pair in itertools.combinations(family, 2)]
    for pair in pairs:
        both = tables_of(pair)
        top, free = both.groupby("recipe")["C"].max().min(), law_free(both, pair).dropna()
        half = top / both[both["recipe"] == pair[1]]["C"].drop_duplicates().median()
        for share in (1.0, half, *SHARES):
            below = both[both["C"] <= 1.01 * top / share]
            ahead = float(free.index[-1] / below[below["recipe"] == pair[1]]["C"].max())
            try:
                (found,) = recipes(below, by="recipe", baseline=pair[0], y="loss", beyond=max(ahead, 1.01))
            except AnalysisError as error:  # too few runs below
                print(pair, share, error, file=sys.stderr)
                continue
            last, truth = found.table.iloc[-1], float(free.iloc[-1])
            rows.append({"pair": " ".join(pair), "share": "half" if share == half else share, "law-free": truth})
            rows[-1] |= last[["gain", "low", "high"]].to_dict() | {"inside": last["low"] <= truth <= last["high"]}
            rows[-1] |= {"is_told": not last["low"] <= 1 <= last["high"], "is_right": (last["gain"] > 1) == (truth > 1)}
            rows[-1] |= {"trend": found.trend[0], "p": found.trend_p, "decision": found.decision}
            if share == 1.0 and found.law is None:  # at every budget
                each = found.table.set_index(found.table["C"].round(-9))
                each = each.join(free.set_axis(free.index.to_numpy().round(-9)), how="inner")
                rows[-1]["budgets"] = f"{each['free'].between(each['low'], each['high']).sum()} of {len(each)}"
    return pd.DataFrame(rows)


def simulated(num: int) -> pd.DataFrame:
    """Return how often a gain that is the same everywhere lies inside what is printed of the table's own compute, and
    how often a trend is told, by the grid's sizes and amounts of data; .3 % noise, nothing shared."""
    rows, rng = [], np.random.default_rng(0)
    for (sizes, budgets), gain in itertools.product(((3, 2), (4, 2), (5, 4), (7, 5)), (1.0, 1.1, 1.5)):
        n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e5, 1e7, sizes), np.geomspace(1e6, 1e8, budgets)))
        for _ in range(num):
            tables = []
            for name, more in (("old", 1.0), ("new", gain**0.5)):
                loss = 0.3 + 20 * (more * n) ** -0.38 + 60 * (more * d) ** -0.40
                noise = np.exp(0.003 * rng.standard_normal(len(n)))
                tables.append(pd.DataFrame({"N": n, "D": d, "loss": loss * noise, "recipe": name}))
            try:
                (found,) = recipes(pd.concat(tables, ignore_index=True), by="recipe", baseline="old", y="loss")
            except AnalysisError:
                found = None
            printed = found is not None and found.is_known
            own = found.table[~found.table["beyond"]] if printed else pd.DataFrame({"low": [], "high": []})
            inside = ((own["low"] <= gain) & (own["high"] >= gain)).mean()
            told = found.trend_p <= 0.01 if printed else np.nan
            rows.append(
                {"grid": f"{sizes} x {budgets}", "gain": gain, "printed": printed, "inside": inside, "trend": told}
            )
    return pd.DataFrame(rows).groupby(["grid", "gain"]).mean()


def ladders(num: int) -> pd.DataFrame:
    """Return how often the interval of a short ladder holds the gain, and decides wrongly, by rungs, gain and the error
    that the two runs of a rung share; .2 % noise of each run."""
    rows, rng = [], np.random.default_rng(0)
    for rungs, gain, shared in itertools.product((3, 4, 5), (1.0, 1.02, 1.08, 1.5), (0.0, 0.005)):
        flops = 1e18 * 6.0 ** np.arange(rungs)
        for _ in range(num):
            error, tables = shared * rng.normal(size=rungs), []
            for number, factor in ((1.0, 1.0), (2.0, gain)):
                loss = 1.6 + 2 * (factor * flops / 1e18) ** -0.1
                noise = np.exp(error + 0.002 * rng.normal(size=rungs))
                tables.append(pd.DataFrame({"C": flops, "G": number, "y": loss * noise}))
            result = fit_ladder(pd.concat(tables, ignore_index=True))
            off, told = result.log_gain - np.log(gain), abs(result.log_gain) > result.half
            wrong = told and (gain == 1 or result.log_gain < 0)
            rows.append(
                {"rungs": rungs, "shared": shared, "gain": gain, "inside": abs(off) <= result.half, "wrong": wrong}
            )
    return pd.DataFrame(rows).groupby(["rungs", "shared", "gain"]).mean()


def gates() -> pd.DataFrame:
    """Return the gains that ladders of marin's lowest losses tell, below a third of the largest compute, beside the
    gain that all rows at the largest compute measure."""
    rows = []
    for pair in (("marin-dclm", "marin-nemotron"), ("marin-dclm", "marin-comma"), ("marin-nemotron", "marin-comma")):
        both = tables_of(pair)
        both["C"] = both["C"].round(-16)
        best = both.sort_values("loss").groupby(["recipe", "C"]).head(1)
        (whole,) = recipes(both, by="recipe", baseline=pair[0], y="loss")
        later = whole.table[~whole.table["beyond"]].iloc[-1]
        for budgets in ([9e18, 3e19, 9e19], [9e18, 1.8e19, 3e19, 9e19], [3e18, 9e18, 1.8e19, 3e19, 9e19]):
            (gate,) = recipes(best[best["C"].isin(budgets)], by="recipe", baseline=pair[0], y="loss")
            told = gate.table.iloc[0]
            there = whole.table["measured"][np.isclose(whole.table["C"], 9e19, rtol=0.1)].iloc[0]
            row = {"pair": " > ".join(pair), "rungs": len(budgets), **told[["gain", "low", "high"]]}
            rows.append({**row, "at_9e19": there, "at_3e20": later["gain"], "probability": gate.probability})
    return pd.DataFrame(rows)


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("num", type=int, help="draws of seeds, and simulated tables a cell")
    parser.add_argument("--only", choices=PARTS, nargs="*", default=PARTS)
    options = parser.parse_args()
    if "simulated" in options.only:
        print(simulated(options.num).to_string(), flush=True)
    if "ladders" in options.only:
        print(ladders(options.num).to_string(), flush=True)
    if "gates" in options.only:
        print(gates().to_string(), flush=True)
    if "decisions" in options.only:
        found = decisions()
        print(found.to_string())
        print(found.groupby(["share", "is_told"])["is_right"].agg(["mean", "size"]).to_string(), flush=True)
    for study in STUDIES if "alarms" in options.only else ():
        print(alarms(study, options.num).to_string(), flush=True)


if __name__ == "__main__":
    main()
