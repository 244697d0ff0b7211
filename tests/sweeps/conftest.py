from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import aimscale.sweeps.engine.launch
from aimscale.sweeps.engine.worker import LaunchResult
from aimscale.sweeps.planning.sweepfile import Sweep, load_sweep
from aimscale.sweeps.state.planned_sweep import PlannedSweep

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
    """Return a function that writes `TINY` with changes as a sweep file, and loads it; sections of `base` are replaced
    one by one."""

    def write(*, devices: int | None = None, base: dict[str, Any] | None = None, **changes: Any) -> Sweep:
        path = tmp_path / "sweep.yaml"
        changed = TINY["base"] | (base or {}) | ({"devices": devices} if devices else {})
        path.write_text(yaml.safe_dump(TINY | changes | {"base": changed}))
        return load_sweep(path, tmp_path / "root")

    return write


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return `launch` without the checks, for workers that read no data."""
    monkeypatch.setattr(aimscale.sweeps.engine.launch, "raise_on_problems", lambda *_: None)
    begin = aimscale.sweeps.engine.launch.launch

    def run(sweep: Sweep | PlannedSweep, **options: Any) -> LaunchResult:
        return begin(sweep if isinstance(sweep, PlannedSweep) else PlannedSweep(sweep), **options)

    return run


@pytest.fixture
def stand_in() -> Any:
    """Return a function from a behaviour to a command that replaces the trainer and takes milliseconds."""

    def command(behaviour: str = "finish") -> Any:
        return lambda run_dir, devices: [sys.executable, str(STAND_IN), str(run_dir), behaviour]

    return command


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 256 kB, which needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("may not mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


PROGRAM = """
    import sys
    from pathlib import Path
    from aimscale.sweeps.engine import launch
    from aimscale.sweeps.state.planned_sweep import plan_sweep
    launch.raise_on_problems = lambda *_: None
    command = lambda path, _: [sys.executable, {stand_in!r}, str(path), {behaviour!r}]
    planned = plan_sweep({path!r}, Path({root!r}))
    did = launch.launch(planned, devices={devices}, command=command, report=lambda worker: None)
    print("stopped" if did.interrupted else "done", len(did.finished))
"""


@pytest.fixture
def start(tmp_path: Path) -> Any:
    """Return a function that launches the sweep in a process with stand-ins; its last line states how it ended."""

    def begin(devices: int, behaviour: str = "finish") -> subprocess.Popen[str]:
        places = {"path": str(tmp_path / "sweep.yaml"), "root": str(tmp_path / "root"), "stand_in": str(STAND_IN)}
        program = textwrap.dedent(PROGRAM).format(devices=devices, behaviour=behaviour, **places)
        return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)

    return begin


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Return a function that makes a fake Slurm command of lines of shell."""
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(name: str, text: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)

    return make
