"""Exports of W&B as other people's runs give them; those of our own are read back in tests/harness/log."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import say

from aimscale.analysis import fit, read_table
from aimscale.analysis.errors import AnalysisError

SIZES, TOKENS = np.geomspace(1e7, 1e9, 5), np.geomspace(1e8, 1e10, 4)


def loss(n: float, d: float) -> float:
    return 1.8 + 400 * n**-0.34 + 2000 * d**-0.37


def test_the_runs_table_leaves_out_what_crashed_and_is_fitted(tmp_path: Path) -> None:
    runs = [
        {"Name": f"run-{i}", "State": "finished", "Notes": "-", "Tags": "a,b", "Created": f"2026-01-01T00:00:{i:02}Z"}
        | {"Runtime": 10.5 * i, "model.params": n, "tokens": d, "val/loss": loss(n, d), "images_seen": 7}
        for i, (n, d) in enumerate((n, d) for n in SIZES for d in TOKENS)
    ]
    crashed = [{**runs[0], "Name": "bad", "State": "crashed", "val/loss": 9.0}]
    path = tmp_path / "wandb_export_2026-01-02T03_04_05.678+00_00.csv"
    pd.DataFrame([*runs, *crashed]).to_csv(path, index=False)
    table = read_table(path, {"N": "model.params", "D": "tokens"})
    result = fit(table, "chinchilla")
    assert result.params["alpha"] == pytest.approx(0.34, abs=1e-3)
    assert [(each.kind, each.number) for each in result.exclusions] == [("status", 1)]
    columns = "N=model.params,D=tokens,L=val/loss"
    assert "20 of 21\n" in say("fit", path, "--columns", columns)


def test_the_apis_dictionaries_are_columns(tmp_path: Path) -> None:
    """As W&B's guide writes them, in a CSV; and the lines of a history."""
    runs = {
        "summary": [{"loss": 2.5, "_wandb": {"runtime": 9}}, {"loss": 2.25}],
        "config": [{"model": {"width": 64}, "n": 1000}, {"model": {"width": 128}, "n": 4000}],
        "name": ["one", "two"],
    }
    pd.DataFrame(runs).to_csv(tmp_path / "project.csv")
    table = read_table(tmp_path / "project.csv", {"N": "config.n", "L": "summary.loss"})
    columns = ["run_id", "params_total", "val_loss", "config.model.width"]
    assert table[columns].to_numpy().tolist() == [["one", 1000, 2.5, 64], ["two", 4000, 2.25, 128]]
    line = {"_step": 3, "config": {"n": 5}, "val/loss": 2.0, "tokens": 100}
    pd.DataFrame([line]).to_json(tmp_path / "history.jsonl", orient="records", lines=True)
    table = read_table(tmp_path / "history.jsonl", {"N": "config.n", "D": "tokens"})
    assert table[["params_total", "images_seen", "val_loss"]].to_numpy().tolist() == [[5, 100, 2.0]]
    pd.DataFrame({**runs, "summary": ["nan)", ""]}).to_csv(tmp_path / "damaged.csv")
    with pytest.raises(AnalysisError, match="no dictionary"):
        read_table(tmp_path / "damaged.csv")
    own = {"Name": "x", "State": "running", "run_id": "x", "val/loss": [np.nan], "val/images_seen": [np.nan]}
    pd.DataFrame(own).to_csv(tmp_path / "early.csv")
    with pytest.raises(AnalysisError, match="val/loss"):
        read_table(tmp_path / "early.csv")
