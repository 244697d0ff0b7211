"""Runs are bought for what they tell about the target, by their price."""

import numpy as np
import pandas as pd
import pytest

from aimscale.analysis import fit, laws
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.next.proposal import buy, grid_offer, propose

TARGET = {"N": [1e8], "D": [3e7]}


@pytest.fixture
def known(grid):
    return fit(grid, laws.CHINCHILLA, objective="log_lsq")


def test_a_basket_keeps_to_its_budget_and_more_money_leaves_less_error(known):
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e5, 3e7, 6), np.geomspace(1e5, 1e7, 6)))
    offer, price = {"N": n, "D": d}, n * d
    errors = []
    for budget in np.array([0.02, 0.2, 1.0]) * price.sum():
        rows, left = buy(known, offer, price, TARGET, budget=budget)
        assert price[rows].sum() <= budget
        assert len(set(rows)) == len(rows)
        errors.append(left)
        assert left < 1
    assert errors == sorted(errors, reverse=True)
    with pytest.raises(AnalysisError, match=r"cheapest candidate"):
        buy(known, offer, price, TARGET, budget=0.5 * price.min())


def test_baskets_by_several_powers_of_the_price_are_weighed(known):
    """Where one run near the target is worth the whole budget, gain over price alone fills the basket with cheap ones;
    where many cheap runs are, gain alone spends all on one."""
    cheap = {"N": np.full(30, 1.1e5), "D": np.full(30, 1.1e5)}
    offer = {v: np.append(values, TARGET[v][0] / 1.5) for v, values in cheap.items()}
    dear, _ = buy(known, offer, np.append(np.ones(30), 30.0), TARGET, budget=30)
    assert dear.tolist() == [30]
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(2e6, 3e7, 4), np.geomspace(1e6, 1e7, 4)))
    many, _ = buy(
        known, {"N": np.append(n, n[0]), "D": np.append(d, d[0])}, np.append(np.ones(16), 16.0), TARGET, budget=16
    )
    assert len(many) == 16


def test_a_proposal_says_what_it_costs_and_warns_of_a_fixed_ratio(grid):
    offer = grid_offer(grid.rename(columns={"params_total": "N", "images_seen": "D"}), {"N": 1e8, "D": 3e7})
    assert (offer["N"] * offer["D"] < 3e15).all()
    found = propose(grid, {"N": 1e8, "D": 3e7}, offer.assign(price=6e-12 * offer["N"] * offer["D"]), budget=2000)
    assert found.price <= 2000
    assert not {"one_variable", "collinear"} & {flag.kind for flag in found.flags}
    n = np.repeat(np.geomspace(1e5, 1e7, 10), 2)
    noise = np.exp(0.003 * np.random.default_rng(0).standard_normal(20))
    line = pd.DataFrame({"N": n, "D": n * np.tile([1.0, 1.5], 10), "val_loss": (0.2 + 30 * n**-0.4) * noise})
    ray = pd.DataFrame({"N": [2e7, 4e7], "D": [2e7, 4e7], "price": [1.0, 2.0]})
    found = propose(line, {"N": 1e11, "D": 1e11}, ray, budget=3, law="chinchilla")
    assert {"one_variable", "collinear"} & {flag.kind for flag in found.flags}
    with pytest.raises(AnalysisError, match="D"):
        propose(grid, {"N": 1e8}, ray, budget=3, law="chinchilla")
