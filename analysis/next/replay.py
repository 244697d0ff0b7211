"""Are the runs that `buy` picks worth more than others? Purchases replayed on a table whose runs are all measured.

`python -m aimscale.analysis.next.replay TABLE --law coupled` holds the top tenth of compute out, starts from a few
cheap runs drawn at random, spends a tenth of what the others cost by every strategy, fits the law to what was bought
and forecasts the held-out runs. Beside the strategies stands the law fitted to all the others: no purchase has more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.objectives import huber_log
from aimscale.analysis.laws.base import Array, Law
from aimscale.analysis.laws.catalogue import find_law
from aimscale.analysis.next.backtest import with_compute
from aimscale.analysis.next.buying import buy
from aimscale.analysis.table.results import parse_columns, read_table

OBJECTIVE = huber_log(0.01)
"""Few points are fitted: a wide quadratic zone wastes none."""
FIRST = 4
"""Runs at the start beyond the law's number of parameters."""
Strategy = Callable[[pd.DataFrame, Array, pd.DataFrame, float, Law, np.random.Generator], Array]


def replay(df: pd.DataFrame, law: Law | str, *, share: float = 0.1, draws: int = 20) -> pd.DataFrame:
    """Spend a share of the table's compute by every strategy, and forecast the tenth of the runs with most compute.

    Args:
        df: columns of the law's variables, C and loss.
        law: the law that plans and forecasts.
        share: budget, as a share of what all runs but the held-out ones cost.
        draws: how often the first runs are drawn at random.

    Returns:
        One row a strategy, best first: strategy, num_runs, r2, r2_median, log_error (mean |ln forecast - ln measured|);
        means over draws.

    Raises:
        AnalysisError: too few runs.
    """
    law = find_law(law) if isinstance(law, str) else law
    held = df["C"].rank(method="first") > 0.9 * len(df)
    pool, test = df[~held].reset_index(drop=True), df[held]
    budget = share * float(pool["C"].sum())
    rows = []
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        first = _first_runs(pool, law, budget, rng)
        for name, strategy in STRATEGIES.items():
            bought = strategy(pool, first, test, budget, law, rng)
            forecast = fit(law, pool.loc[bought], y="loss", objective=OBJECTIVE, resamples=0).predict(test)["value"]
            miss = test["loss"].to_numpy() - forecast.to_numpy()
            spread = np.sum((test["loss"] - test["loss"].mean()) ** 2)
            error = np.mean(np.abs(np.log(forecast.to_numpy() / test["loss"].to_numpy())))
            rows.append((name, len(bought), 1 - np.sum(miss**2) / spread, error))
    found = pd.DataFrame(rows, columns=["strategy", "num_runs", "r2", "log_error"]).groupby("strategy")
    out = found.mean().assign(r2_median=found["r2"].median()).reset_index()
    return out[["strategy", "num_runs", "r2", "r2_median", "log_error"]].sort_values("log_error", ignore_index=True)


def _first_runs(pool: pd.DataFrame, law: Law, budget: float, rng: np.random.Generator) -> Array:
    """Positions of a few runs of the cheaper half that vary every variable and leave most of the budget."""
    cheap = np.argsort(pool["C"].to_numpy())[: len(pool) // 2]
    count = len(law.parameters) + FIRST
    for _ in range(10_000):
        first = rng.choice(cheap, min(count, len(cheap)), replace=False)
        varied = all(pool[v].iloc[first].nunique() > 2 for v in law.variables)
        if varied and pool["C"].iloc[first].sum() < 0.3 * budget:
            return first
    raise AnalysisError(f"No {count} cheap runs of the table vary all of {', '.join(law.variables)} within the budget.")


def _fill(pool: pd.DataFrame, first: Array, budget: float, order: Array) -> Array:
    """The first runs, and others in this order as long as the budget lasts."""
    bought, left = list(first), budget - float(pool["C"].iloc[first].sum())
    for i in order:
        if i not in bought and pool["C"].iloc[i] <= left:
            bought.append(int(i))
            left -= float(pool["C"].iloc[i])
    return np.array(bought)


def _ours(
    pool: pd.DataFrame, first: Array, test: pd.DataFrame, budget: float, law: Law, rng: np.random.Generator
) -> Array:
    known = fit(law, pool.loc[first], y="loss", objective=OBJECTIVE, resamples=20, cluster=None)
    rest = np.setdiff1d(np.arange(len(pool)), first)
    left = budget - float(pool["C"].iloc[first].sum())
    basket = buy(known, pool.loc[rest], pool["C"].to_numpy()[rest], test, budget=left)
    return np.concatenate([first, rest[basket.rows]])


def _v_optimal(pool: pd.DataFrame, first: Array, budget: float, law: Law, power: float) -> Array:
    """Least mean variance of the law over the whole pool (not at the target), per price^power, one after another."""
    known = fit(law, pool.loc[first], y="loss", objective=OBJECTIVE, resamples=0)
    price = pool["C"].to_numpy()
    slopes = known.log_slopes(pool)
    spread = np.linalg.inv(slopes[first].T @ slopes[first] + 1e-4 * np.eye(slopes.shape[1]))
    bought, left = list(first), budget - price[first].sum()
    while True:
        open_ = (price <= left) & ~np.isin(np.arange(len(pool)), bought)
        if not np.any(open_):
            return np.array(bought)
        towards = slopes @ spread
        gain = np.sum((slopes @ towards.T) ** 2, axis=0) / (1 + np.sum(towards * slopes, axis=1))
        best = int(np.argmax(np.where(open_, gain / price**power, -np.inf)))
        column = spread @ slopes[best]
        spread = spread - np.outer(column, column) / (1 + slopes[best] @ column)
        bought.append(best)
        left -= price[best]


ALL_RUNS = "all runs"
"""The whole pool, far beyond the budget: what the law can reach there."""
STRATEGIES: dict[str, Strategy] = {
    "next": _ours,
    "random": lambda pool, first, test, budget, law, rng: _fill(pool, first, budget, rng.permutation(len(pool))),
    "cheapest": lambda pool, first, test, budget, law, rng: _fill(pool, first, budget, np.argsort(pool["C"])),
    "V-optimal": lambda pool, first, test, budget, law, rng: _v_optimal(pool, first, budget, law, 0.0),
    "V-optimal per price": lambda pool, first, test, budget, law, rng: _v_optimal(pool, first, budget, law, 1.0),
    ALL_RUNS: lambda pool, first, test, budget, law, rng: np.arange(len(pool)),
}
"""Name -> positions in the pool that are bought, the first runs included."""


def main() -> None:
    """Print the table of strategies."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("--law", default="coupled")
    parser.add_argument("--columns", nargs="*", default=[], help="ours=theirs; the loss is `loss`")
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--draws", type=int, default=20)
    options = parser.parse_args()
    df = with_compute(read_table(options.table, parse_columns(options.columns)), None)
    found = replay(df, options.law, share=options.share, draws=options.draws)
    print(found.to_string(index=False, float_format=lambda v: f"{v:.4f}"))


if __name__ == "__main__":
    main()
