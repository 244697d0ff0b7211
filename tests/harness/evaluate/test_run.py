"""Evaluation beside training, and of several runs in one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from trainers import after_steps, evaluate_in, rows, train_in, weights

from aimscale.harness.results import pending_work
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir

Run = Callable[..., list[int]]
Config = Callable[..., RunConfig]


def train_beside_evaluation(rank: int, path: Path, images_done: int, out: Path) -> None:
    """Train, and evaluate what is there in another process when so many images are done; then go on."""

    def act(done: int) -> None:
        if done == images_done:
            alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
            command = [sys.executable, "-m", "aimscale.harness.evaluate", str(path)]
            code = subprocess.run(command, env=alone).returncode
            rows = {row["images_seen"]: row.get("val_loss") for row in RunDir(path).read_rows()}
            out.write_text(
                json.dumps({"code": code, "rows": rows, "state": RunDir(path).evaluation.read_status().state})
            )

    after_steps(act)
    train_in(rank, path)


def test_a_run_is_evaluated_while_its_training_goes_on(tmp_path: Path, tiny_config: Config, in_processes: Run) -> None:
    config, out = tiny_config(budgets=[64, 128]), tmp_path / "out.json"
    whole, run = (RunDir.create(tmp_path / name, config) for name in ("whole", "run"))
    assert in_processes(train_in, whole.path) == [0]
    assert in_processes(train_beside_evaluation, run.path, 128, out) == [0]
    beside = json.loads(out.read_text())
    losses = [row["val_loss"] for row in whole.read_rows()]
    assert beside == {"code": 0, "rows": {"64": losses[0]}, "state": "finished"}
    assert rows(run) == rows(whole)
    assert [weights(run, budget) for budget in (64, 128)] == [weights(whole, budget) for budget in (64, 128)]
    assert pending_work(run, config) == []
    assert "val_loss" not in run.read_own_rows()[64], "training knows nothing of it"


def test_one_process_evaluates_several_runs_and_one_that_fails_holds_up_none(
    tmp_path: Path, tiny_config: Config, in_processes: Run
) -> None:
    config = tiny_config(budgets=[64])
    first = RunDir.create(tmp_path / "first", config)
    assert in_processes(train_in, first.path) == [0]
    expected = rows(first)
    for name in ("evaluation", "validation"):
        shutil.rmtree(first.path / name)
    runs = [first, *(RunDir(shutil.copytree(first.path, tmp_path / name)) for name in ("damaged", "last"))]
    with runs[1].model_file(64).open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"12345678")
    assert in_processes(evaluate_in, *(run.path for run in runs)) == [1]
    assert [run.evaluation.read_status().state for run in runs] == ["finished", "failed", "finished"]
    assert "CRC-32" in str(runs[1].evaluation.read_status().reason)
    assert rows(runs[0]) == rows(runs[2]) == expected
