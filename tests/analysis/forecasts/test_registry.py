"""A forecast is written down before the run and scored after it."""

import json

import numpy as np
import pandas as pd
import pytest
from commands import answer, say

from aimscale.analysis import read_table
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.forecasts.forecast import read_register, score_words, scores

AT = {"N": 3e7, "D": 1e7}
TRUE_LOSS = 0.2 + 30 * AT["N"] ** -0.4 + 40 * AT["D"] ** -0.5


def accuracy(loss):
    return 0.1 + 0.8 / (1 + np.exp(12 * (loss - 0.45)))


def probes(loss, seed=0):
    noise = 0.004 * np.random.default_rng(seed).standard_normal(np.size(loss))
    return [
        json.dumps([{"task": "digits", "kind": "linear", "top1": float(a), "chance": 0.1, "n": 1000}])
        for a in np.clip(accuracy(loss) + noise, 0, 1)
    ]


def scored(register, rows: pd.DataFrame) -> pd.DataFrame:
    """Scores against a table of today, written and read as a user's."""
    path = register.with_name("today.csv")
    rows.to_csv(path, index=False)
    return scores(register, read_table(path))


@pytest.fixture
def table(grid, tmp_path):
    grid["probes"] = probes(grid["val_loss"])
    path = tmp_path / "results.csv"
    grid.to_csv(path, index=False)
    return path


def test_loss_and_accuracy_are_forecast_with_intervals_that_hold_the_truth(table):
    out = answer("forecast", table, "--at", "N=3e7,D=10M")
    found = {row["quantity"]: row for row in out["table"]}
    assert out["scales"] == [AT]
    assert found["val_loss"]["pi_lo"] < TRUE_LOSS < found["val_loss"]["pi_hi"]
    assert found["digits:linear"]["pi_lo"] < accuracy(TRUE_LOSS) < found["digits:linear"]["pi_hi"]
    assert found["val_loss"]["pi_hi"] / found["val_loss"]["pi_lo"] < 1.2
    assert found["val_loss"]["distance"] == pytest.approx(10, rel=1e-6)


def test_a_registered_forecast_is_scored_once_the_run_is_there(table, grid):
    out = say("forecast", table, "--at", "N=3e7,D=1e7", "--law", "chinchilla", "--register")
    register = table.with_name("forecasts.jsonl")
    assert f"registered in {register}" in out
    loss, top1 = read_register(register)
    assert (loss["law"], loss["quantity"], loss["num_points"]) == ("chinchilla", "val_loss", 30)
    assert len(loss["data_sha256"]) == 64
    waiting = scored(register, grid)
    assert waiting["measured"].isna().all()
    assert score_words(waiting) == "0 of 0 runs inside their registered intervals, 2 not measured yet"
    new = grid.iloc[[0]].assign(run_id="new", params_total=AT["N"], images_seen=AT["D"], val_loss=TRUE_LOSS)
    new["probes"] = probes(np.array([TRUE_LOSS]))
    unfinished = new.assign(run_id="other", val_loss=9.0, status="failed")
    found = scored(register, pd.concat([grid, new, unfinished])).set_index("quantity")
    assert found["inside"].tolist() == [True, True]
    assert found.loc["val_loss", "num_rows"] == 1
    assert found.loc["val_loss", "error"] == pytest.approx(TRUE_LOSS / loss["value"] - 1)
    assert top1["quantity"] in found.index
    off = scored(register, pd.concat([grid, new.assign(val_loss=2 * TRUE_LOSS)]))
    assert off["inside"].tolist() == [False, True]
    assert score_words(off).startswith("1 of 2 runs inside")


def test_every_run_is_scored_by_itself(table, grid):
    """An interval is of one run: the mean of two seeds lay inside where neither did."""
    say("forecast", table, "--at", "N=3e7,D=1e7", "--law", "chinchilla", "--register")
    register = table.with_name("forecasts.jsonl")
    loss, _ = read_register(register)
    half = loss["pi_hi"] - loss["value"]
    values = [loss["value"] + 3 * half, loss["value"] - 3 * half, loss["value"]]
    runs = [
        grid.iloc[[0]].assign(run_id=f"s{i}", params_total=AT["N"], images_seen=AT["D"], val_loss=value, probes=None)
        for i, value in enumerate(values)
    ]
    found = scored(register, pd.concat([grid, *runs]))
    of_loss = found[found["quantity"] == "val_loss"]
    assert of_loss["inside"].tolist() == [False, False, True]
    assert of_loss["measured"].tolist() == pytest.approx(values)
    assert of_loss["num_rows"].tolist() == [3, 3, 3]
    assert found["num_rows"].tolist() == [3, 3, 3, 0]
    assert score_words(found) == "1 of 3 runs inside their registered intervals, 1 not measured yet"


def test_what_is_measured_already_is_no_forecast(table, grid):
    at = f"N={grid['params_total'].iloc[-1]},D={grid['images_seen'].iloc[-1]}"
    with pytest.raises(AnalysisError, match="already holds 1 measurements"):
        say("forecast", table, "--at", at, "--law", "chinchilla", "--register")
    assert not table.with_name("forecasts.jsonl").exists()
    with pytest.raises(AnalysisError, match="needs D"):
        say("forecast", table, "--at", "N=1e9")
    register = table.with_name("forecasts.jsonl")
    for line in ("nothing", "{}", '{"at": [1], "columns": {}}', "[1]"):
        register.write_text(f"{line}\n")
        with pytest.raises(AnalysisError, match="Line 1"):
            read_register(register)
