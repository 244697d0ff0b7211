"""The bench of checkpoints saves what training saves, on two ranks as on one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from aimscale.aim.config import model_config
from aimscale.aim.cost import param_count
from aimscale.harness.bench.checkpoint import run

CONFIG = model_config("w32-d2", image_size=16, patch_size=4)


def measure(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    found = run(CONFIG, precision="bf16", device="cpu", folder=folder)
    (folder / f"{rank}.json").write_text(json.dumps(found))


def test_two_ranks_share_a_checkpoint(tmp_path: Path, in_processes: Callable[..., list[int]]) -> None:
    assert in_processes(measure, tmp_path, world_size=2) == [0, 0]
    state = 12 * param_count(CONFIG).total
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert state < found["bytes"] < state + 40_000, "the state and what describes it"
        assert found["stall"] == found["stall_s"] / found["wait_s"]
    assert {path.name for path in tmp_path.iterdir()} == {"0.json", "1.json"}
