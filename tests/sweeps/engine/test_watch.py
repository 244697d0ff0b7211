from __future__ import annotations

import json
from typing import Any

import pytest

from aimscale.harness.run.directory import EXIT_PREEMPTED
from aimscale.harness.run.expected import FILE
from aimscale.harness.run.lock import hold_lock
from aimscale.sweeps.engine.forecasts import Watch
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.state.planned_sweep import PlannedSweep
from aimscale.sweeps.state.record import RunRecord
from aimscale.sweeps.sweep_status import sweep_status


def forecast(record: RunRecord, loss: float, stop_sd: float | None) -> None:
    """Leave a run the forecast of one loss at its points."""
    point = {"loss": loss, "low": 0.9 * loss, "high": 1.1 * loss, "sd": 0.01, "noise": 0.005}
    points = [{"images_seen": 128 * number, **point} for number in range(1, 7)]
    values = {"basis": "", "points": points, "memory": 3.0, "alarm_sd": 4.0, "stop_sd": stop_sd}
    (record.path / FILE).write_text(json.dumps(values))


def test_a_run_that_leaves_its_forecast_is_seen_and_stopped_where_a_launch_asked_for_that(write_sweep: Any) -> None:
    sweep = write_sweep(sizes=["rung-32"])
    (run,) = plan(sweep)
    record = RunRecord(RunRecord.create(sweep.run_dir(run.run_id), run.config).path)
    watch = Watch(run, record)
    assert watch.look() is None, "there is neither a forecast nor a point"
    forecast(record, 0.5, None)
    lines = [json.dumps({"images_seen": 128 * number, "val_loss": 0.9}) + "\n" for number in range(1, 5)]
    record.curve.write_text(lines[0])
    assert watch.look() is None
    assert record.read_deviation()["deviation"] > 4
    assert record.read_deviation()["deviates_since"] is None, "an alarm takes three points"
    record.curve.write_text("".join(lines))
    assert watch.look() is None, "no launch asked to stop it"
    assert record.read_deviation()["deviates_since"] == 128
    with hold_lock(record.lock):
        (line,) = sweep_status(PlannedSweep(sweep)).runs
    assert line.status.deviates_since == 128
    forecast(record, 0.5, 3.0)
    assert "sd above its forecast since D = 128" in str(watch.look())
    assert watch.look() is None, "nothing is new"
    other = json.dumps({"images_seen": 640, "val_loss": 0.5, "validation": "other.images"}) + "\n"
    record.curve.write_text("".join([*lines, other]))
    assert "since D = 128" in str(watch.look()), "a point measured otherwise does not count"


def test_a_worker_ends_a_run_off_its_forecast_saved_and_a_retry_goes_on(
    write_sweep: Any, launch: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = write_sweep(sizes=["rung-32"])
    (run,) = plan(sweep)
    record = RunRecord(RunRecord.create(sweep.run_dir(run.run_id), run.config).path)
    monkeypatch.setattr("aimscale.sweeps.engine.worker.CANCEL_CHECK_S", 0.1)
    forecast(record, 0.5, 3.0)
    assert launch(sweep, devices=1, command=stand_in("deviate")).failed == (run.run_id,)
    status, (attempt,) = record.read_status(), record.read_attempts()
    assert (status.state, status.reason_class, status.deviates_since) == ("off-track", None, 128)
    assert "sd above its forecast since D = 128 (--stop-off-track 3)" in str(status.reason)
    assert (attempt["exit_code"], attempt["reason"]) == (EXIT_PREEMPTED, status.reason)
    assert [each.state for each in PlannedSweep(sweep).states] == ["off-track"]
    assert launch(sweep, devices=1, command=stand_in()).skipped[0].state == "off-track"
    forecast(record, 0.5, None)
    assert launch(sweep, devices=1, command=stand_in(), retry=True).finished == (run.run_id,)
