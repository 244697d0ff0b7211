"""Forecasts of runs from the finished ones of their sweep: who gets one, when, and what a launch does with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.expected import FILE, read_expected
from aimscale.harness.run.lock import hold_lock
from aimscale.sweeps.cli.layout import new_console
from aimscale.sweeps.cli.status_view import status_view
from aimscale.sweeps.engine.forecasts import FALSE_ALARM_RATE, save_stop_threshold, write_forecasts
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.run import Run
from aimscale.sweeps.planning.sweepfile import Sweep
from aimscale.sweeps.state.planned_sweep import PlannedSweep
from aimscale.sweeps.state.record import RunRecord
from aimscale.sweeps.sweep_status import sweep_status

SIZES = ["rung-24", "rung-32", "rung-48", "rung-64"]
AT = range(64, 1200, 64)


def finish(sweep: Sweep, run: Run, shift: float = 0.0) -> None:
    """Leave what a finished run leaves: its points during training, and its budgets."""
    record = RunDir.create(sweep.run_dir(run.run_id), run.config)
    rng, level = np.random.default_rng(run.num_params), 0.5 + 20 * run.num_params**-0.5 + shift
    digest = run.config.evaluation.validation.digest
    lines = [
        {"images_seen": n, "validation": f"{digest}.x", "val_loss": level + n**-0.5 + 1e-3 * rng.normal()} for n in AT
    ]
    record.curve.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for budget in run.budgets:
        record.record_row({"run_id": run.run_id, "images_seen": budget, "val_loss": level + budget**-0.5 - 0.01})
    record.write_status(state="finished")


def test_a_run_is_forecast_from_finished_smaller_ones_of_its_design(write_sweep: Any) -> None:
    sweep = write_sweep(sizes=SIZES, seeds=[0, 1], unique_images=[None, 320])
    runs = plan(sweep)
    by_size = {size: [run for run in runs if run.cell["size"] == size] for size in SIZES}
    target, other = (next(run for run in by_size["rung-64"] if run.cell["unique_images"] == u) for u in (None, 320))
    for run in (target, other):
        RunDir.create(sweep.run_dir(run.run_id), run.config)
    record = RunRecord(sweep.run_dir(target.run_id))
    write_forecasts(sweep, runs, [target])
    assert read_expected(record) is None
    finish(sweep, by_size["rung-24"][0])
    write_forecasts(sweep, runs, [target])
    assert read_expected(record) is None, "one size tells no ratio"
    for size in ("rung-32", "rung-48"):
        for run in by_size[size]:
            finish(sweep, run, shift=0.0 if run.cell["unique_images"] is None else 0.3)
    save_stop_threshold(sweep, 3.0)
    write_forecasts(sweep, runs, [target, other])
    found = read_expected(record)
    assert found is not None
    assert [point.images_seen for point in found.points] == list(AT)
    assert [point.images_seen for point in found.budgets] == list(target.budgets)
    truth = 0.5 + 20 * target.num_params**-0.5 + AT[-1] ** -0.5
    assert found.points[-1].loss == pytest.approx(truth, rel=0.01)
    assert found.points[-1].low < truth < found.points[-1].high
    assert (found.stop_sd, found.false_alarm_rate) == (3.0, FALSE_ALARM_RATE)
    assert 3 < found.alarm_sd < 7
    elsewhere = read_expected(RunRecord(sweep.run_dir(other.run_id)))
    assert elsewhere is not None
    assert elsewhere.points[-1].loss > found.points[-1].loss + 0.2, "other data, other forecast"
    save_stop_threshold(sweep, None)
    write_forecasts(sweep, runs, [target])
    again = read_expected(record)
    assert again is not None
    assert again.stop_sd is None


def test_a_launch_leaves_forecasts_and_ends_a_run_that_retry_takes_up(
    write_sweep: Any, launch: Any, stand_in: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sweep = write_sweep(sizes=SIZES[:3])
    small, middle, large = sorted(plan(sweep), key=lambda run: run.num_params)
    for run in (small, middle):
        finish(sweep, run)
    result = launch(sweep, devices=1, command=stand_in("off track"), stop_sd=2.5)
    assert large.run_id in result.failed
    record = RunRecord(sweep.run_dir(large.run_id))
    assert json.loads((record.path / FILE).read_text())["stop_sd"] == 2.5
    assert f"ended {large.run_id}: +4.2 sd above its forecast" in capsys.readouterr().out
    (line,) = (each for each in sweep_status(PlannedSweep(sweep)).runs if each.run_id == large.run_id)
    assert (line.state, str(line.status.reason).split(";")[0]) == ("off-track", "+4.2 sd above its forecast")
    again = launch(sweep, devices=1, command=stand_in())
    assert [each.state for each in again.skipped if each.run.run_id == large.run_id] == ["off-track"]
    assert large.run_id in launch(sweep, devices=1, command=stand_in(), retry=True).finished
    assert json.loads((record.path / FILE).read_text())["stop_sd"] is None, "the last launch did not ask for it"


def test_status_says_who_is_on_track(write_sweep: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = write_sweep(sizes=SIZES)
    runs = sorted(plan(sweep), key=lambda run: run.num_params)
    told = (
        {"deviation": 0.4},
        {"deviation": 4.23, "deviates_since": 1_200_000},
        {"deviation": -11.2, "deviates_since": 9_000},
    )
    for run in runs:
        finish(sweep, run)
    assert "forecast" not in shown(sweep), "no run has one"
    for run, changes in zip(runs, told, strict=False):
        RunDir(sweep.run_dir(run.run_id)).write_status(**changes)
    text = shown(sweep)
    assert "on track" in text
    assert "+4.2 sd above since 1.2M images" in text
    assert "-11.2 sd below since 9k images" in text


def shown(sweep: Sweep) -> str:
    console = new_console()
    with console.capture() as capture:
        console.print(status_view(sweep_status(PlannedSweep(sweep)), 200))
    return capture.get()


def test_runs_of_one_seed_do_not_forecast_another(write_sweep: Any) -> None:
    sweep = write_sweep(sizes=SIZES, seeds=[0, 1])
    runs = sorted(plan(sweep), key=lambda run: run.num_params)
    for run in runs[:-2]:
        if run.cell["seed"] == 0:
            finish(sweep, run)
    same, other = sorted(runs[-2:], key=lambda run: run.cell["seed"])
    for run in (same, other):
        RunDir.create(sweep.run_dir(run.run_id), run.config)
    write_forecasts(sweep, runs, [same, other])
    assert read_expected(RunRecord(sweep.run_dir(same.run_id))) is not None
    assert read_expected(RunRecord(sweep.run_dir(other.run_id))) is None, "they share one order of data"
    finish(sweep, next(run for run in runs[:-2] if run.cell["seed"] == 1))
    write_forecasts(sweep, runs, [other])
    assert read_expected(RunRecord(sweep.run_dir(other.run_id))) is not None


def test_status_calls_attention_to_a_running_run_that_is_off(write_sweep: Any) -> None:
    sweep = write_sweep(sizes=SIZES[:2])
    first, second = plan(sweep)
    for run in (first, second):
        RunDir.create(sweep.run_dir(run.run_id), run.config)
    RunDir(sweep.run_dir(first.run_id)).write_status(state="running", deviation=4.23, deviates_since=43_008)
    with hold_lock(RunDir(sweep.run_dir(first.run_id)).lock):
        assert "off-track" in (text := shown(sweep))
    assert "loss +4.2 sd above since 43k images, which 1 % of sound runs come to" in text
