"""Probes of finished budgets: which are missing, and how they reach the table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aimscale.aim.model import AIM
from aimscale.aim.weights import write_weights
from aimscale.analysis.published import compare
from aimscale.analysis.table.read import read_table
from aimscale.analysis.table.select import probe_frame, read_tables
from aimscale.harness.probe.run import probe_baseline, probe_run
from aimscale.harness.results import finished_entries
from aimscale.harness.run.config import ProbeSection, RunConfig, build_model_config
from aimscale.harness.run.directory import RunDir
from aimscale.sweeps.collection import collect
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.run import Run
from aimscale.sweeps.planning.sweepfile import Sweep
from aimscale.sweeps.state.planned_sweep import PlannedSweep


@pytest.fixture
def trained(write_sweep: Any, write_images: Any, tmp_path: Path) -> Callable[..., tuple[Sweep, list[Run]]]:
    """Make a sweep whose runs have finished budgets (of random weights) with rows without probes."""
    for name, number in (("train", 24), ("test", 12)):
        write_images(tmp_path / "data" / name, number, seed=number, classes=("red", "blue"))

    def make(**task: Any) -> tuple[Sweep, list[Run]]:
        own = {"task": "colour", "train": "data/train", "test": "data/test", "kinds": ["knn"], **task}
        sweep = write_sweep(
            sizes=["w16-d2"],
            budgets=[64, 128],
            seeds=[0, 1],
            base={"schedule": {"warmup_images": 0}, "validation": {"path": "data/test"}, "probes": [own]},
        )
        runs = plan(sweep)
        for run in runs:
            record = RunDir.create(sweep.run_dir(run.run_id), run.config)
            record.write_status(state="finished")
            for budget in run.budgets:
                torch.manual_seed(budget)
                write_weights(AIM(build_model_config(run.config.training)).state_dict(), record.model_file(budget))
                row = {"run_id": run.run_id, "images_seen": budget, "val_loss": 0.5, "finished_at": "2026-01-01"}
                record.record_row(row | {"probes": []})
        return sweep, runs

    return make


def probed(run: RunDir, config: RunConfig, section: ProbeSection) -> list[int]:
    """Return the budgets that have probes."""
    return [budget for budget in config.evaluation.budgets if finished_entries(run, config, budget, section)]


def test_what_is_done_from_other_weights_or_settings_is_missing_and_reaches_the_table(trained: Any) -> None:
    sweep, (run, _) = trained()
    directory, (task,) = RunDir(sweep.run_dir(run.run_id)), run.config.evaluation.probes
    assert probed(directory, run.config, task) == []
    list(probe_run(directory.path))
    assert probed(directory, run.config, task) == [64, 128]
    found = probe_frame(read_table(collect(PlannedSweep(sweep)).table))
    assert list(zip(found["images_seen"], found["n"], strict=True)) == [(64, 12), (128, 12)]
    assert probed(directory, run.config, task.model_copy(update={"epochs": 3})) == []
    retrained = AIM(build_model_config(run.config.training))
    retrained.init_weights(1)
    write_weights(retrained.state_dict(), directory.model_file(64))
    assert probed(directory, run.config, task) == [128]


def test_baselines_reach_a_table_of_their_own_and_the_comparison(trained: Any) -> None:
    sweep, runs = trained()
    for run in runs:
        list(probe_run(sweep.run_dir(run.run_id)))
    first = RunDir(sweep.run_dir(runs[0].run_id))
    (entries,) = [found for _, found in probe_baseline("raw-pixels", first, runs[0].config.evaluation.probes)]
    found = collect(PlannedSweep(sweep))
    assert (found.num_rows, found.num_complete, found.num_baselines) == (4, 4, 1)
    frame = read_tables([found.table])
    assert len(frame) == 4  # no law meets a baseline
    beside = compare(frame).baselines
    assert list(beside["baseline"]) == ["raw-pixels"] * 2
    assert list(beside["images_seen"]) == [128] * 2
    assert list(beside["baseline_top1"]) == [entries[0]["top1"]] * 2
    assert "raw-pixels" in compare(frame).summary()
    next((first.path / "baselines" / "raw-pixels").glob("*.json")).write_text("{")
    again = collect(PlannedSweep(sweep))
    assert again.num_baselines == 0
    assert list(again.damaged) == [f"{first.path.name}/baselines/raw-pixels"]
    assert not (sweep.directory / "baselines.parquet").exists()
