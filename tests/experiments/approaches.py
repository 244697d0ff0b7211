"""How well approaches 2 and 3 find the optimum of a known law, and how often they are told apart.

    python tests/experiments/approaches.py --tables 60 > approaches.md

Tables of six budgets of compute and nine sizes 16 times around the optimum of each, as Czech et al. (arXiv 2603.22339)
make them, with errors of 0.3 % in ln loss. A column a pair of exponents, or another law, which approach 3 fits wrongly.
For each approach: the median of N* at the largest budget over the true one, the median half-width of its interval, and
per cent of tables whose interval holds it; "told apart" is per cent of tables in which the test of the difference in
the exponent or in N* says so, of which at most 5 are false alarms where the law is true.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from simulated_tables import POINT_SD, Array, markdown

from aimscale.analysis import frontier, laws

FLOPS, AROUND = np.geomspace(1e18, 1e21, 6)[:, None], np.geomspace(1 / 16, 16, 9)
COUPLED = {"E": 0.5, "K": 600.0, "alpha": 0.9, "beta": 0.95, "c": 0.4, "w": 1.0}
LAWS: dict[str, tuple[laws.Law, dict[str, float]]] = {
    f"{alpha:g} and {beta:g}": (
        laws.CHINCHILLA,
        {"E": 0.5, "A": 0.6 * 1e8**alpha, "B": 0.6 * 2e9**beta, "alpha": alpha, "beta": beta},
    )
    for alpha, beta in ((0.46, 0.15), (0.15, 0.46), (0.34, 0.36))
} | {"another law": (laws.LAWS["coupled"], COUPLED)}
"""Name of a column -> the law behind its tables, with parameters."""


def best_sizes(name: str) -> Array:
    """Return the N* (budgets, 1) of a law at C = 6 N D."""
    law, params = LAWS[name]

    def loss(log_n: float, flops: float) -> float:
        n = np.exp(log_n)
        return float(law.value({"N": np.array([n]), "D": np.array([flops / 6 / n])}, params)[0])

    found = [minimize_scalar(loss, bounds=(10, 30), args=(flops,), method="bounded") for flops in FLOPS[:, 0]]
    return np.exp([[each.x] for each in found])


def judged(name: str, seed: int) -> dict[str, tuple[float, float, float]]:
    """Return of one table by approach: N* over the true one, half-width of its logarithm, whether it is held; and
    whether the approaches are told apart."""
    rng, (law, params), best = np.random.default_rng(seed), LAWS[name], best_sizes(name)
    n = best * AROUND * np.exp(0.3 * rng.uniform(-1, 1, (len(FLOPS), 1)))
    table = pd.DataFrame({"N": n.ravel(), "D": (FLOPS / 6 / n).ravel(), "C": (FLOPS + 0 * n).ravel()})
    clean = law.value({v: table[v].to_numpy() for v in ("N", "D")}, params)
    found = frontier(table.assign(val_loss=clean * np.exp(POINT_SD * rng.standard_normal(len(table)))))
    true, out = float(best[-1, 0]), {"told apart": (float(found.are_apart), np.nan, np.nan)}
    for each in found.frontiers:
        at = each.at(float(FLOPS[-1, 0])).iloc[0]
        half, held = np.log(at["N_hi"] / at["N_lo"]) / 2, at["N_lo"] < true < at["N_hi"]
        by = "the forecast's laws" if each.approach == 3 and any(f.kind == "rejected" for f in each.flags) else ""
        out[f"approach {each.approach}{by and f', {by}'}"] = (at["N"] / true, half, float(held))
    return out


def main() -> None:
    """Simulate and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=60, help="simulated tables a cell")
    parser.add_argument("--law", choices=[*LAWS], nargs="*", default=[*LAWS], help="exponents, or another law")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    asked, columns = parser.parse_args(), dict[str, dict[str, str]]()
    with ProcessPoolExecutor(asked.workers) as pool:
        for name in asked.law:
            found = [*pool.map(partial(judged, name), range(asked.tables))]
            column = columns[f"exponents {name}" if name[0] == "0" else name] = {}
            for row in sorted({key for each in found for key in each}):
                ratio, half, held = np.array([each[row] for each in found if row in each]).T
                share = f" in {len(ratio)} tables" * (len(ratio) < asked.tables)
                if row == "told apart":
                    column[row] = f"{100 * ratio.mean():.0f} %"
                else:
                    middle = f"{np.median(ratio):.3f}, ±{100 * np.median(half):.0f} %"
                    column[row] = f"{middle}, {100 * held.mean():.0f} % inside{share}"
            print(f"{name} done", file=sys.stderr, flush=True)
    print(markdown(columns, "N* over the true one"))


if __name__ == "__main__":
    main()
