from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aimscale.harness.data import DataError
from aimscale.harness.probe.features.tasks import ProbeError
from aimscale.sweeps.engine.launch import check_data
from aimscale.sweeps.plan.planner import plan


@pytest.fixture
def runs_with(tmp_path: Path, write_sweep: Any, write_images: Any) -> Any:
    """Runs of a sweep whose pre-training data are there, with the given probes."""
    base = {
        "model": {"image_size": 16, "patch_size": 4},
        "data": {"sources": [{"path": write_images(tmp_path / "train", 9, seed=9)}]},
        "validation": {"path": write_images(tmp_path / "validation", 4, seed=4)},
    }

    def make(*probes: Any) -> Any:
        sweep = write_sweep(base={**base, "probes": list(probes)})
        return sweep, plan(sweep)

    return make


@pytest.mark.parametrize(
    ("task", "train", "test", "error", "subject"),
    [
        ("mine", "none", "ab", DataError, "/none"),
        ("pets", "ab", "ab", ProbeError, "37 classes"),  # it is not the benchmark that it is called
        ("mine", "plain", "ab", ProbeError, "/plain"),
        ("mine", "ab", "ac", ProbeError, "no c"),
    ],
)
def test_a_task_that_cannot_be_measured_stops_a_launch(
    task: str,
    train: str,
    test: str,
    error: type[Exception],
    subject: str,
    runs_with: Any,
    write_images: Any,
    tmp_path: Path,
) -> None:
    for classes in ((), ("a", "b"), ("a", "c")):
        write_images(tmp_path / ("".join(classes) or "plain"), 8, classes=classes)
    fits = {"task": "fits", "train": str(tmp_path / "ab"), "test": str(tmp_path / "ab")}
    check_data(*runs_with(fits))
    with pytest.raises(error, match=subject):
        check_data(*runs_with(fits, {"task": task, "train": str(tmp_path / train), "test": str(tmp_path / test)}))
