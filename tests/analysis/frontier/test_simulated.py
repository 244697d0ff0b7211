"""Tables simulated through a design scatter about the law as the table at hand does, and their fit is its fit."""

import numpy as np
import pytest

from aimscale.analysis import fit, laws
from aimscale.analysis.coverage.designs import COST, Design, measured
from aimscale.analysis.frontier.optimum import points_of
from aimscale.analysis.frontier.simulated import simulate


@pytest.fixture(scope="module")
def pairs():
    """Per table: ln loss - law of the simulated tables (num, n) and of itself (n,), and the law's slopes (n, k)."""
    design, rng, out = Design(sizes=7, budgets=5, seeds=1, errors="run"), np.random.default_rng(0), []
    for seed in range(20):
        points = points_of(measured(design.scales(), design.errors, rng), y="loss", columns=None)
        law = fit(laws.CHINCHILLA, points, y="loss", resamples=0)
        fitted = np.log(law.predict(points)["value"].to_numpy())
        tables = simulate(points, COST, 300, seed)
        out.append((tables.log_losses - fitted, np.log(points["loss"].to_numpy()) - fitted, law.log_slopes(points)))
    return out


def test_sizes_scatter_about_the_law_as_on_the_table(pairs):
    # with variances drawn anew sizes scattered 1.3 times as much, and every interval was so much too wide
    ratios = [
        np.sqrt(np.mean(simulated.reshape(-1, 5, 7).mean(axis=1) ** 2) / np.mean(own.reshape(5, 7).mean(axis=0) ** 2))
        for simulated, own, _ in pairs
    ]
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.12)


def test_a_fit_of_a_simulated_table_is_the_fit_of_the_table(pairs):
    for simulated, _, slopes in pairs:
        assert np.abs(simulated @ slopes).max() < 1e-9
