"""What a run is, through `launch` with the real trainer: one test for each rule of docs/run-directory.md."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from aimscale.harness.data.store.pack import PackedImage, write_dataset
from aimscale.harness.run.directory import RunDir
from aimscale.sweeps.launch.start import launch, left_alone
from aimscale.sweeps.plan.planner import plan
from aimscale.sweeps.plan.sweepfile import load_sweep

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


def write_images(folder: Path, num_images: int, seed: int) -> None:
    """Red and blue noise, labelled."""
    rng = np.random.default_rng(seed)
    images = []
    for i in range(num_images):
        pixels = rng.integers(0, 120, (16, 16, 3), dtype=np.uint8)
        pixels[:, :, 2 * (i % 2)] += 100
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="PNG")
        images.append(PackedImage(f"{i:04d}", "png", file.getvalue(), i % 2))
    write_dataset(folder, images, classes=("red", "blue"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sweep file, its data, and `runs`, where it was launched."""
    home = tmp_path_factory.mktemp("home")
    for seed, (name, number) in enumerate({"train": 64, "validation": 16, "fit": 24, "test": 12}.items()):
        write_images(home / "data" / name, number, seed)
    (home / "sweep.yaml").write_text(yaml.safe_dump(FILE))
    assert len(launch(home / "sweep.yaml", home / "runs", slots=1).finished) == 1
    return home


@pytest.fixture
def moved(home: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of all of it elsewhere, without file times; keywords replace fields of the sweep file."""

    def copy(base: dict[str, Any] | None = None, **fields: Any) -> Path:
        there = tmp_path / "elsewhere"
        if not there.exists():
            shutil.copytree(home, there, copy_function=shutil.copyfile)
        (there / "sweep.yaml").write_text(yaml.safe_dump({**FILE, **fields, "base": {**FILE["base"], **(base or {})}}))
        return there

    return copy


def state(run: Path) -> dict[str, Any]:
    """What training and evaluation have written."""
    directory = RunDir(run)
    files = [*run.glob("budgets/*/*"), *run.glob("probes/*/*.json"), *run.glob("validation/**/*.npz")]
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
    result = launch(there / "sweep.yaml", there / "runs", slots=1)
    assert left_alone(result.left) == ["left alone: 1 finished"]
    assert state(only_run(there / "runs")) == before
    assert only_run(there / "runs").name == only_run(home / "runs").name
    # and from a third place, into the folder where it was launched first
    result = launch(there / "sweep.yaml", home / "runs", slots=1)
    assert left_alone(result.left) == ["left alone: 1 finished"]


def test_a_sweep_is_known_where_its_data_are_not(home: Path, moved: Callable[..., Path]) -> None:
    there = moved()
    shutil.rmtree(there / "data")
    for name in (there / "sweep.yaml", "tiny"):
        (run,) = plan(load_sweep(name, there / "runs"))
        assert run.run_id == only_run(home / "runs").name


def test_other_images_in_the_same_folder_are_another_run(home: Path, moved: Callable[..., Path]) -> None:
    there = moved()
    shutil.rmtree(there / "data" / "train")
    write_images(there / "data" / "train", 64, seed=99)
    (run,) = plan(load_sweep(there / "sweep.yaml", there / "runs"))
    assert run.run_id != only_run(home / "runs").name
