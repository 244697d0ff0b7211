"""Sweeps that start runs from weights: identities, sources among their own runs, refusals, cautions, order."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from aimscale.aim.model import AIM
from aimscale.harness.rehearsal.step import rehearse
from aimscale.harness.run import init as init_module
from aimscale.harness.run.config import build_model_config
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.row import configured_columns, setup_of
from aimscale.sweeps.cli.plan import plan as plan_verb
from aimscale.sweeps.planning.aim_run import check_start
from aimscale.sweeps.planning.costs import cost_cards
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.speed import plan_context
from aimscale.sweeps.planning.sweepfile import SweepError

PLATEAU = "first plateau"


def write_backbone(path: Path, sweep: Any, seed: int = 0) -> Path:
    """Write the weights of a sweep's first run under released names."""
    model = AIM(build_model_config(plan(sweep)[0].config.training))
    model.init_weights(seed)
    save_file({n: t for n, t in model.state_dict().items() if not n.startswith("pixel_head.")}, path)
    return path


def test_a_start_is_known_by_content_and_leaves_other_runs_their_names(write_sweep: Any, tmp_path: Path) -> None:
    file = write_backbone(tmp_path / "rung-32.safetensors", write_sweep())
    cold = [run.run_id for run in plan(write_sweep(sizes=["rung-32"]))]
    variants = {"cold": {}, "warm": {"init": {"weights": "{size}.safetensors"}}}
    runs = plan(write_sweep(sizes=["rung-32"], variants=variants))
    assert runs[0].run_id == cold[0]
    assert "_warm_" in runs[1].run_id
    axis = plan(write_sweep(sizes=["rung-32"], axes={"init.weights": [None, "rung-32.safetensors"]}))
    assert [run.run_id for run in axis] == [run.run_id for run in runs]
    file.rename(tmp_path / "moved.safetensors")
    moved = plan(write_sweep(sizes=["rung-32"], base={"init": {"weights": "moved.safetensors"}}))
    assert moved[0].run_id == runs[1].run_id
    write_backbone(tmp_path / "moved.safetensors", write_sweep(), seed=1)
    other = plan(write_sweep(sizes=["rung-32"], base={"init": {"weights": "moved.safetensors"}}))
    assert other[0].run_id != runs[1].run_id
    columns = configured_columns(runs[1].config)
    assert (columns["init"], columns["init_images_seen"], columns["flops_init"]) == ("{size}", None, None)
    assert setup_of(runs[1].config.training) == setup_of(runs[0].config.training), "a column tells of the start"
    assert "init" not in configured_columns(runs[0].config)


def test_a_file_is_read_once_until_it_changes(
    write_sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, read = write_backbone(tmp_path / "w.safetensors", write_sweep()), []
    real = init_module.sha256_of
    monkeypatch.setattr(init_module, "sha256_of", lambda path: read.append(path) or real(path))
    monkeypatch.setenv("AIMSCALE_CACHE", str(tmp_path / "cache"))
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1, 2], base={"init": {"weights": "w.safetensors"}})
    first = [run.run_id for run in plan(sweep)]
    assert [run.run_id for run in plan(sweep)] == first
    assert len(read) == 1
    os.utime(file, (1, 1))
    assert [run.run_id for run in plan(sweep)] == first
    assert len(read) == 2


def test_a_run_of_the_sweep_is_a_source_that_the_queue_waits_for(
    write_sweep: Any, launch: Any, stand_in: Any, tmp_path: Path
) -> None:
    variants = {"source": {"seed": 5}, "warm": {"init": {"run": "source@1280"}}}
    variants["source"] = {"optimiser.weight_decay": 0.1}
    sweep = write_sweep(variants=variants, base={"optimiser": {"batch_size": 64}})
    runs = plan(sweep)
    sources, warm = runs[:2], runs[2:]
    for source, run in zip(sources, warm, strict=True):
        init = run.config.training.init
        assert init.run == f"{source.run_id}@1280"
        assert init.file == RunDir(sweep.run_dir(source.run_id)).model_file(1280)
        assert (init.images_seen, init.flops) == (1280, source.flops(1280))
        assert run.config.training.init.label == "source@1280", "one name for all sizes"
    result = launch(sweep, devices=2, command=stand_in("finish"), report=lambda worker: None)
    states = {each.run.run_id: each for each in result.skipped}
    assert {run.run_id for run in warm} == {*states}, "stand-ins save no weights, so what needs them never starts"
    assert all("waits for" in each.reason and "@1280" in each.reason for each in states.values())
    assert {*result.finished} == {run.run_id for run in sources}


