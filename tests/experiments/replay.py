"""Are the runs that `buy` picks worth more than others? Purchases replayed on a table whose runs are all measured.

`python tests/experiments/replay.py TABLE --law coupled` holds the top tenth of compute out, starts from a few
cheap runs drawn at random, spends a tenth of what the others cost by every strategy, fits the law to what was bought
and forecasts the held-out runs. Beside the strategies stands the law fitted to all the others: no purchase has more.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.problem import huber_log
from aimscale.analysis.laws import Array, Law, find_law
from aimscale.analysis.next import buy

OBJECTIVE = huber_log(0.01)
"""Few points are fitted: a wide quadratic zone wastes none."""
FIRST = 4
"""Runs at the start beyond the law's number of parameters."""


def replay(df: pd.DataFrame, law: Law | str, *, share: float = 0.1, draws: int = 20) -> pd.DataFrame:
    """Spend a share of the table's compute by every strategy, and forecast the tenth of the runs with most compute.

    `df` holds the law's variables, C and loss; the first runs are drawn at random `draws` times.

    Returns:
        One row a strategy, best first: strategy, num_runs, r2, r2_median, log_error (mean |ln forecast - ln measured|);
        means over draws.
    """
    law = find_law(law)
    held = df["C"].rank(method="first") > 0.9 * len(df)
    pool, test = df[~held].reset_index(drop=True), df[held]
    budget = share * float(pool["C"].sum())
    rows = []
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        first = _first_runs(pool, law, budget, rng)
        strategies = {
            "next": _next(pool, first, test, budget, law),
            "random": _in_order(pool, first, budget, rng.permutation(len(pool))),
            "cheapest": _in_order(pool, first, budget, np.argsort(pool["C"].to_numpy())),
            "V-optimal": _v_optimal(pool, first, budget, law, 0.0),
            "V-optimal per price": _v_optimal(pool, first, budget, law, 1.0),
            "all runs, far beyond the budget": np.arange(len(pool)),
        }
        for name, bought in strategies.items():
            forecast = fit(pool.loc[bought], law, y="loss", objective=OBJECTIVE).predict(test)["value"]
            r2 = 1 - np.sum((test["loss"].to_numpy() - forecast.to_numpy()) ** 2) / (
                len(test) * test["loss"].var(ddof=0)
            )
            error = np.mean(np.abs(np.log(forecast.to_numpy() / test["loss"].to_numpy())))
            rows.append((name, len(bought), r2, error))
    found = pd.DataFrame(rows, columns=["strategy", "num_runs", "r2", "log_error"]).groupby("strategy")
    out = found.mean().assign(r2_median=found["r2"].median()).reset_index()
    return out[["strategy", "num_runs", "r2", "r2_median", "log_error"]].sort_values("log_error", ignore_index=True)


def _first_runs(pool: pd.DataFrame, law: Law, budget: float, rng: np.random.Generator) -> Array:
    """Positions of a few runs of the cheaper half that vary every variable and leave most of the budget."""
    cheap = np.argsort(pool["C"].to_numpy())[: len(pool) // 2]
    for _ in range(10_000):
        first = rng.choice(cheap, min(len(law.parameters) + FIRST, len(cheap)), replace=False)
        varied = all(pool[v].iloc[first].nunique() > 2 for v in law.variables)
        if varied and pool["C"].iloc[first].sum() < 0.3 * budget:
            return first
    raise SystemExit(f"No few cheap runs of the table vary all of {', '.join(law.variables)} within the budget.")


def _next(pool: pd.DataFrame, first: Array, test: pd.DataFrame, budget: float, law: Law) -> Array:
    """What `aimscale next` buys beside the first runs."""
    known = fit(pool.loc[first], law, y="loss", objective=OBJECTIVE)
    rest = np.setdiff1d(np.arange(len(pool)), first)
    left = budget - float(pool["C"].iloc[first].sum())
    rows, _ = buy(known, pool.loc[rest], pool["C"].to_numpy()[rest], test, budget=left)
    return np.concatenate([first, rest[rows]])


def _in_order(pool: pd.DataFrame, first: Array, budget: float, order: Array) -> Array:
    """The first runs, and others in this order as long as the budget lasts."""
    bought, left = list(first), budget - float(pool["C"].iloc[first].sum())
    for i in order:
        if i not in bought and pool["C"].iloc[i] <= left:
            bought.append(int(i))
            left -= float(pool["C"].iloc[i])
    return np.array(bought)


def _v_optimal(pool: pd.DataFrame, first: Array, budget: float, law: Law, power: float) -> Array:
    """Least mean variance of the law over the whole pool (not at the target), per price^power, one after another."""
    known = fit(pool.loc[first], law, y="loss", objective=OBJECTIVE)
    price, x = pool["C"].to_numpy(), known.variables(pool)
    slopes = known.estimate.gradient(lambda params: np.log(known.law.value(x, params)))
    steps = [1.0 if p.log else abs(v) for p, v in zip(known.law.parameters, known.estimate.vector, strict=True)]
    slopes = slopes * np.array(steps)[known.estimate.problem.movable]  # relative steps of the parameters
    spread = np.linalg.inv(slopes[first].T @ slopes[first] + 1e-4 * np.eye(slopes.shape[1]))
    bought, left = list(first), budget - price[first].sum()
    while np.any(affordable := (price <= left) & ~np.isin(np.arange(len(pool)), bought)):
        towards = slopes @ spread
        gain = np.sum((slopes @ towards.T) ** 2, axis=0) / (1 + np.sum(towards * slopes, axis=1))
        best = int(np.argmax(np.where(affordable, gain / price**power, -np.inf)))
        column = spread @ slopes[best]
        spread = spread - np.outer(column, column) / (1 + slopes[best] @ column)
        bought.append(best)
        left -= price[best]
    return np.array(bought)


def main() -> None:
    """Print the table of strategies."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("--law", default="coupled")
    parser.add_argument("--columns", nargs="*", default=[], help="theirs=ours, such as params=N; the loss is `loss`")
    parser.add_argument("--draws", type=int, default=20)
    options = parser.parse_args()
    is_csv = options.table.suffix == ".csv"
    df = pd.read_csv(options.table, comment="#") if is_csv else pd.read_parquet(options.table)
    df = df.rename(columns=dict(each.split("=") for each in options.columns))
    found = replay(df.assign(C=6.0 * df["N"] * df["D"]), options.law, draws=options.draws)
    print(found.to_string(index=False, float_format=lambda v: f"{v:.4f}"))


if __name__ == "__main__":
    main()
