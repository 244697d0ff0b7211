"""Straight from the scale or by way of the loss: the backtest takes the route that is right."""

import numpy as np
import pandas as pd
import pytest

from aimscale.analysis import fit, laws
from aimscale.analysis.forecasts.routes import chosen_route, signal_to_noise

PLACE = pd.DataFrame({"N": [3e7], "D": [1e7]})


@pytest.fixture
def probed():
    """7 sizes x 5 budgets of a known law."""
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e5, 1e7, 7), np.geomspace(1e5, 3e6, 5)))
    loss = 0.2 + 30 * n**-0.4 + 40 * d**-0.5
    noise = np.exp(0.002 * np.random.default_rng(0).standard_normal(n.size))
    return pd.DataFrame({"params_total": n, "images_seen": d, "val_loss": loss * noise, "chance": 0.1})


def route_of(probed):
    law = fit(laws.CHINCHILLA, probed, resamples=20)
    return chosen_route(laws.CHINCHILLA, probed, PLACE, y="val_loss", kind="sigmoid", resamples=20, loss_fit=law)


def test_an_accuracy_that_follows_the_loss_goes_by_way_of_it(probed):
    rng = np.random.default_rng(1)
    true = 0.1 + 0.8 / (1 + np.exp(25 * (probed["val_loss"] - 0.42)))
    route, why = route_of(probed.assign(top1=np.clip(true + 0.003 * rng.standard_normal(len(true)), 0, 1)))
    assert (why.kind, why.subject) == ("route", "by way of the loss")
    at = 0.2 + 30 * 3e7**-0.4 + 40 * 1e7**-0.5
    assert route["value"].iloc[0] == pytest.approx(0.1 + 0.8 / (1 + np.exp(25 * (at - 0.42))), abs=0.02)


def test_an_accuracy_that_does_not_goes_straight_from_the_scale(probed):
    error = 0.05 + 20 * probed["params_total"] ** -0.35 + 0.5 * probed["images_seen"] ** -0.15  # other exponents
    route, why = route_of(probed.assign(top1=1 - error.clip(upper=0.9)))
    assert route["value"].iloc[0] == pytest.approx(0.95 - 20 * 3e7**-0.35 - 0.5 * 1e7**-0.15, abs=0.01)
    assert (route.to_numpy() <= 1).all()
    assert (why.kind, why.subject) == ("route", "straight from the scale")


def test_signal_to_noise_compares_scales_with_seeds(probed):
    rng = np.random.default_rng(0)
    seeds = pd.concat(
        [probed.assign(top1=probed["val_loss"] + 0.01 * rng.standard_normal(len(probed))) for _ in range(3)]
    )
    spread = probed["val_loss"].std(ddof=1)
    assert signal_to_noise(seeds) == pytest.approx(spread / 0.01, rel=0.2)
    assert np.isnan(signal_to_noise(probed.assign(top1=0.5)))
