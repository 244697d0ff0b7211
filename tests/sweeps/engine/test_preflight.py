from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aimscale.harness.data import DataError
from aimscale.harness.probe.features.tasks import ProbeError
from aimscale.sweeps.engine.start import check_data
from aimscale.sweeps.plan.planner import plan


@pytest.fixture
def runs_with(tmp_path: Path, write_sweep: Any, write_images: Any) -> Any:
    """Runs of a sweep whose pre-training data are there, with the given probes."""
    base = {
        "model": {"image_size": 16, "patch_size": 4},
        "data": {"sources": [{"path": write_images(tmp_path / "train", 9, seed=9)}]},
        "validation": {"path": write_images(tmp_path / "validation", 4, seed=4)},
    }
    return lambda *probes: plan(write_sweep(base={**base, "probes": list(probes)}))


def test_data_that_fit_pass(runs_with: Any, write_images: Any, tmp_path: Path) -> None:
    train, test = (write_images(tmp_path / name, num, classes=("a", "b")) for name, num in (("t", 8), ("s", 6)))
    check_data(runs_with({"task": "mine", "train": train, "test": test}))


def test_a_missing_folder_is_named(runs_with: Any, write_images: Any, tmp_path: Path) -> None:
    test = write_images(tmp_path / "s", 6, classes=("a", "b"))
    with pytest.raises(DataError, match=str(tmp_path / "none")):
        check_data(runs_with({"task": "mine", "train": str(tmp_path / "none"), "test": test}))


def test_a_task_that_is_not_the_benchmark_it_is_called_stops_a_launch(
    runs_with: Any, write_images: Any, tmp_path: Path
) -> None:
    """It used to end every run after its training."""
    train, test = (write_images(tmp_path / name, num, classes=("a", "b")) for name, num in (("t", 8), ("s", 6)))
    with pytest.raises(ProbeError, match="37 classes"):
        check_data(runs_with({"task": "pets", "train": train, "test": test}))


def test_a_task_without_labels_or_with_other_classes_stops_a_launch(
    runs_with: Any, write_images: Any, tmp_path: Path
) -> None:
    plain, ab, ac = (write_images(tmp_path / "".join(c or "p"), 8, classes=c) for c in ((), ("a", "b"), ("a", "c")))
    with pytest.raises(ProbeError, match="p"):
        check_data(runs_with({"task": "mine", "train": plain, "test": ab}))
    with pytest.raises(ProbeError, match="c"):
        check_data(runs_with({"task": "mine", "train": ab, "test": ac}))
