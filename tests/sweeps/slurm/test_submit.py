"""Launching on Slurm without a Slurm: what is refused, and how the code is pinned. With one: tests/slurm."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from aimscale.aim.errors import UserError
from aimscale.sweeps.plan.planner import plan
from aimscale.sweeps.runs.snapshot import find_snapshot, make_snapshot
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.slurm.submit import Shape, launch_slurm, shape_of, with_slurm


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t", *words], check=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A committed source tree."""
    folder = tmp_path / "source"
    (folder / "harness").mkdir(parents=True)
    (folder / "harness" / "train.py").write_text("committed")
    git(tmp_path, "init", "-q", str(folder))
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_queued_code_is_pinned(source: Path, tmp_path: Path) -> None:
    snapshot = find_snapshot(tmp_path, allow_dirty=False, source=source)
    assert not (tmp_path / "code").exists()
    make_snapshot(snapshot, source)
    (source / "harness" / "train.py").write_text("edited later")
    assert snapshot.path is not None
    assert (snapshot.path / "aimscale" / "harness" / "train.py").read_text() == "committed"


def test_a_dirty_tree_is_refused_or_recorded(source: Path, tmp_path: Path) -> None:
    clean = find_snapshot(tmp_path, allow_dirty=False, source=source)
    (source / "harness" / "new.py").write_text("not committed")
    with pytest.raises(UserError, match="uncommitted changes"):
        find_snapshot(tmp_path, allow_dirty=False, source=source)
    dirty = find_snapshot(tmp_path, allow_dirty=True, source=source)
    make_snapshot(dirty, source)
    assert dirty.path is not None
    assert dirty.path != clean.path
    assert (dirty.path / "aimscale" / "harness" / "new.py").exists()
    assert (dirty.commit, dirty.dirty) == (clean.commit, True)


def test_without_slurm_one_sentence(write_sweep: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    sweep = write_sweep()
    with pytest.raises(UserError, match=r"there is no Slurm here .* use --on local"):
        launch_slurm(sweep, plan(sweep))
    assert slurm.known_jobs() is None


def test_slurms_own_complaint_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "sinfo"
    program.write_text("#!/bin/sh\necho 'slurm_load_partitions: Unable to contact slurm controller' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match=r"sinfo failed: .*Unable to contact slurm controller$"):
        slurm.check_partition("main")


def test_devices_fill_whole_nodes(write_sweep: Any) -> None:
    sweep = with_slurm(write_sweep(cost={"devices": 16}), devices_per_node=8)
    run = plan(sweep)[0]
    assert shape_of(run, sweep.file.slurm) == Shape(nodes=2, tasks_per_node=8)
    with pytest.raises(UserError, match="do not fill nodes of 6"):
        shape_of(run, with_slurm(sweep, devices_per_node=6).file.slurm)
