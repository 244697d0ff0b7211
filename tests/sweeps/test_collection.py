from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from commands import say

from aimscale.aim.errors import UserError
from aimscale.analysis.table.read import read_table
from aimscale.analysis.table.select import read_curves
from aimscale.sweeps import collection
from aimscale.sweeps.collection import CollectResult, collect
from aimscale.sweeps.planning.costs import cost_cards
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.sweepfile import Sweep, load_sweep
from aimscale.sweeps.state.planned_sweep import PlannedSweep
from aimscale.sweeps.state.record import RunRecord, prepare_directory
from aimscale.sweeps.sweep_status import sweep_status


def gather(sweep: Sweep) -> CollectResult:
    """Collect all planned runs."""
    return collect(PlannedSweep(sweep))


def test_partial_damaged_and_diverged_runs_collect(write_sweep: Any, stand_in: Any, launch: Any) -> None:
    launch(write_sweep(sizes=["rung-32"], seeds=[0, 1]), devices=2, command=stand_in())
    sweep = write_sweep(seeds=[0, 1])
    runs = plan(sweep)
    cards = cost_cards(sweep, runs)
    done, damaged, diverged, missing = (RunRecord(sweep.run_dir(run.run_id)) for run in runs)
    damaged.results.write_text("{ half")
    diverged.write_status(state="diverged", reason="loss is NaN", reason_class="nan")
    found = gather(sweep)
    assert (found.num_rows, found.num_complete) == (6, 2)
    assert list(found.damaged) == [damaged.path.name]
    table = read_table(found.table)
    assert list(table["status"]) == ["complete", "complete", "diverged", "diverged", "unfinished", "unfinished"]
    assert list(table["images_seen"]) == [640, 1280] * 3
    assert table["val_loss"].notna().sum() == 2
    assert set(table["run_id"]) == {done.path.name, diverged.path.name, missing.path.name}
    assert (table["params_total"].iloc[2:] == cards[2].params_total).all()
    assert "val_loss" in read_table(found.table.with_suffix(".csv"))

    row = done.read_rows()[0]
    done.record_row(row | {"num_loss_spikes": 3})
    gather(sweep)
    assert read_table(found.table)["num_loss_spikes"].max() == 3

    before = {path.name: path.read_bytes() for path in sweep.directory.glob("*.*")}
    gather(sweep)
    assert before == {path.name: path.read_bytes() for path in sweep.directory.glob("*.*")}


