"""`aimscale next`: from a collected sweep to the sweep of the runs worth buying."""

import json
import shlex
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from commands import answer, refused, say

from aimscale.analysis.errors import AnalysisError
from aimscale.sweeps.planning.costs import cost_cards
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.sweepfile import SweepError, load_sweep


@pytest.fixture
def collected(write_sweep: Any) -> Any:
    """Collect a sweep of three sizes and four budgets whose loss follows a known law."""
    sweep = write_sweep(
        sizes=["rung-32", "rung-48", "rung-64", "rung-96"], budgets=[640, 1280, 2560, 5120], seeds=[0, 1]
    )
    runs = plan(sweep)
    rng = np.random.default_rng(0)
    rows = []
    for one, card in zip(runs, cost_cards(sweep, runs), strict=True):
        for cost in card.budgets:
            n, d = float(card.params_total), float(cost.images_seen)
            loss = (0.2 + 5 * n**-0.3 + 9 * d**-0.4) * np.exp(0.002 * rng.standard_normal())
            row = {"run_id": one.run_id, "status": "complete", "size": one.cell["size"], "seed": one.cell["seed"]}
            rows.append({**row, "params_total": n, "images_seen": d, "flops_train": cost.flops, "val_loss": loss})
    sweep.directory.mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(sweep.directory / "results.parquet")
    return sweep


def test_folders_are_tables_where_fit_reads_them(collected: Any, tmp_path: Any) -> None:
    """A folder that was collected elsewhere holds no sweep file, or one without its record."""
    (collected.directory / "sweep.yaml").write_text(collected.text)
    for verb in (["next", "--target", "N=1e7,D=100k"], ["fit"]):
        assert say(verb[0], collected.directory, *verb[1:])
    out = tmp_path / "out"
    say("publish", collected.directory, out, "--licence", "CC0-1.0")
    assert (out / "data" / "results.parquet").is_file()
    assert "there is no table nothere.csv" in refused("next", "nothere.csv", "--target", "N=1e7,D=100k")


def test_the_runs_are_priced_by_their_cards_and_written_as_a_sweep(collected: Any, tmp_path: Any) -> None:
    args = [collected.source, "--root", collected.root, "--target", "N=1e7,D=100k"]
    offered = answer("next", *args, "--budget", 1e9)
    assert {row["D"] for row in offered["table"]} <= {10240.0, 20480.0}  # 5120 is measured at every size
    assert 1 < len(offered["table"]) < 8, "the others hardly narrow the forecast"
    budget = sum(row["price"] for row in offered["table"]) / 3
    out = tmp_path / "more.yaml"
    text = say("next", *args, "--budget", budget, "--write", out)
    assert "GPU-hours" in text
    assert f"aimscale plan {out}" in text
    again = load_sweep(out, collected.root)
    runs = plan(again)
    hours = sum(card.device_hours for card in cost_cards(again, runs))
    assert again.name == "tiny-next"
    assert 0 < hours <= budget * 1.01  # budgets of one size share a trunk: never dearer than one by one
    assert {r.cell["seed"] for r in runs} == {0}
    assert yaml.safe_load(out.read_text())["base"] == yaml.safe_load(collected.text)["base"]


def test_the_next_line_runs_as_printed_under_another_root_and_without_a_budget(collected: Any) -> None:
    text = say("next", collected.source, "--root", collected.root, "--target", "N=1e7,D=100k", "--y", "val_loss")
    (line,) = [each for each in text.splitlines() if each.startswith("next: aimscale next ")]
    written = say(*shlex.split(line)[2:])
    (plan_line,) = [each for each in written.splitlines() if each.startswith("next: aimscale plan ")]
    _, _, verb, file, *options = shlex.split(plan_line)
    assert (verb, options) == ("plan", ["--root", str(collected.root)])
    assert plan(load_sweep(file, collected.root))


def test_mistakes_are_told_by_name(collected: Any, tmp_path: Any) -> None:
    sweep = [collected.source, "--root", collected.root, "--budget", 1, "--target"]
    table = [collected.directory / "results.parquet", "--budget", 1, "--law", "chinchilla", "--target"]
    for args, target in ((sweep, "N=1e9"), (table, "N=10,D=10"), (table, "N=1e7,D=1T,Q=3"), (table, "N=1e7,D=1X")):
        with pytest.raises(AnalysisError):
            say("next", *args, target)
    elsewhere = tmp_path / "elsewhere" / "more.yaml"
    with pytest.raises(SweepError, match=r"more\.yaml"):
        say("next", *sweep, "N=1e7,D=1e5", "--write", elsewhere)
    with pytest.raises(SweepError, match="--write"):
        say("next", *table, "N=1e7,D=1e5", "--write", elsewhere)
    (collected.directory / "results.parquet").unlink()
    with pytest.raises(SweepError, match="launch it first"):
        say("next", *sweep, "N=1e7,D=1e5")


def test_runs_are_bought_for_a_probes_error_too(collected: Any, tmp_path: Any) -> None:
    df = pd.read_parquet(collected.directory / "results.parquet")
    df["probes"] = [json.dumps([{"task": "pets", "kind": "knn", "top1": 1 - loss / 2}]) for loss in df["val_loss"]]
    df.to_csv(tmp_path / "probed.csv", index=False)
    args = [tmp_path / "probed.csv", "--target", "N=1e7,D=100k", "--budget", 1, "--law", "chinchilla"]
    by_loss, by_error = (answer("next", *args, *more) for more in ([], ["--y", "pets:knn"]))
    assert by_error["forecast"] == pytest.approx(by_loss["forecast"] / 2, rel=1e-3)
    assert by_error["law"]["columns"]["y"] == "1 - top1:pets:knn"
