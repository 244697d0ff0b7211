"""Tables from a known law: grids and iso-FLOP sets, one seed or several, with errors of points, runs and sizes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from aimscale.analysis.frontier.optimum import Cost, optimum_of
from aimscale.analysis.laws.base import Array
from aimscale.analysis.laws.catalogue import CHINCHILLA

TRUTH = {"E": 0.2, "A": 30.0, "B": 40.0, "alpha": 0.38, "beta": 0.40}
"""The law that the tables come from."""
POINT_SD, GROUP_SD = 0.003, 0.005
"""Standard deviation of ln loss of a point alone, and of what a run or a size shares."""
COST = Cost(kappa=6.0, s=0.0)
"""C = 6 N D."""


@dataclass(frozen=True, kw_only=True)
class Design:
    """Where and how a table is measured."""

    sizes: int
    """Values of N."""
    budgets: int
    """Values of D, or of C where `isoflop`."""
    seeds: int
    """Runs of every size."""
    errors: str
    """What points share: nothing (`independent`), the error of their `run`, or that of their `size`."""
    isoflop: bool = False
    """Sizes about the optimum of each budget C, in place of a grid of N and D."""

    @property
    def words(self) -> str:
        """E.g. "5 x 4, 3 seeds, size"."""
        return f"{self.sizes} x {self.budgets}, {self.seeds} seed{'s' * (self.seeds > 1)}, {self.errors}"

    def scales(self) -> pd.DataFrame:
        """The table without its losses: N, D, C, seed, run_id."""
        if self.isoflop:
            flops = np.geomspace(1e12, 3e14, self.budgets)
            log_k, a = (float(v) for v in optimum_of(TRUTH, COST))
            best = np.exp(log_k + a * np.log(flops))
            # named sizes, each twice the one before, shared by budgets: those nearest to each budget's optimum
            nearest = np.round(np.log2(best))[:, None] + np.arange(self.sizes) - (self.sizes - 1) // 2
            size, c = (2.0**nearest).ravel(), np.repeat(flops, self.sizes)
            d = c / (6 * size)
        else:
            size, d = (
                v.ravel() for v in np.meshgrid(np.geomspace(1e5, 1e7, self.sizes), np.geomspace(1e5, 3e6, self.budgets))
            )
        once = pd.DataFrame({"N": size, "D": d, "C": 6 * size * d})
        table = pd.concat([once.assign(seed=s) for s in range(self.seeds)], ignore_index=True)
        return table.assign(run_id=[f"n{n:.0f}s{s}" for n, s in zip(table["N"], table["seed"], strict=True)])


def clean_losses(table: pd.DataFrame) -> Array:
    """The law's loss of every row."""
    return CHINCHILLA.value({"N": table["N"].to_numpy(), "D": table["D"].to_numpy()}, TRUTH)


def shared_sd(errors: str) -> float:
    """Standard deviation of what a new run of a new size has beyond a point's own error."""
    return 0.0 if errors == "independent" else GROUP_SD


def measured(table: pd.DataFrame, errors: str, rng: np.random.Generator) -> pd.DataFrame:
    """The table with losses measured once: column `loss`."""
    total = POINT_SD * rng.standard_normal(len(table))
    labels = {"run": table["run_id"], "size": table["N"]}.get(errors)
    if labels is not None:
        codes = np.unique(labels, return_inverse=True)[1]
        total = total + GROUP_SD * rng.standard_normal(codes.max() + 1)[codes]
    return table.assign(loss=clean_losses(table) * np.exp(total))
