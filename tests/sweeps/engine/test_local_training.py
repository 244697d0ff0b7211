"""A local launch with the real trainer, from packed images to a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import aimscale.sweeps.engine.launch
from aimscale.analysis.table.read import read_table
from aimscale.sweeps.plan.costs import cost_cards
from aimscale.sweeps.plan.planner import plan
from aimscale.sweeps.state.record import RunRecord
from aimscale.sweeps.table.collection import collect


@pytest.mark.slow
def test_one_process_and_two_give_the_same_rows(write_sweep: Any, write_images: Any, tmp_path: Path) -> None:
    write_images(tmp_path / "data" / "train", 64, seed=0, side=20)
    write_images(tmp_path / "data" / "validation", 8, seed=1, side=20)
    losses = []
    for devices in (1, 2):
        sweep = write_sweep(name=f"on-{devices}", sizes=["rung-32"], budgets=[128, 256], devices=devices)
        result = aimscale.sweeps.engine.launch.launch(sweep, devices=2)
        assert len(result.finished) == 1
        runs = plan(sweep)
        found = collect(sweep, cost_cards(sweep, runs))
        table = read_table(found.table)
        assert list(table["status"]) == ["complete", "complete"]
        assert list(table["world_size"]) == [devices] * 2
        card = cost_cards(sweep, runs)[0]
        assert list(table["flops_train"]) == [budget.flops for budget in card.budgets]
        assert list(table["flops_6nd"]) == [budget.flops_6nd for budget in card.budgets]
        assert list(table["epochs"]) == [budget.epochs for budget in card.budgets]
        assert RunRecord(sweep.run_dir(runs[0].run_id)).read_status().images_planned == card.images_executed
        losses.append(list(table["val_loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
