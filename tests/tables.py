"""Tables whose values follow a known law."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from aimscale.analysis import laws

KNOWN = {"E": 0.2, "A": 30.0, "B": 40.0, "alpha": 0.4, "beta": 0.5}
"""Parameters of Chinchilla's law."""
Axis = tuple[float, float, int]


def law_grid(
    params: Mapping[str, float] = KNOWN,
    law: laws.Law = laws.CHINCHILLA,
    *,
    sizes: Axis = (1e5, 1e7, 6),
    budgets: Axis = (1e5, 3e6, 5),
    noise: float = 0.0,
    rng: np.random.Generator | int = 0,
) -> pd.DataFrame:
    """Return N, D, C and val_loss on a grid of sizes and budgets, each given by its ends and number of steps."""
    n, d = (axis.ravel() for axis in np.meshgrid(np.geomspace(*sizes), np.geomspace(*budgets)))
    at = {"N": n, "D": d, "C": 6 * n * d}
    error = noise * np.random.default_rng(rng).standard_normal(n.size)
    return pd.DataFrame({**at, "val_loss": law.value(at, params) * np.exp(error)})
