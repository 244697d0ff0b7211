"""Checks of data by many launches of one sweep: the first reads it, the others take its word."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from aimscale.aim.errors import UserError
from aimscale.harness.data.store import index
from aimscale.sweeps.engine import launch
from aimscale.sweeps.engine.launch import prepare_launch
from aimscale.sweeps.plan.planner import plan


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, write_images: Any, tmp_path: Path) -> list[str]:
    """Pack the data of a sweep, and return the list of data sets that checks open from now on."""
    for seed, name in enumerate(("train", "validation", "fit", "test")):
        write_images(tmp_path / "data" / name, 100, seed=seed, classes=("red", "blue"))
    names: list[str] = []
    open_dataset = index.open_dataset

    def opening(path: str, **options: Any) -> Any:
        names.append(Path(path).name)
        return open_dataset(path, **options)

    monkeypatch.setattr(index, "open_dataset", opening)
    return names


def test_workers_that_start_together_read_the_data_once(
    opened: list[str], write_sweep: Any, write_images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1])
    errors: list[BaseException] = []

    def start() -> None:
        try:
            prepare_launch(sweep, plan(sweep), retry=False)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=start) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (errors, sorted(opened)) == ([], ["train", "validation"])
    task = {"task": "mine", "train": "data/fit", "test": "data/test", "kinds": ["knn"]}
    probed = write_sweep(sizes=["rung-32"], seeds=[0, 1], base={"probes": [task]})
    prepare_launch(probed, plan(probed), retry=False)
    assert set(opened[2:]) == {"train", "validation", "fit", "test"}, "other settings are checked"
    (sweep.directory / "checks.json").write_text('{"x": [1')
    opened.clear()
    prepare_launch(sweep, plan(sweep), retry=False)
    assert sorted(opened) == ["train", "validation"], "a damaged record tells nothing"
    shutil.rmtree(tmp_path / "data" / "validation")
    write_images(tmp_path / "data" / "validation", 50, seed=9)
    opened.clear()
    prepare_launch(sweep, plan(sweep), retry=False)
    assert sorted(opened) == ["train", "validation"], "other images are checked"
    monkeypatch.setattr(launch, "CHECKS_VALID_S", 0.0)
    prepare_launch(sweep, plan(sweep), retry=False)
    assert len(opened) == 4, "a later launch checks again"


def test_a_check_that_fails_is_repeated_and_leaves_nothing(opened: list[str], write_sweep: Any, tmp_path: Path) -> None:
    sweep = write_sweep(sizes=["rung-32"], unique_images=[101])
    for _ in range(2):
        with pytest.raises(UserError, match="100 usable"):
            prepare_launch(sweep, plan(sweep), retry=False)
        assert not (tmp_path / "root").exists()
    assert opened.count("train") == 2
