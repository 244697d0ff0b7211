"""The lease and its fence: one holder, whatever happens to clocks, disks, forks and processes that stand still."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aimscale.harness.log.record import append_line
from aimscale.harness.run import lease
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.fence import LeaseLost, check_fence
from aimscale.harness.run.files import new_dir_aside, publish_dir, remove_dir, write_json, written_aside
from aimscale.harness.run.lease import LeaseHeld

HOLD = """
import sys, time
from aimscale.harness.run.directory import RunDir
with RunDir(sys.argv[1]).hold():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _fast_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The times of a lease, scaled down: minutes become seconds."""
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    monkeypatch.setattr(lease, "STALE_S", 2.0)
    monkeypatch.setattr(lease, "WATCH_BEATS", 10.0)


def on_host(name: str, action: Callable[[], Any]) -> multiprocessing.process.BaseProcess:
    """Start `action` in a process of another host, as far as the lease can tell."""

    def run() -> None:
        socket.gethostname = lambda: name  # type: ignore[method-assign]
        lease._machine = lambda: name  # type: ignore[attr-defined]
        action()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_lease_excludes_others_until_its_holder_is_dead(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert run.is_held()
    with pytest.raises(LeaseHeld, match=str(holder.pid)), run.hold():
        pass
    holder.kill()
    holder.wait()
    assert not run.is_held(), "nobody waits for a process that is dead"
    with run.hold():
        assert run.is_held()
        assert len(list(tmp_path.glob(".writer-*"))) == 1, "the dead holder's folder is gone"
    assert not run.is_held()
    assert list(tmp_path.iterdir()) == []


def write_lease(run: RunDir, *, age_s: float = 0.0, **changes: object) -> None:
    holder = {"token": "other", "host": "elsewhere", "pid": 1, "process_started": "1", "heartbeat": 0.0, **changes}
    run.lease.write_text(json.dumps(holder))
    run.lease.with_suffix(".lock").touch()
    os.utime(run.lease, (time.time() - age_s,) * 2)


def test_a_holder_elsewhere_is_given_time_and_a_requeue_is_no_proof_of_its_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)
    monkeypatch.setattr(lease, "STALE_S", 1000.0)
    write_lease(run, age_s=500, job_id="7", job_restarts=0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run.is_held(), "the node may only be cut off"
    with pytest.raises(LeaseHeld), run.hold():
        pass
    write_lease(run, age_s=1500)
    assert not run.is_held()


def test_a_namesake_of_this_host_is_not_judged_by_the_processes_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cloned machine, a container, or this one before it was started anew."""
    run = RunDir(tmp_path)
    monkeypatch.setattr(lease, "STALE_S", 1000.0)
    write_lease(run, host=socket.gethostname(), machine="another")
    assert run.is_held()
    write_lease(run, host=socket.gethostname())
    assert not run.is_held(), "process 1 of this machine started at another time"


@pytest.mark.parametrize("step_s", [1e6, -1e6])
def test_a_clock_that_is_set_takes_no_lease_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    run = RunDir(tmp_path)
    stop = tmp_path / "stop"
    monkeypatch.setattr(lease, "WATCH_BEATS", 30.0)

    def hold() -> None:
        with run.hold() as own:
            until(stop.exists)
            own.check()

    holder = on_host("elsewhere", hold)
    until(run.lease.exists)
    real = os.utime
    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", lambda path: real(path, (time.time() + step_s,) * 2))
        assert not run.is_held(), "it looks stale"
        with pytest.raises(LeaseHeld), run.hold():
            pass
    stop.touch()
    holder.join()
    assert holder.exitcode == 0


def test_a_lease_outlives_an_error_of_the_disk_but_not_a_lasting_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, failures = RunDir(tmp_path), iter([116, 5, 28])  # ESTALE, EIO, ENOSPC

    def failing(path: Path, value: Any, *, durable: bool) -> None:
        if (error := next(failures, None)) is not None:
            raise OSError(error, os.strerror(error))
        write_json(path, value, durable=durable)

    with run.hold() as own:
        monkeypatch.setattr(lease, "write_json", failing)
        until(lambda: next(failures, "none left") == "none left")
        before = run.lease.stat().st_mtime_ns
        until(lambda: run.lease.stat().st_mtime_ns > before)
        own.check()
        failures = iter([5] * 10**6)
        last = json.loads(run.lease.read_text())["heartbeat"]
        until(lambda: time.time() - last > lease.STALE_S)
        with pytest.raises(LeaseLost):
            own.check()


