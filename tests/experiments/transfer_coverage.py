"""Coverage of the law of data transferred on simulated tables: `python tests/experiments/transfer_coverage.py 120`.

Tables of six sizes, five amounts of data from scratch and four of warm runs follow D_T = k D_F^a N^b, or transfer
nothing, with errors that the rows of a size and of an amount of data share, or with independent noise alone.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import pandas as pd

from aimscale.analysis.effects.transfer import transfer

SCRATCH_LAW = {"E": 0.2, "A": 30.0, "B": 40.0, "alpha": 0.4, "beta": 0.5}
KNOWN = {"k": 0.8, "a": 0.3, "b": 0.6}
"""A start worth 100 thousand to 1 million samples on these tables, 0.3 to 12 times the warm run's own."""
NOTHING = {"k": 0.0, "a": 0.0, "b": 0.0}


def table_of(
    known: dict[str, float], rng: np.random.Generator, *, noise: float, shared: float = 0.0, num_sizes: int = 6
) -> pd.DataFrame:
    """Simulate losses from scratch and warm ones; errors are of ln loss."""
    sizes, parts, law = np.geomspace(1e5, 1e7, num_sizes), list[pd.DataFrame](), SCRATCH_LAW
    of_size = shared * rng.standard_normal(num_sizes)
    for init, budgets in (("scratch", np.geomspace(1e5, 3e6, 5)), ("warm", np.geomspace(3e4, 8e5, 4))):
        n, d = (axis.ravel() for axis in np.meshgrid(sizes, budgets))
        moved = known["k"] * d ** known["a"] * n ** known["b"] if init == "warm" else 0.0
        loss = law["E"] + law["A"] * n ** -law["alpha"] + law["B"] * (d + moved) ** -law["beta"]
        of_budget = shared * rng.standard_normal(len(budgets))
        error = noise * rng.standard_normal(n.size) + np.add.outer(of_budget, of_size).ravel()
        parts.append(pd.DataFrame({"N": n, "D": d, "val_loss": loss * np.exp(error), "init": init}))
    return pd.concat(parts, ignore_index=True)


def measure(num_tables: int) -> pd.DataFrame:
    """Count how often k, a and b lie inside, how often a law is told, and how often a transfer of nothing is."""
    settings = ((0.002, 0.002, 6), (0.002, 0.0, 6))
    cases = [{"noise": noise, "shared": shared, "num_sizes": num} for noise, shared, num in settings]
    rows = []
    for case in cases:
        rng, inside, told, nothing = np.random.default_rng(0), [], 0, 0
        for _ in range(num_tables):
            (found,) = transfer(table_of(KNOWN, rng, **case))
            if found.law is not None:
                ends = found.law.conf_int()
                inside.append([ends.loc[n, "lower"] <= KNOWN[n] <= ends.loc[n, "upper"] for n in KNOWN])
            told += found.law is not None
            (none,) = transfer(table_of(NOTHING, rng, **case))
            nothing += none.is_told
        share = dict(zip(KNOWN, np.mean(inside, axis=0), strict=True))
        rows.append({**case, "law told": told / num_tables, **share, "nothing told": nothing / num_tables})
        print(rows[-1], flush=True)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    begun = time.monotonic()
    print(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 300).to_string(index=False))
    print(f"{time.monotonic() - begun:.0f} s")