@pytest.mark.parametrize(
    ("init", "words"),
    [
        ({"run": "nothing*@1280"}, "names 0 runs"),
        ({"run": "rung-*@1280"}, "names 2 runs, not one; write more"),
        ({"run": "{size}_*@1281"}, "has no budget 1281; it has 640, 1280"),
        ({"run": "{size}_*"}, "names no budget"),
        ({"run": "other/{size}_*@1280"}, "names 0 runs"),
        ({"run": "a@1", "weights": "b"}, "keep one of them"),
    ],
)
def test_a_source_that_is_not_there_is_refused(write_sweep: Any, init: dict[str, Any], words: str) -> None:
    with pytest.raises(SweepError, match=words):
        plan(write_sweep(variants={"cold": {}, "warm": {"init": init}}))


def test_a_plan_says_what_holds_for_warm_runs(write_sweep: Any, tmp_path: Path) -> None:
    write_backbone(tmp_path / "rung-32.safetensors", write_sweep())
    variants = {"cold": {}, "warm": {"init": {"weights": "rung-32.safetensors"}}}
    sweep = write_sweep(sizes=["rung-32"], variants=variants)
    cold, warm = cost_cards(sweep, plan(sweep))
    assert any(PLATEAU in each.text for each in cold.cautions)
    assert not any(PLATEAU in each.text for each in warm.cautions), "a warm run begins behind it"
    assert any("for training from scratch" in each.text for each in warm.cautions)
    assert not any(each.key == "init" for each in cold.cautions)
    runs = plan(sweep)
    context = plan_context(sweep, runs)
    assert [*check_start(runs[1].config, context)] == []
    (tmp_path / "rung-32.safetensors").unlink()
    (found,) = check_start(runs[1].config, context)
    assert "there is no weight file" in found.text


def write_released(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Write a file with official names and shapes, whose values are holes: a plan reads none."""
    header, end = {}, 0
    for name, tensor in state.items():
        if not name.startswith("pixel_head."):
            start, end = end, end + 4 * tensor.numel()
            header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.fork
@pytest.mark.parametrize("size", ["aim-7B", "w64-d2", pytest.param("aim-600M", marks=pytest.mark.slow)])
def test_a_released_file_is_checked_and_rehearsed_with_a_frozen_start(
    write_sweep: Any, tmp_path: Path, size: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("aimscale.sweeps.cli.plan.check", lambda *_: ())
    base = {
        "model": {"image_size": 224, "patch_size": 14},
        "optimiser": {"batch_size": 64, "precision": "bf16"},
        "init": {"weights": "released.safetensors", "freeze_images": 128, "digest": 64 * "0"},
    }
    sweep = write_sweep(sizes=[size], devices=8, base=base, cost={"device": "H100"})
    (run,) = plan(sweep)
    with torch.device("meta"):
        write_released(tmp_path / "released.safetensors", AIM(build_model_config(run.config.training)).state_dict())
    assert [*check_start(run.config, plan_context(sweep, [run]))] == []
    if size == "aim-7B":
        return  # its rehearsal takes a minute, and says no more than that of a smaller one
    rehearse.cache_clear()
    plan_verb(str(sweep.source), sweep.root, rehearse=True, as_json=True)
    (found,) = json.loads(capsys.readouterr().out)["rehearsals"].values()
    assert [phase["phase"] for phase in found["phases"]][:3] == ["forward", "backward", "update"]