def test_a_process_that_stood_still_goes_on_where_nobody_came(tmp_path: Path) -> None:
    run, go = RunDir(tmp_path / "run"), tmp_path / "go"

    def hold() -> None:
        with run.hold() as own:
            until(go.exists)
            own.check()
            write_json(run.status, {"step": 1})

    holder = on_host("elsewhere", hold)
    until(run.lease.exists)
    os.kill(holder.pid or 0, signal.SIGSTOP)
    until(lambda: not run.is_held())
    go.touch()
    os.kill(holder.pid or 0, signal.SIGCONT)
    holder.join()
    assert holder.exitcode == 0
    assert json.loads(run.status.read_text()) == {"step": 1}


def test_a_holder_that_was_replaced_while_it_stood_still_can_change_nothing(tmp_path: Path) -> None:
    """It stands still between its last look at the lease and its rename, and tries every other way to write, too."""
    run, outcome = RunDir(tmp_path / "run"), tmp_path / "outcome"

    def hold() -> None:
        with run.hold() as own, contextlib.ExitStack() as stack:
            append_line(run.metrics, {"holder": "old"})
            aside = new_dir_aside(run.checkpoint_dir(8))
            write_json(aside / "manifest.json", {})
            (tmp_path / "ready").touch()

            def stand_still() -> None:
                with written_aside(run.status) as file:
                    own.check()
                    file.write_text("old")
                    os.kill(os.getpid(), signal.SIGSTOP)

            with pytest.raises(LeaseLost):
                stand_still()
            attempts: list[Callable[[], Any]] = [
                own.check,
                lambda: append_line(run.metrics, {"holder": "old, again"}),
                lambda: write_json(aside / "manifest.json", {}),
                lambda: publish_dir(aside, run.checkpoint_dir(8)),
                lambda: remove_dir(run.checkpoints),
                lambda: new_dir_aside(run.checkpoint_dir(16)),
                lambda: run.record_row({"images_seen": 8}),
                lambda: run.write_status(state="finished"),
                lambda: check_fence(run.path / "tensorboard"),
            ]
            for attempt in attempts:
                with pytest.raises(LeaseLost):
                    attempt()
            stack.callback(outcome.write_text, "stopped by the fence each time")

    holder = on_host("elsewhere", hold)
    until((tmp_path / "ready").exists)
    until(lambda: not run.is_held())
    with run.hold() as own:
        append_line(run.metrics, {"holder": "new"})
        publish_dir(new_dir_aside(run.checkpoint_dir(24)), run.checkpoint_dir(24))
        files_before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if ".writer-" not in str(path)}
        os.kill(holder.pid or 0, signal.SIGCONT)
        holder.join()
        assert outcome.read_text() == "stopped by the fence each time"
        append_line(run.metrics, {"holder": "new"})
        own.check()
    assert [json.loads(line)["holder"] for line in run.metrics.read_text().splitlines()] == ["old", "new", "new"]
    del files_before[run.metrics], files_before[run.lease]
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in files_before.items() if path.is_file())
    assert not list(run.path.glob(".writer-*"))
    assert {path.name for path in run.path.iterdir()} <= {"metrics.jsonl", "checkpoints"}


def test_a_forked_child_neither_holds_nor_releases(tmp_path: Path) -> None:
    run, child_file = RunDir(tmp_path / "run"), tmp_path / "child"

    def hold() -> None:
        with run.hold() as own:
            child = os.fork()
            if child == 0:
                own.release()  # as an exit through the block would
                signal.pause()
            child_file.write_text(str(child))
            time.sleep(0.5)
            own.check()
            os.kill(os.getpid(), signal.SIGKILL)

    holder = multiprocessing.get_context("fork").Process(target=hold)
    holder.start()
    holder.join()
    assert holder.exitcode == -signal.SIGKILL, "the child's release left the lease alone"
    try:
        with run.hold() as own:
            own.check()
    finally:
        os.kill(int(child_file.read_text()), signal.SIGKILL)


def test_processes_of_two_hosts_hold_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STALE_S", 60.0)
    run, inside, log = RunDir(tmp_path / "run"), tmp_path / "inside", tmp_path / "log"

    def contend() -> None:
        num_held = 0
        while num_held < 4:
            with contextlib.suppress(LeaseHeld), run.hold() as own:
                inside.touch(exist_ok=False)
                time.sleep(0.02)
                own.check()
                inside.unlink()
                num_held += 1
                with log.open("a") as file:
                    file.write("held\n")

    contenders = [on_host(host, contend) for host in ("a", "b") for _ in range(3)]
    for contender in contenders:
        contender.join()
    assert [contender.exitcode for contender in contenders] == [0] * 6
    assert log.read_text().count("held") == 24
