"""An installation without torch analyses tables and looks at sweeps; what trains says what to install."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from aimscale.aim.errors import UserError, check_training_installed
from aimscale.sweeps import doctor
from aimscale.sweeps.cli import main as cli


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide torch from imports and from what asks whether it is there."""
    find = importlib.util.find_spec

    def find_spec(name: str, *args: Any) -> Any:
        return None if name == "torch" else find(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setitem(sys.modules, "torch", None)


def test_what_trains_says_what_to_install(no_torch: None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def load(name: str) -> Any:
        import torch  # None in sys.modules: as where it is not installed

        return torch

    monkeypatch.setattr(cli, "load_verb", load)
    with pytest.raises(SystemExit) as end:
        cli.main(["demo"])
    assert end.value.code == 2
    assert (
        capsys.readouterr().err == "aimscale: demo needs torch, which is not installed; pip install 'aimscale[train]'\n"
    )
    with pytest.raises(UserError, match="launch needs torch"):
        check_training_installed("launch")


def test_a_missing_package_is_a_defect_where_torch_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "load_verb", lambda name: importlib.import_module("no_such_package"))
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        cli.main(["demo"])


def test_packed_data_are_planned_without_what_trains(write_images: Any, tmp_path: Path) -> None:
    for seed, name in enumerate(("train", "validation", "fit", "test")):
        write_images(tmp_path / "data" / name, 100, seed=seed, classes=("red", "blue"))
    task = {"task": "mine", "train": "data/fit", "test": "data/test", "kinds": ["knn"]}
    base = {"model": {"image_size": 16, "patch_size": 4}, "data": {"sources": [{"path": "data/train"}]}}
    base |= {"optimiser": {"batch_size": 16}, "validation": {"path": "data/validation"}, "probes": [task]}
    sweep = {"name": "laptop", "sizes": ["rung-32"], "budgets": [640, 1280], "base": base}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    code = (
        "import sys, importlib.machinery as m; real = m.PathFinder.find_spec;"
        "hidden = {'torch', 'simplejpeg', 'fsspec', 'submitit'};"
        "m.PathFinder.find_spec = lambda name, *a: None if name.split('.')[0] in hidden else real(name, *a);"
        "from aimscale.sweeps.cli.main import main; main(sys.argv[1:])"
    )
    words = [sys.executable, "-c", code, "plan", str(tmp_path / "sweep.yaml")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "next: aimscale launch" in done.stdout


def test_the_doctor_does_not_fail_for_want_of_torch(no_torch: None, tmp_path: Path) -> None:
    checks = {check.name: check for check in doctor.run_checks(tmp_path)}
    assert (checks["packages"].level, "accelerator" in checks) == ("warn", False)
    assert "aimscale[train]" in checks["packages"].advice
