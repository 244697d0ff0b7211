"""Other hosts whose locks are not seen, and errors that a file server gives for a while."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from aimscale.aim.errors import UserError
from aimscale.sweeps.engine import looks
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.sweepfile import SWEEP_RECORD
from aimscale.sweeps.state.record import RunRecord
from aimscale.sweeps.state.run_state import read_state


def test_a_run_that_another_host_executes_without_a_lock_seen_here_is_refused(
    write_sweep: Any, launch: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on BeeGFS's stock client, where flock succeeds and holds within each host alone."""
    monkeypatch.setattr(looks, "RESCAN_S", 0.2)
    sweep = write_sweep(sizes=["rung-32"])
    (run,) = plan(sweep)
    record = RunRecord(sweep.run_dir(run.run_id))
    RunRecord.create(record.path, run.config)
    for host, age_s, state in (("node7", 0, "running"), ("node7", 200, "lost"), (socket.gethostname(), 0, "lost")):
        record.write_status(state="running", host=host, heartbeat=time.time() - age_s)
        assert read_state(run, record).state == state
    record.write_status(host="node7", heartbeat=time.time())
    is_over = threading.Event()

    def train() -> None:
        while not is_over.wait(0.1):
            record.write_status(state="running", host="node7", heartbeat=time.time())

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        with pytest.raises(UserError, match=r"node7 executes .* with locks that hold between hosts"):
            launch(sweep, devices=1, command=stand_in())
    finally:
        is_over.set()
        trainer.join()
    assert not record.read_attempts()
    assert not (record.path / "starts").exists()


def test_a_silent_run_of_another_host_is_taken_over_once_its_status_is_old(
    write_sweep: Any, launch: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(looks, "RESCAN_S", 0.2)
    monkeypatch.setattr("aimscale.sweeps.state.run_state.FRESH_S", 3.0)
    sweep = write_sweep(sizes=["rung-32"])
    (run,) = plan(sweep)
    record = RunRecord(sweep.run_dir(run.run_id))
    RunRecord.create(record.path, run.config)
    record.write_status(state="running", host="node7", heartbeat=time.time())
    assert launch(sweep, devices=1, command=stand_in()).finished == (run.run_id,)
    assert f"waiting: {run.run_id} was at work on node7 just now" in capsys.readouterr().out


@pytest.mark.parametrize("num_errors", [2, 99])
def test_an_error_that_passes_is_no_damage_and_one_that_lasts_is(
    num_errors: int, write_sweep: Any, launch: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looks, "RESCAN_S", 0.0)
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1])
    stale, _ = (run.run_id for run in plan(sweep))
    read, left = RunRecord.read_attempts, [num_errors]

    def read_attempts(self: RunRecord) -> list[dict[str, Any]]:
        if self.name == stale and left[0] > 0 and threading.current_thread() is threading.main_thread():
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self.attempts))
        return read(self)

    looked = looks.Looks.read_state

    def reading(self: Any, run: Any) -> Any:  # only a worker's own looks meet it
        monkeypatch.setattr(RunRecord, "read_attempts", read_attempts)
        try:
            return looked(self, run)
        finally:
            monkeypatch.setattr(RunRecord, "read_attempts", read)

    monkeypatch.setattr(looks.Looks, "read_state", reading)
    result = launch(sweep, devices=1, command=stand_in())
    assert len(result.finished) == (2 if num_errors == 2 else 1)
    assert [each.run.run_id for each in result.skipped if each.state == "damaged"] == [stale] * (num_errors == 99)
    assert num_errors == 2 or left[0] == 99 - looks.NUM_LOOKS


def test_one_error_of_the_sweeps_folder_ends_no_worker(
    write_sweep: Any, launch: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = write_sweep(sizes=["rung-32"])
    is_file, num_errors = Path.is_file, 0

    def failing(self: Path) -> bool:
        nonlocal num_errors
        if self.name == SWEEP_RECORD and num_errors < 1:
            num_errors += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return is_file(self)

    monkeypatch.setattr(Path, "is_file", failing)
    result = launch(sweep, devices=1, command=stand_in())
    assert (len(result.finished), result.broken, num_errors) == (1, None, 1)
