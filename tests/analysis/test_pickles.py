"""Forecasts, frontiers and proposals can be kept in a pickle, for joblib and other processes."""

import pickle

import pandas as pd
import pytest

from aimscale.analysis import forecast, frontier, next_runs


@pytest.mark.slow
def test_results_come_back_from_a_pickle_as_they_were(grid):
    probe = {"task": "t", "kind": "linear", "chance": 0.1}
    probed = grid.assign(probes=[[probe | {"top1": 1 - loss}] for loss in grid["val_loss"]])
    offer = pd.DataFrame({"N": [2e7], "D": [2e7], "price": [1.0]})
    for made in (
        forecast(probed, "N=30M,D=10M"),
        frontier(grid),
        next_runs(grid, {"N": 1e8, "D": 3e7}, offer, budget=3),
    ):
        back = pickle.loads(pickle.dumps(made))
        assert back.to_json() == made.to_json()
        assert back.summary() == made.summary()
