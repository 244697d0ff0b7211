from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import refused

from aimscale.sweeps.cli.main import main
from aimscale.sweeps.planning.sweepfile import load_sweep


def test_init_writes_a_sweep_file_and_plan_writes_none(
    tmp_path: Path, write_images: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for seed, name in enumerate(("train", "validation", "test")):
        write_images(tmp_path / "shards" / name, 40, seed=seed, classes=("ant", "bee"))
    monkeypatch.setattr("aimscale.sweeps.planning.suggestion.MAX_PASSES", 10**9)
    file, old = tmp_path / "mysweep.yaml", tmp_path / "old" / "mysweep.yaml"
    old.parent.mkdir()
    words = ["--data", str(tmp_path / "shards"), "--gpu", "H100"]
    with pytest.raises(SystemExit) as ended:
        main(["init", str(file), *words, "--hours", "100"])
    assert not ended.value.code
    assert capsys.readouterr().out.splitlines() == [f"next: aimscale plan {file}"]
    sweep = load_sweep(file, tmp_path / "root")
    assert (len(sweep.file.sizes), len(sweep.file.budgets), sweep.file.cost.device) == (9, 6, "H100")
    assert "exists already" in refused("init", file, *words, "--hours", "100")
    assert "no name of a YAML file" in refused("init", tmp_path / "mysweep", *words, "--hours", "100")
    before = {path for path in tmp_path.rglob("*") if path.suffix != ".yaml"}
    with pytest.raises(SystemExit):
        main(["plan", str(old), *words, "--suggest", "100", "--root", str(tmp_path / "root")])
    assert "is called `aimscale init` now" in capsys.readouterr().err
    assert old.read_text().replace("../shards", "shards") == file.read_text(), "the old name does the same"
    assert {path for path in tmp_path.rglob("*") if path.suffix != ".yaml"} == before
    assert "--hours" in refused("plan", tmp_path / "new.yaml", *words)
