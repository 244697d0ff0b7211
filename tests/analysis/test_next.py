"""Runs are bought for what they tell about the target, by their price."""

import itertools

import numpy as np
import pandas as pd
import pytest

from aimscale.analysis import fit, laws
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.next import buy, grid_offer, next_runs

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
    assert len(rows) < len(n) / 2, "what hardly narrows the forecast is not bought, whatever there is to spend"
    with pytest.raises(AnalysisError, match=r"cheapest candidate"):
        buy(known, offer, price, TARGET, budget=0.5 * price.min())


@pytest.mark.parametrize(
    ("sizes", "data", "bought"),
    [
        # one run near the target is worth the whole budget; gain over price, or its root, would buy cheap ones first
        ([4e7, 4e7, 4e7, 4e7, 4e7, 4e7, 9e7], [1.2e7, 1.2e7, 1.2e7, 1.2e7, 1.2e7, 1.2e7, 2.7e7], [6]),
        # cheap runs that surround the target are; gain alone would buy the dear one
        ([1e7, 1e8, 1e7, 1e8, 3e7, 3e7, 4e7], [3e7, 3e6, 3e6, 1e7, 1e7, 3e7, 2e7], None),
    ],
)
def test_no_basket_for_the_money_leaves_less_error(known, sizes, data, bought):
    """Baskets by several powers of the price are weighed: any single one errs by up to half more."""
    price = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 6.0])

    def left(rows: list[int]) -> float:
        offer = {"N": np.array(sizes)[rows], "D": np.array(data)[rows]}
        return buy(known, offer, price[rows], TARGET, budget=price[rows].sum())[1]

    subsets = [[*rows] for num in range(1, 7) for rows in itertools.combinations(range(7), num)]
    best = min(left(rows) for rows in subsets if price[rows].sum() <= 6)
    rows, ours = buy(known, {"N": np.array(sizes), "D": np.array(data)}, price, TARGET, budget=6.0)
    assert ours == pytest.approx(best, rel=0.02)
    assert bought is None or rows.tolist() == bought


def test_a_proposal_says_what_it_costs_and_warns_of_a_fixed_ratio(grid):
    offer = grid_offer(grid.rename(columns={"params_total": "N", "images_seen": "D"}), {"N": 1e8, "D": 3e7})
    assert (offer["N"] * offer["D"] < 3e15).all()
    found = next_runs(grid, {"N": 1e8, "D": 3e7}, offer.assign(price=6e-12 * offer["N"] * offer["D"]), budget=2000)
    assert found.price <= 2000
    assert not {"one_variable", "collinear"} & {flag.kind for flag in found.flags}
    n = np.repeat(np.geomspace(1e5, 1e7, 10), 2)
    noise = np.exp(0.003 * np.random.default_rng(0).standard_normal(20))
    line = pd.DataFrame({"N": n, "D": n * np.tile([1.0, 1.5], 10), "val_loss": (0.2 + 30 * n**-0.4) * noise})
    ray = pd.DataFrame({"N": [2e7, 4e7], "D": [2e7, 4e7], "price": [1.0, 2.0]})
    found = next_runs(line, {"N": 1e11, "D": 1e11}, ray, budget=3, law="chinchilla")
    assert {"one_variable", "collinear"} & {flag.kind for flag in found.flags}
    with pytest.raises(AnalysisError, match="D"):
        next_runs(grid, {"N": 1e8}, ray, budget=3, law="chinchilla")
