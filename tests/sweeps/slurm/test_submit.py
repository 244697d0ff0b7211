"""Launching on Slurm without a Slurm: what is refused, and how the code is pinned. With one: tests/slurm."""

from __future__ import annotations

import io
import math
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aimscale.sweeps.slurm.submit import Shape, executor_for, launch_slurm, script, settle, shape_of
from rich.console import Console

from aimscale.aim.errors import UserError
from aimscale.sweeps.plan.costs import SAVE_BYTES_PER_S, cost_cards, stop_seconds
from aimscale.sweeps.plan.planner import plan
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.state.decision import decide, training_jobs
from aimscale.sweeps.state.record import RunRecord, claim_run, own_claim
from aimscale.sweeps.state.snapshot import Snapshot, find_snapshot, make_snapshot
from aimscale.sweeps.state.sweep_dir import prepare
from aimscale.sweeps.table.views import duration, print_plan


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
    with pytest.raises(UserError, match="--allow-dirty"):
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
    with pytest.raises(UserError, match="--on local"):
        launch_slurm(sweep, plan(sweep))
    assert slurm.known_jobs() is None


def test_a_damaged_run_keeps_no_other_from_being_settled_or_decided_on(
    write_sweep: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no sacct
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1, 2, 3])
    prepare(sweep)
    records = [RunRecord(sweep.run_dir(run.run_id)) for run in plan(sweep)]
    for i, (run, record) in enumerate(zip(plan(sweep), records, strict=True)):
        claim_run(record, run, own_claim("slurm", 1, f"7_{i}"))
        record.write_status(state="running")
    for record, name in zip(records, ("launch.json", "attempts.jsonl", "lease.json"), strict=False):
        (record.path / name).write_text("7\n7\n")
    settle(records, {})
    decisions = [decide(run, record, lambda claim: False) for run, record in zip(plan(sweep), records, strict=True)]
    assert [found.verdict for found in decisions] == ["damaged", "damaged", "damaged", "resume"]
    assert records[3].checked_status().reason == "the job is gone (Slurm does not know it any more)"


def test_devices_fill_whole_nodes(write_sweep: Any) -> None:
    sweep = write_sweep(devices=16)
    run = plan(sweep)[0]
    assert shape_of(run, sweep.file.slurm) == Shape(nodes=2, tasks_per_node=8)
    with pytest.raises(UserError, match="devices_per_node"):
        shape_of(run, sweep.file.slurm.model_copy(update={"devices_per_node": 6}))


@pytest.mark.parametrize(
    "section",
    [
        {"partition": "main\ntouch pwned"},
        {"extra": {"account": ""}},
        {"partition": "a\rb"},
        {"extra": {"comment\ntouch": "x"}},
        {"extra": {"comment": "x\ntouch pwned"}},
        {"extra": {"Mail Type": "END"}},
        {"extra": {"comment": ["a"]}},
        {"python": "python\ntouch pwned"},
        {"python": "python 'unfinished"},
    ],
)
def test_what_would_become_a_line_of_the_script_is_refused(write_sweep: Any, section: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="slurm"):
        write_sweep(slurm=section)


def test_no_name_or_folder_becomes_a_command(write_sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script is executed by a shell whose srun only prints what it was given."""
    root = tmp_path / "a $(touch pwned) `touch pwned` 'b\" ;touch pwned"
    section = {"partition": "$(touch pwned)", "python": "python3 $(touch pwned)", "extra": {"comment": "';touch pwned"}}
    sweep = replace(write_sweep(slurm=section), root=root)
    code = sweep.directory / "code" / "abc"
    code.mkdir(parents=True)
    snapshot, shape = Snapshot(path=code, commit="abc", dirty=True), Shape(nodes=1, tasks_per_node=1)
    executor = executor_for(sweep, shape, snapshot, "j", signal_delay_s=120, max_parallel=2, devices=1)
    (tmp_path / "srun").write_text('#!/bin/sh\npwd; echo "$PYTHONPATH"; for word; do echo "$word"; done\n')
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def execute() -> subprocess.CompletedProcess[str]:
        text = script(executor, 2)
        return subprocess.run(["bash"], input=text, capture_output=True, text=True, check=False, cwd=tmp_path)

    words = execute().stdout.splitlines()
    assert words[:2] == [str(code), str(code)]
    assert words[-7:] == ["python3", "$(touch", "pwned)", "-u", "-m", "submitit.core._submit", str(root / "tiny/slurm")]
    assert not list(tmp_path.rglob("pwned"))
    code.rmdir()
    gone = execute()
    assert (gone.returncode, gone.stdout) == (1, "")


def test_a_save_gets_its_time_everywhere(write_sweep: Any) -> None:
    """One number for the signal, torchrun and the plan."""
    small = write_sweep(sizes=["rung-32"], budgets=[640])
    (run,) = plan(small)
    assert stop_seconds(small, run) == training_jobs(small).stop_s(run) == cost_cards(small, [run])[0].stop_s == 120
    large = write_sweep(sizes=["aim-7B"], budgets=[640], devices=8)
    (run,) = plan(large)
    (card,) = cost_cards(large, [run])
    assert card.stop_s == stop_seconds(large, run) == math.ceil(2 * card.checkpoint_bytes / SAVE_BYTES_PER_S) + 30
    console = Console(width=200, file=io.StringIO())
    print_plan(large, [card], console)
    assert f"a run gets up to {duration(card.stop_s)} to save" in console.file.getvalue()  # type: ignore[attr-defined]
    assert stop_seconds(large.with_fields(slurm={"signal_delay_s": 60}), run) == 60
