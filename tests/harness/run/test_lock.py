"""The lock of a run and its writer: one, whatever befalls file servers, forks and processes that stand still."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import until

from aimscale.aim.errors import UserError
from aimscale.harness.run import lock
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.files import append_line, atomic_write, new_partial_dir, publish_dir, remove_dir, write_json
from aimscale.harness.run.lock import Lock, LockHeld, LockLost, check_writer, locked

HOLD = """
import os, sys, time
from aimscale.harness.run.failures import start_fork_server
from aimscale.harness.run.directory import RunDir
with RunDir(sys.argv[1]).hold():
    start_fork_server([]).Process(target=time.sleep, args=(60,)).start()
    child = os.fork()
    if child:
        print("held", child, flush=True)
    time.sleep(60)
"""


def in_fork(action: Callable[[], Any]) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    return process


def test_a_wait_for_another_process_is_told_and_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "TELL_S", 0.1)
    monkeypatch.setattr(lock, "WAIT_S", 0.2)
    path = tmp_path / "shard.partial"
    with locked(path), pytest.raises(TimeoutError, match=r"another process .*shard\.partial"), locked(path):
        pass
    assert str(path) in caplog.text
    with locked(path, wait=False) as is_mine:
        assert is_mine


def test_a_lock_excludes_others_until_its_holder_is_dead_whatever_it_forked(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    word, child = holder.stdout.readline().split()
    assert word == "held"
    assert run.is_held()
    with pytest.raises(LockHeld, match=str(holder.pid)), run.hold():
        pass
    (left,) = tmp_path.glob(".writer-*")
    (left / "part").touch()
    holder.kill()
    holder.wait()
    os.kill(int(child), 0)  # its fork lives, as may the loader processes of a trainer
    assert not run.is_held(), "nobody waits for a process that is dead"
    with run.hold() as folder:
        assert run.is_held()
        assert list(tmp_path.glob(".writer-*")) == [folder]
        assert not list(folder.iterdir()), "what the dead holder left is gone"
    os.kill(int(child), signal.SIGKILL)
    assert not run.is_held()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_forked_child_that_leaves_the_block_takes_nothing_from_its_parent(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(run.hold())
        in_fork(stack.close).join()
        assert folder.is_dir()
        assert run.is_held()


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match="has no locks") as refused, RunDir(tmp_path).hold():
        pass
    assert not isinstance(refused.value, LockHeld)


def test_a_holder_that_was_replaced_while_it_stood_still_can_change_nothing(tmp_path: Path) -> None:
    """It stands still between its last check and its rename, and tries every other way to write, too."""
    run, outcome = RunDir(tmp_path / "run"), tmp_path / "outcome"

    def hold() -> None:
        with run.hold():
            append_line(run.metrics, {"holder": "old"})
            partial = new_partial_dir(run.checkpoint_dir(8))
            write_json(partial / "manifest.json", {})

            def stand_still() -> None:
                with atomic_write(run.status) as file:
                    check_writer(run.status)
                    file.write_text("old")
                    (tmp_path / "ready").touch()
                    os.kill(os.getpid(), signal.SIGSTOP)

            attempts: list[Callable[[], Any]] = [
                stand_still,
                lambda: append_line(run.metrics, {"holder": "old, again"}),
                lambda: write_json(partial / "manifest.json", {}),
                lambda: publish_dir(partial, run.checkpoint_dir(8)),
                lambda: remove_dir(run.checkpoints),
                lambda: new_partial_dir(run.checkpoint_dir(16)),
                lambda: run.record_row({"images_seen": 8}),
                lambda: run.write_status(state="finished"),
                lambda: check_writer(run.path / "tensorboard"),
            ]
            for attempt in attempts:
                with pytest.raises(LockLost):
                    attempt()
        outcome.write_text("stopped each time")

    holder = in_fork(hold)
    until((tmp_path / "ready").exists)
    assert run.is_held()
    (run.path / "lock").unlink()  # as a file server does that lost sight of the holder
    with run.hold():
        append_line(run.metrics, {"holder": "new"})
        publish_dir(new_partial_dir(run.checkpoint_dir(24)), run.checkpoint_dir(24))
        files_before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if ".writer-" not in str(path)}
        os.kill(holder.pid or 0, signal.SIGCONT)
        holder.join()
        assert outcome.read_text() == "stopped each time"
        append_line(run.metrics, {"holder": "new"})
        assert run.is_held()
    assert [json.loads(line)["holder"] for line in run.metrics.read_text().splitlines()] == ["old", "new", "new"]
    del files_before[run.metrics]
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in files_before.items() if path.is_file())
    assert {path.name for path in run.path.iterdir()} == {"lock", "metrics.jsonl", "checkpoints"}


@pytest.mark.parametrize("name", ["lock", "claim"])
def test_a_lock_that_is_a_link_is_refused_and_its_target_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / name).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=f"{name} is a symbolic link"):
        Lock(tmp_path / name).take()
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_link_or_file_named_as_a_writers_folder_goes_and_its_target_stays(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    run.path.mkdir()
    (run.path / ".writer-X").symlink_to(tmp_path / "mine")
    (run.path / ".writer-Y").write_text("")
    (run.path / ".writer-Z").symlink_to(tmp_path / "nowhere")
    with run.hold() as folder:
        assert list(run.path.glob(".writer-*")) == [folder]
    assert (tmp_path / "mine" / "file").read_text() == "precious"


def test_the_folder_of_a_run_that_was_moved_does_not_come_back(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "sweep" / "runs" / "a")
    run.path.mkdir(parents=True)
    with run.hold():
        (tmp_path / "sweep").rename(tmp_path / "moved")
        for write in (lambda: run.write_status(state="running"), lambda: append_line(run.metrics, {})):
            with pytest.raises(LockLost, match="moved"):
                write()
    with pytest.raises(UserError, match="No such file"):
        Lock(run.path / "claim").take()
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]
