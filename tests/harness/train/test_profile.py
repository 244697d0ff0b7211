"""`runtime.profile` records the steps that it names, and changes nothing that is learnt."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import aimscale.harness.device.peak
from aimscale.aim.errors import UserError
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.train.attempt import train


def test_a_profiled_run_leaves_a_trace_and_a_memory_table(
    tmp_path: Path,
    tiny_config: Callable[..., RunConfig],
    in_processes: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(aimscale.harness.device.peak, "GEMM_SIDE", {"cpu": 128, "cuda": 1024})
    runs = []
    for name, runtime in (("plain", {}), ("profiled", {"profile": {"steps": [3, 4]}})):
        runs.append(RunDir.create(tmp_path / name, tiny_config(budgets=[64], runtime=runtime)))
        assert in_processes(lambda rank: train(runs[-1].path)) == [0]
    plain, profiled = (load_file(run.model_file(64)) for run in runs)
    assert all(torch.equal(tensor, profiled[name]) for name, tensor in plain.items())
    assert not (runs[0].path / "profile").exists()
    files = {path.name: path for path in (runs[1].path / "profile").iterdir()}
    assert files.keys() == {"trace-rank0-steps3-4.json.gz", "memory-rank0-steps3-4.txt"}
    with gzip.open(files["trace-rank0-steps3-4.json.gz"]) as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    # Two steps; each of the two blocks attends once forwards and once backwards.
    assert sum(name == "aten::scaled_dot_product_attention" for name in names) == 4
    assert "aten::addmm" in files["memory-rank0-steps3-4.txt"].read_text()


def test_steps_out_of_order_are_refused(tiny_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(UserError, match="profile"):
        tiny_config(runtime={"profile": {"steps": [14, 10]}})
