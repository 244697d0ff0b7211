from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import aimscale.sweeps.engine.start
from aimscale.sweeps.plan.sweepfile import Sweep, load_sweep

STAND_IN = Path(__file__).parent / "stand_in.py"

TINY: dict[str, Any] = {
    "name": "tiny",
    "sizes": ["rung-32", "rung-48"],
    "budgets": [640, 1280],
    "base": {
        "model": {"image_size": 16, "patch_size": 4},
        "data": {"sources": [{"path": "data/train"}]},
        "optimiser": {"batch_size": 64},
        "validation": {"path": "data/validation", "centre_crop": 1.0},
    },
}


@pytest.fixture
def write_sweep(tmp_path: Path) -> Any:
    """Write `TINY` with changes as a sweep file, and load it."""

    def write(*, devices: int | None = None, **changes: Any) -> Sweep:
        path = tmp_path / "sweep.yaml"
        values = {**TINY, **changes}
        values["base"] = values["base"] | ({"devices": devices} if devices else {})
        path.write_text(yaml.safe_dump(values))
        return load_sweep(path, tmp_path / "root")

    return write


@pytest.fixture
def launch() -> Any:
    """A local launch of workers that read no data."""
    return functools.partial(aimscale.sweeps.engine.start.launch, check=lambda runs: None)


@pytest.fixture
def stand_in() -> Any:
    """Worker commands that take milliseconds, by behaviour."""

    def command(behaviour: str = "finish") -> Any:
        return lambda run_dir, devices: [sys.executable, str(STAND_IN), str(run_dir), behaviour]

    return command
