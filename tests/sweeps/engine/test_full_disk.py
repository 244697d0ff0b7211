"""Runs on a file system that is really full: what `status` says of them then, and once there is space again."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from aimscale.sweeps.cli.status_view import status_view
from aimscale.sweeps.engine.launch import launch as launch_here
from aimscale.sweeps.planning.sweepfile import Sweep, SweepError, load_sweep
from aimscale.sweeps.state.planned_sweep import PlannedSweep
from aimscale.sweeps.state.record import prepare_directory
from aimscale.sweeps.sweep_status import sweep_status

FILL = """
import json, pathlib, sys
run_dir, how = pathlib.Path(sys.argv[1]), sys.argv[2]
huge = pathlib.Path(sys.argv[3])
def tell(**line):
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\\n")
tell(D=50, val_loss=2.0)
if not (run_dir.parents[2] / "freed").exists():
    try:
        with open(huge, "wb") as file:
            while True:
                file.write(bytes(512))
                file.flush()
    except OSError:
        if how == "dies": raise
        if how == "cleans up":
            huge.unlink()
            raise
    if how == "ends well": sys.exit(0)
tell(D=100, val_loss=1.0)
"""


def said(sweep: Sweep) -> str:
    """Return what `status` says beside its tables, in one line."""
    lines = status_view(sweep_status(PlannedSweep(sweep)), 10_000).renderables[:-1]
    return " ".join(str(line) for line in lines)


def programs(folder: Path, disk: Path, how: str) -> Sweep:
    (folder / "fill.py").write_text(FILL)
    trainer = {"command": f"python fill.py {{run_dir}} '{{how}}' {disk}/huge", "sizes": {"a": {"width": 1}}}
    trainer |= {"params": "width", "unit": "tokens", "stop": {"seconds": 3}}
    values = {"name": "mine", "trainer": trainer, "sizes": ["a"], "budgets": [100], "base": {"how": how}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(values))
    return load_sweep(folder / "sweep.yaml", disk / "root")


@pytest.mark.parametrize("how", ["dies", "ends well"])
def test_a_program_that_filled_the_disk_is_told_as_such_and_goes_on(how: str, small_disk: Path, tmp_path: Path) -> None:
    """Not even the status of the run can be written."""
    sweep = programs(tmp_path, small_disk, how)
    assert not launch_here(PlannedSweep(sweep), devices=1).finished
    assert f"the disk of {sweep.directory} is full (0 bytes free); free some" in said(sweep)
    assert "status.json: No space left on device; mend that" in said(sweep)
    with pytest.raises(SweepError, match="No space left on device"):
        launch_here(PlannedSweep(sweep), devices=1)
    (small_disk / "huge").unlink()
    assert "is full" not in said(sweep)
    assert "status.json: No space left on device; mend that" in said(sweep), "why it ended, and no more"
    (small_disk / "root" / "freed").touch()
    planned = PlannedSweep(sweep)
    assert len(launch_here(planned, devices=1).finished) == 1
    first, last = planned.look()[0].record.read_attempts()
    assert "No space left on device" in first["reason"]
    assert (first["reason_class"], first["failed_nodes"], last["exit_code"]) == ("node", [], 0)
    assert "No space" not in said(sweep)


def test_a_program_that_found_the_disk_full_and_cleaned_up_is_told_as_such(small_disk: Path, tmp_path: Path) -> None:
    sweep = programs(tmp_path, small_disk, "cleans up")
    planned = PlannedSweep(sweep)
    assert len(launch_here(planned, devices=1).failed) == 1
    words = "its command found a disk full (OSError: [Errno 28] No space left on device); free some; "
    assert f"failed  a_d100_s0_{planned.runs[0].run_id[-8:]}  node: {words}`aimscale launch --retry`" in said(sweep)
    assert {each["reason_class"] for each in planned.look()[0].record.read_attempts()} == {"node"}
    assert not planned.states[0].record.failed_nodes(), "the disk is no fault of this node"


@pytest.mark.slow
def test_a_run_of_the_real_trainer_that_met_a_full_disk_is_told_as_such_and_goes_on(
    small_disk: Path, tmp_path: Path, write_sweep: Any, write_images: Any
) -> None:
    """Its checkpoint is larger than the file system."""
    write_images(tmp_path / "data" / "train", 64, seed=0, side=20)
    write_images(tmp_path / "data" / "validation", 8, seed=1, side=20)
    write_sweep(sizes=["rung-32"], budgets=[128])
    sweep = load_sweep(tmp_path / "sweep.yaml", small_disk / "root")
    assert not launch_here(PlannedSweep(sweep), devices=1).finished
    assert "No space left on device; " in said(sweep)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert "No space left on device; " in said(sweep)
    assert len(launch_here(PlannedSweep(sweep), devices=1, retry=True).finished) == 1
    assert "No space" not in said(sweep)


def test_a_run_that_waits_for_space_is_told_as_such(small_disk: Path, tmp_path: Path) -> None:
    sweep = programs(tmp_path, small_disk, "dies")
    prepare_directory(sweep)
    assert said(sweep).count("full") == 0
    (small_disk / "root" / "freed").touch()
    huge = (small_disk / "huge").open("wb", buffering=0)
    while os.statvfs(small_disk).f_bavail:
        huge.write(bytes(512))
    huge.close()
    assert f"failed  disk  the disk of {sweep.directory} is full (0 bytes free); free some" in said(sweep)
    with pytest.raises(SweepError, match="No space left on device"):
        launch_here(PlannedSweep(sweep), devices=1)
    (small_disk / "huge").unlink()
    assert len(launch_here(PlannedSweep(sweep), devices=1).finished) == 1