def test_points_during_training_are_a_table_of_their_own(write_sweep: Any, stand_in: Any, launch: Any) -> None:
    task = {"task": "pets", "train": "data/train", "test": "data/test", "kinds": ["knn"]}
    sweep = write_sweep(sizes=["rung-32"], base={"probes": [task]})
    launch(sweep, devices=1, command=stand_in())
    runs, cards = plan(sweep), cost_cards(sweep, plan(sweep))
    (run,), (card,) = runs, cards
    assert len(read_curves([sweep.directory])) == 0
    evaluation = run.config.evaluation
    validation = f"{evaluation.validation.digest}.*"
    losses = {"val_loss": 0.25, "val_loss_se": 0.01, "val_num_images": 9, "validation": validation}
    lines = [
        {"images_seen": 192, "lr": 1e-3, **losses, "val_loss": 0.5},
        {"images_seen": 128, "lr": 1e-3, **losses, "validation": "deadbeef.*"},
        {"images_seen": 192, "lr": 1e-3, "val_loss": None},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    RunRecord(sweep.run_dir(run.run_id)).curve.write_text(text + '{"images_seen": 25')
    table = gather(sweep).table
    assert set(read_table(table)["status"]) == {"complete"}
    curves = read_curves([table, sweep.directory])
    assert list(curves["images_seen"]) == [128, 192]
    assert curves["val_loss"].isna().tolist() == [True, False], "measured by other settings than the plan's"
    (point,) = curves[curves["images_seen"] == 192].frame.to_dict("records")
    budget = card.budgets[0]
    expected = {"status": "during", "lr": 1e-3, "val_loss": 0.5, "run_id": run.run_id, "size": "rung-32"}
    assert {key: point[key] for key in expected} == expected
    assert point["flops_train"] == pytest.approx(budget.flops * 192 / budget.images_seen)
    assert len(read_table(table.with_name("curves.csv")).complete()) == 2, "for `fit curves.csv`"


def test_tasks_are_told_apart_by_the_fields_of_their_evaluations() -> None:
    """The evaluation asked for keeps its bare name, whatever its data if these cannot be read; others are named."""
    entries = [{"task": "pets", "evaluation": each} for each in ("a1-d1", "a1-d2", "b2-d1", "a1-d1-d2", None)]
    alone = [{"task": "dtd", "evaluation": "b2-d1"}]
    (row, empty) = collection._name_tasks([{"probes": [*entries, *alone]}, {"size": "x"}], {"pets": {"a1-*"}})
    assert [entry["task"] for entry in row["probes"]] == ["pets", "pets", "pets@b2-d1", "pets@a1-d1-d2", "pets", "dtd"]
    assert empty == {"size": "x"}


def test_rows_carry_what_the_sweep_varied(write_sweep: Any, stand_in: Any, launch: Any) -> None:
    varied = {"model.head_depth": [0, 2], "objective.target": ["normalised", "raw"]}
    sweep = write_sweep(sizes=["rung-32"], axes=varied, base={"lr_multiplier": 3.0})
    launch(sweep, devices=2, command=stand_in())
    cards = cost_cards(sweep, plan(sweep))
    table = read_table(gather(sweep).table)
    setups = [json.loads(text) for text in table["setup"]]
    assert set(table["lr_multiplier"]) == {3.0}
    assert list(table["head_depth"]) == [setup["model.head_depth"] for setup in setups]
    assert {setup.get("objective.target", "normalised") for setup in setups} == {"normalised", "raw"}
    counted = [budget.flops for card in cards for budget in card.budgets]
    assert (table["flops_executed"] / counted).between(0.3, 0.99).all()
    scale = {"model.size", "optimiser.lr_peak", "optimiser.batch_size", "budgets", "seed", "data.sources"}
    assert not scale & {key for setup in setups for key in setup}


ROWS: tuple[Any, ...] = (
    [{"images_seen": "640"}],
    [{"images_seen": [640]}],
    [{"images_seen": 640, "probes": [{}]}],
    [{"images_seen": 640, "run_id": ["x"]}],
    [{"images_seen": 640, "val_loss": "low"}],
    [{"val_loss": 0.5}],
    [640],
    640,
)


def test_values_of_wrong_types_cost_their_run_alone(write_sweep: Any) -> None:
    """The files of eight of nine runs hold values that no run writes."""
    sweep = write_sweep(sizes=["rung-32"], seeds=[*range(len(ROWS) + 1)])
    runs = plan(sweep)
    for run, rows in zip(
        runs, (*ROWS, [{"images_seen": 640, "run_id": runs[-1].run_id, "val_loss": 0.5}]), strict=True
    ):
        record = RunRecord(RunRecord.create(sweep.run_dir(run.run_id), run.config).path)
        record.write_status(state="preempted")
        record.results.write_text(json.dumps({"version": 1, "starts": [], "rows": rows}))
    baseline = RunRecord(sweep.run_dir(runs[-1].run_id)).path / "baselines" / "640" / "pets.json"
    baseline.parent.mkdir(parents=True)
    baseline.write_text(json.dumps({"backbone": "resnet", "probes": [{}]}))
    killed = sweep.directory / ".results.csv.1.part"
    killed.write_text("half a table")
    os.utime(killed, (0, 0))
    found = gather(sweep)
    names = [run.run_id for run in runs]
    folder = str(baseline.parent.relative_to(sweep.runs_dir))
    assert (list(found.damaged), found.num_complete) == ([*names[:-1], folder], 1)
    assert all("results.json" in found.damaged[name] for name in names[:-1])
    lines = sweep_status(PlannedSweep(sweep)).runs
    assert [line.run_id for line in lines if line.state == "damaged"] == names[:-1]
    assert lines[-1].val_loss == 0.5
    assert not killed.exists(), "what a killed collect left goes with the next one"


def test_a_damaged_record_of_the_sweep_is_named(write_sweep: Any) -> None:
    sweep = write_sweep(sizes=["rung-32"])
    prepare_directory(sweep, plan(sweep))
    path = sweep.directory / "sweep.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "data": "images"}))
    with pytest.raises(UserError, match=r"sweep\.json"):
        prepare_directory(sweep, plan(sweep))


def test_a_launched_sweep_comes_before_a_preset_of_its_name(write_sweep: Any) -> None:
    sweep = write_sweep(name="isoflop", sizes=["rung-32"])
    assert load_sweep("isoflop", sweep.root).file.isoflop
    prepare_directory(sweep, plan(sweep))
    assert load_sweep("isoflop", sweep.root).file == sweep.file


def test_imported_runs_are_collected_and_strays_are_not(write_sweep: Any, stand_in: Any, launch: Any) -> None:
    sweep = write_sweep(sizes=["rung-32"])
    launch(sweep, devices=1, command=stand_in())
    for name, start in (("imported-aim", {"imported": {"file": "x.pth"}}), ("a-stray", {})):
        record = RunRecord(sweep.runs_dir / name)
        record.record_row({"run_id": name, "size": "aim-600M", "images_seen": 2_048_000_000})
        record.record_start(start)
    found = gather(sweep)
    assert found.num_complete == 3
    assert list(read_table(found.table)["run_id"])[2:] == ["imported-aim"]


def test_rows_of_another_run_are_not_mixed_in(write_sweep: Any, stand_in: Any, launch: Any) -> None:
    sweep = write_sweep(seeds=[0, 1], sizes=["rung-32"])
    launch(sweep, devices=2, command=stand_in())
    first, second = (RunRecord(sweep.run_dir(run.run_id)) for run in plan(sweep))
    second.results.write_bytes(first.results.read_bytes())
    found = gather(sweep)
    assert found.num_complete == 2
    assert first.path.name in found.damaged[second.path.name]


def test_runs_of_another_plan_are_named_and_never_empty_the_table(
    write_sweep: Any, stand_in: Any, launch: Any, tmp_path: Path
) -> None:
    sweep = write_sweep(sizes=["rung-32"])
    launch(sweep, devices=1, command=stand_in())
    gather(sweep)
    before = (sweep.directory / "results.parquet").read_bytes()
    edited = write_sweep(sizes=["rung-32"], seeds=[7])
    with pytest.raises(UserError, match=str(sweep.runs_dir)):
        gather(edited)
    assert (sweep.directory / "results.parquet").read_bytes() == before
    both = write_sweep(sizes=["rung-32"], seeds=[0, 7])
    launch(both, devices=1, command=stand_in())
    again = write_sweep(sizes=["rung-32"], seeds=[7])
    found = gather(again)
    assert (found.num_complete, len(found.unplanned)) == (2, 1)


def test_collecting_what_was_never_launched_is_refused(write_sweep: Any) -> None:
    sweep = write_sweep()
    with pytest.raises(UserError, match="tiny"):
        gather(sweep)


def test_registered_forecasts_are_scored(write_sweep: Any, stand_in: Any, launch: Any) -> None:
    sweep = write_sweep(sizes=["rung-32"])
    launch(sweep, devices=1, command=stand_in())
    at = {"D": 1280}  # the stand-in writes no parameter counts
    shared = {"registered": "2026-01-01T00:00:00+00:00", "columns": {}, "law": "chinchilla", "quantity": "val_loss"}
    lines = [
        {**shared, "at": at, "value": 1.0, "pi_lo": 0.0, "pi_hi": 100.0},
        {**shared, "at": {**at, "D": 9e9}, "value": 0.5, "pi_lo": 0.4, "pi_hi": 0.6},
    ]
    (sweep.directory / "forecasts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    say("collect", sweep.source, "--root", sweep.root)
    kept = pd.read_csv(sweep.directory / "forecast-scores.csv")
    assert kept["num_rows"].tolist() == [1, 0]
