"""Tables simulated through a design scatter about the law as the table at hand does."""

import numpy as np
import pandas as pd
import pytest

from aimscale.analysis import fit, laws
from aimscale.analysis.frontier.optimum import Cost, points_of
from aimscale.analysis.frontier.simulated import simulate


def test_sizes_scatter_about_the_law_as_on_the_table():
    rng, ratios = np.random.default_rng(0), []
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e5, 1e7, 7), np.geomspace(1e5, 3e6, 5)))
    clean = 0.2 + 30 * n**-0.38 + 40 * d**-0.4
    for seed in range(20):
        shared = 0.005 * rng.standard_normal(7)[np.unique(n, return_inverse=True)[1]]
        loss = clean * np.exp(shared + 0.003 * rng.standard_normal(35))
        points = points_of(pd.DataFrame({"N": n, "D": d, "C": 6 * n * d, "loss": loss}), y="loss", columns=None)
        law = fit(laws.CHINCHILLA, points, y="loss", resamples=0)
        fitted = np.log(law.predict(points)["value"].to_numpy())
        tables = simulate(points, Cost(kappa=6.0, s=0.0), 300, seed)
        simulated = (tables.log_losses - fitted).reshape(-1, 5, 7).mean(axis=1)
        ratios.append(np.mean(simulated**2))
    assert np.sqrt(np.mean(ratios)) == pytest.approx(np.hypot(0.005, 0.003 / np.sqrt(5)), rel=0.25)
