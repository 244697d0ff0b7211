"""A local launch with the real trainer, from packed images to a table."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest

import aimscale.sweeps.engine.launch
from aimscale.analysis.table.read import read_table
from aimscale.sweeps.collection import collect
from aimscale.sweeps.engine import looks, queue
from aimscale.sweeps.engine.devices import RANKS_COMMAND
from aimscale.sweeps.planning.costs import cost_cards
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.state.planned_sweep import PlannedSweep
from aimscale.sweeps.state.record import RunRecord

RANK = """
import os, pathlib, sys
from aimscale.harness.run.directory import RunDir
from aimscale.harness.step.engine import Engine
from aimscale.harness.train.run import train

path, step = pathlib.Path(sys.argv[1]), Engine.step

def abort(self, *args, **kwargs):
    if os.environ["RANK"] == "1" and RunDir(path).read_status().attempt == 1:
        print("[rank1]:[E1 ProcessGroupNCCL.cpp:629] [Rank 1] Watchdog caught collective operation timeout: WorkNCCL("
              "SeqNum=7, OpType=ALLREDUCE, Timeout(ms)=100000) ran for 100004 milliseconds before timing out.\\n"
              "terminate called after throwing an instance of 'c10::DistBackendError'\\nframe #0: c10::Error::Error",
              file=sys.stderr, flush=True)
        os.abort()
    return step(self, *args, **kwargs)

Engine.step = abort
sys.exit(train(path))
"""


@pytest.mark.slow
def test_a_rank_that_nccl_ends_beside_healthy_ones_is_named_and_its_node_blamed(
    write_sweep: Any, write_images: Any, tmp_path: Path
) -> None:
    """NCCL needs GPUs: its words and its SIGABRT are played, all else is real."""
    write_images(tmp_path / "data" / "train", 64, seed=0, side=20)
    write_images(tmp_path / "data" / "validation", 8, seed=1, side=20)
    (tmp_path / "rank.py").write_text(RANK)
    ranks = [sys.executable, *RANKS_COMMAND, "2", str(tmp_path / "rank.py")]
    sweep = write_sweep(sizes=["rung-32"], budgets=[128], devices=2)
    result = aimscale.sweeps.engine.launch.launch(
        PlannedSweep(sweep), devices=2, command=lambda path, _: [*ranks, str(path)]
    )
    record = RunRecord(sweep.run_dir(*result.finished))
    first, second = record.read_attempts()
    assert first["reason_class"] == "node"
    assert first["reason"].startswith("rank 1 was ended by NCCL, as it waited for another in vain or met an error: ")
    assert "OpType=ALLREDUCE" in first["reason"]
    assert first["failed_nodes"] == [socket.gethostname()]
    assert second["reason_class"] is None


@pytest.mark.slow
def test_one_process_and_two_give_the_same_rows(write_sweep: Any, write_images: Any, tmp_path: Path) -> None:
    write_images(tmp_path / "data" / "train", 64, seed=0, side=20)
    write_images(tmp_path / "data" / "validation", 8, seed=1, side=20)
    losses = []
    for devices in (1, 2):
        sweep = write_sweep(name=f"on-{devices}", sizes=["rung-32"], budgets=[128, 256], devices=devices)
        result = aimscale.sweeps.engine.launch.launch(PlannedSweep(sweep), devices=2)
        assert len(result.finished) == 1
        runs = plan(sweep)
        found = collect(PlannedSweep(sweep))
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


SLOW = """
import pathlib, sys, time
from aimscale.harness.step.engine import Engine
from aimscale.harness.train.run import train

step = Engine.step

def slowly(self, *args, **kwargs):
    time.sleep(0.5)
    return step(self, *args, **kwargs)

Engine.step = slowly
sys.exit(train(pathlib.Path(sys.argv[1])))
"""


@pytest.mark.slow
def test_a_run_that_was_evaluated_while_it_trained_is_evaluated_to_its_end(
    write_sweep: Any, write_images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once its first budget was evaluated, the worker took the run for done, and its last budget got no losses."""
    monkeypatch.setattr(queue, "EVALUATION_DELAY_S", 0.0)
    monkeypatch.setattr(looks, "RESCAN_S", 0.5)
    write_images(tmp_path / "data" / "train", 64, seed=0, side=20)
    write_images(tmp_path / "data" / "validation", 8, seed=1, side=20)
    (tmp_path / "slow.py").write_text(SLOW)
    sweep = write_sweep(sizes=["rung-32"], budgets=[128, 1024])
    command = [sys.executable, str(tmp_path / "slow.py")]
    result = aimscale.sweeps.engine.launch.launch(
        PlannedSweep(sweep), devices=2, command=lambda path, _: [*command, str(path)]
    )
    record = RunRecord(sweep.run_dir(*result.finished))
    assert len(record.evaluation.read_attempts()) > 1, "else nothing was evaluated while it trained"
    assert [row["images_seen"] for row in record.read_rows() if "val_loss" in row] == [128, 1024]
