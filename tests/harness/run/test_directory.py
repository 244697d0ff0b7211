"""The run directory: atomic files, the lease, and what may take it over."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import aimscale.harness.run.directory
from aimscale.harness.run.config import ConfigError, RunConfig
from aimscale.harness.run.directory import LeaseHeld, LeaseLost, RunDir, RunDirError
from aimscale.harness.run.files import locked, write_json

Config = Callable[..., RunConfig]


def test_rundir_needs_no_torch() -> None:
    names = ("run.directory", "run.schedule", "device.memory", "run.failures")
    modules = ", ".join(f"aimscale.harness.{name}" for name in names)
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_create_keeps_a_run_and_refuses_another(tmp_path: Path, tiny_config: Config) -> None:
    config = tiny_config()
    run = RunDir.create(tmp_path / "run", config)
    assert run.load_config() == config
    run.write_status(state="running", images_done=8)
    RunDir.create(tmp_path / "run", config)
    assert run.read_status().images_done == 8
    with pytest.raises(RunDirError, match=r"holds run w16-d2_uall_s0_.*, not w16-d2_uall_s1"):
        RunDir.create(tmp_path / "run", tiny_config(seed=1))
    with pytest.raises(ConfigError, match="is no run directory"):
        RunDir(tmp_path).load_config()


def test_rows_are_kept_by_budget(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.read_rows() == []
    for budget, loss in ((200, 0.5), (100, 0.7), (200, 0.4)):
        run.record_row({"images_seen": budget, "val_loss": loss})
    assert run.read_rows() == [{"images_seen": 100, "val_loss": 0.7}, {"images_seen": 200, "val_loss": 0.4}]


HOLD = """
import sys, time
from aimscale.harness.run.directory import RunDir
with RunDir(sys.argv[1]).hold():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lease_excludes_others_until_its_holder_is_dead(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert run.is_held()
    with pytest.raises(LeaseHeld, match=f"executed by process {holder.pid} on"), run.hold():
        pass
    holder.kill()
    holder.wait()
    assert not run.is_held(), "nobody waits for a process that is dead"
    with run.hold():
        assert run.is_held()
    assert not run.is_held()


def write_lease(run: RunDir, **changes: object) -> None:
    holder = {
        "token": "other", "host": "elsewhere", "pid": 1, "process_started": "1", "job_id": None, "job_restarts": 0,
        "heartbeat": time.time(), **changes,
    }  # fmt: skip
    write_json(run.lease, holder)


def test_a_holder_on_another_host_is_given_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path)
    write_lease(run, job_id="7", heartbeat=time.time() - aimscale.harness.run.directory.LEASE_STALE_S / 2)
    assert run.is_held()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not run.is_held(), "the same job was requeued: its earlier self is over"
    monkeypatch.delenv("SLURM_JOB_ID")
    write_lease(run, heartbeat=time.time() - aimscale.harness.run.directory.LEASE_STALE_S - 1)
    assert not run.is_held()
    run.lease.write_text("{")
    assert not run.is_held(), "its writer died while writing"


def test_a_holder_notices_that_it_was_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aimscale.harness.run.directory, "LEASE_BEAT_S", 0.01)
    run = RunDir(tmp_path)
    with run.hold() as lease:
        first = json.loads(run.lease.read_text())["heartbeat"]
        deadline = time.monotonic() + 30
        while json.loads(run.lease.read_text())["heartbeat"] == first and time.monotonic() < deadline:
            time.sleep(0.01)
        lease.check()
        with locked(run.path / "lease.lock"):
            write_lease(run)
        lease._thread.join(30)
        with pytest.raises(LeaseLost, match="taken over"):
            lease.check()
    assert json.loads(run.lease.read_text())["token"] == "other", "the new holder's lease is left alone"


def test_rows_written_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    code = """
import sys
from aimscale.harness.run.directory import RunDir
run, writer = RunDir(sys.argv[1]), sys.argv[2]
for budget in range(1, 11):
    run.update_row(budget, lambda row: {**(row or {"images_seen": budget}), writer: budget})
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in ("trainer", "prober")]
    assert [writer.wait() for writer in writers] == [0, 0]
    rows = RunDir(tmp_path).read_rows()
    assert rows == [{"images_seen": budget, "trainer": budget, "prober": budget} for budget in range(1, 11)]


def test_a_row_that_does_not_change_is_not_written_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.record_row({"images_seen": 8, "val_loss": 1.0})
    written = run.results.stat().st_mtime_ns
    assert run.update_row(8, lambda row: row) == {"images_seen": 8, "val_loss": 1.0}
    assert run.update_row(16, lambda row: None) is None
    assert run.results.stat().st_mtime_ns == written
