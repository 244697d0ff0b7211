"""Identity of runs, through `launch` with the real trainer: one test for each rule of docs/results.md."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from aimscale.harness.run.directory import RunDir
from aimscale.sweeps import launch
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.sweepfile import load_sweep

FILE: dict[str, Any] = {
    "name": "tiny",
    "sizes": ["w16-d2"],
    "budgets": [64, 128],
    "base": {
        "model": {"image_size": 16, "patch_size": 4},
        "data": {"sources": [{"path": "data/train"}]},
        "optimiser": {"batch_size": 16, "precision": "fp32"},
        "schedule": {"warmup_images": 16},
        "validation": {"path": "data/validation"},
        "probes": [{"task": "colour", "train": "data/fit", "test": "data/test", "kinds": ["knn"]}],
    },
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, write_images: Any) -> Path:
    """Make a folder with the sweep file, its data, and `runs`, where it was launched."""
    home = tmp_path_factory.mktemp("home")
    for seed, (name, number) in enumerate({"train": 64, "validation": 16, "fit": 24, "test": 12}.items()):
        write_images(home / "data" / name, number, seed=seed, classes=("red", "blue"))
    (home / "sweep.yaml").write_text(yaml.safe_dump(FILE))
    assert len(launch(home / "sweep.yaml", home / "runs", devices=1).finished) == 1
    return home


@pytest.fixture
def moved(home: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies the folder without file times; keywords replace sections of the sweep file."""

    def copy(**base: Any) -> Path:
        there = tmp_path / "elsewhere"
        shutil.copytree(home, there, copy_function=shutil.copyfile)
        (there / "sweep.yaml").write_text(yaml.safe_dump(FILE | {"base": FILE["base"] | base}))
        return there

    return copy


def state(run: Path) -> dict[str, Any]:
    """Return the contents of the files that training and evaluation have written."""
    directory = RunDir(run)
    own = [path for path in run.glob("budgets/*/*") if path.name != "digest.json"]  # kept by the file's own time
    files = [*own, *run.glob("probes/*/*.json"), *run.glob("validation/**/*.npz")]
    return {
        "rows": directory.read_rows(),
        "metrics": directory.metrics.read_bytes(),
        "files": {path.relative_to(run): path.read_bytes() for path in files},
        "starts": directory.read_status().attempt,
    }


def only_run(root: Path) -> Path:
    (run,) = (root / "tiny" / "runs").iterdir()
    return run


def test_the_same_file_elsewhere_names_the_same_runs_and_finds_their_results_and_probes(
    home: Path, moved: Callable[..., Path]
) -> None:
    there = moved()
    before = state(only_run(there / "runs"))
    result = launch(there / "sweep.yaml", there / "runs", devices=1)
    assert [each.state for each in result.skipped] == ["finished"]
    assert state(only_run(there / "runs")) == before
    assert only_run(there / "runs").name == only_run(home / "runs").name
    # and from a third place, into the folder where it was launched first
    result = launch(there / "sweep.yaml", home / "runs", devices=1)
    assert [each.state for each in result.skipped] == ["finished"]


def test_a_sweep_is_known_where_its_data_are_not(home: Path, moved: Callable[..., Path]) -> None:
    there = moved()
    shutil.rmtree(there / "data")
    for name in (there / "sweep.yaml", "tiny"):
        (run,) = plan(load_sweep(name, there / "runs"))
        assert run.run_id == only_run(home / "runs").name


def test_other_images_in_the_same_folder_are_another_run(
    home: Path, moved: Callable[..., Path], write_images: Any
) -> None:
    there = moved()
    shutil.rmtree(there / "data" / "train")
    write_images(there / "data" / "train", 64, seed=99, classes=("red", "blue"))
    (run,) = plan(load_sweep(there / "sweep.yaml", there / "runs"))
    assert run.run_id != only_run(home / "runs").name


@pytest.mark.slow
def test_another_evaluation_never_trains_and_does_only_what_is_missing(moved: Callable[..., Path]) -> None:
    task = FILE["base"]["probes"][0]
    there = moved(probes=[{**task, "task": "hue"}, task], validation={"path": "data/test"})
    run, before = only_run(there / "runs"), state(only_run(there / "runs"))
    result = launch(there / "sweep.yaml", there / "runs", devices=1)
    assert result.evaluated == (run.name,)
    after = state(run)
    assert after["metrics"] == before["metrics"]
    changed = {"probes", "val_loss", "val_loss_se", "val_num_images", "validation"}
    for old, new in zip(before["rows"], after["rows"], strict=True):
        assert {key for key in new if new[key] != old.get(key)} - {"finished_at"} == changed
    current = {Path("validation") / f"{budget}.npz" for budget in (64, 128)}
    assert {path for path in before["files"] if after["files"][path] != before["files"][path]} <= current
    assert not launch(there / "sweep.yaml", there / "runs", devices=1).evaluated, "it is all there now"
