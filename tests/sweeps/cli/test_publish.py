"""`aimscale publish` of a sweep that was really trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

import aimscale.sweeps.engine.launch
from aimscale.sweeps.cli.main import main
from aimscale.sweeps.cli.publish import _add_sweep
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.sweepfile import SweepError
from aimscale.sweeps.state.planned_sweep import PlannedSweep
from aimscale.sweeps.state.record import RunRecord


@pytest.mark.slow
def test_a_trained_sweep_is_published_with_weights_and_verifies(
    write_sweep: Any, write_images: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "data" / "train", 64, seed=0, side=20)
    write_images(tmp_path / "data" / "validation", 8, seed=1, side=20)
    sweep = write_sweep(sizes=["rung-32"], budgets=[128, 256])
    assert len(aimscale.sweeps.engine.launch.launch(PlannedSweep(sweep), devices=1).finished) == 1
    (run,) = plan(sweep)

    def aimscale_(*words: str | Path) -> int:
        with pytest.raises(SystemExit) as end:
            main([*map(str, words)])
        return int(end.value.code or 0)  # type: ignore[arg-type]  # main exits with numbers

    out = tmp_path / "out"
    options = ("--root", sweep.root, "--licence", "CC0-1.0", "--weights", "--title", "Two budgets")
    assert aimscale_("publish", sweep.source, out, *options) == 0, capsys.readouterr()
    assert (out / "sweep.yaml").read_text() == sweep.text
    assert "torch==" in (out / "environment.txt").read_text()
    model = out / "models" / run.run_id
    assert yaml.safe_load((model / "config.yaml").read_text())
    assert "| images seen | validation loss |" in (model / "README.md").read_text()
    with safe_open(model / "weights" / "model.safetensors", "numpy") as weights:
        assert list(weights.keys())
    assert {path.name for path in (out / "data").iterdir()} == {"results.parquet"}
    capsys.readouterr()
    assert aimscale_("verify", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["damaged"] == []


def test_a_published_configuration_has_no_credentials_and_is_its_runs(write_sweep: Any, tmp_path: Path) -> None:
    address = "s3://key:secret@host/bucket"
    base = {"validation": {"path": f"{address}/v"}, "data": {"sources": [{"path": "https://me:tok%40en@host/train"}]}}
    sweep = write_sweep(sizes=["rung-32"], base=base)
    (run,) = plan(sweep)
    RunRecord.create(sweep.run_dir(run.run_id), run.config)
    model = tmp_path / "out" / "models" / run.run_id
    model.mkdir(parents=True)
    _add_sweep(sweep, tmp_path / "out", weights=False)
    for path in (tmp_path / "out" / "sweep.yaml", model / "config.yaml"):
        text = path.read_text()
        assert not any(word in text for word in ("secret", "tok%40en", "key:", "me:tok"))
        assert "s3://host/bucket/v" in text
        assert "https://host/train" in text
    config = sweep.run_dir(run.run_id) / "config.yaml"
    config.write_text(config.read_text().replace("rung-32", "rung-48"))
    with pytest.raises(SweepError, match="damaged"):
        _add_sweep(sweep, tmp_path / "out", weights=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere.csv", "out"), "nowhere.csv"),
        (("t.csv", "out", "--weights"), "--weights exports the runs of a sweep"),
        (("t.csv", "out", "--co2", "400"), "--co2 needs --watts"),
        (("t.csv", "t.csv"), "exists already"),
        (("t.csv", "out", "--licence", " "), "--licence is empty"),
    ],
)
def test_a_mistake_is_one_sentence(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("N,D,L\n1,2,3\n")
    with pytest.raises(SystemExit) as end:
        main(["publish", "--licence", "CC0-1.0", *words])
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
