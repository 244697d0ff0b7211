from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aimscale.harness.results import VALIDATION_COLUMNS, pending_work, validation_name
from aimscale.harness.run.files import write_json
from aimscale.sweeps.cli.plan_view import launch_view
from aimscale.sweeps.collection import collect
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.state.planned_sweep import PlannedSweep
from aimscale.sweeps.state.record import RunRecord
from aimscale.sweeps.state.run_state import State, read_state
from aimscale.sweeps.sweep_status import sweep_status

CALLS = {"open", "stat", "lstat", "fstat", "scandir", "listdir", "readlink"}
"""Functions of Python that ask a file server."""


@pytest.fixture
def finished(write_sweep: Any, launch: Any, stand_in: Any) -> Any:
    """Return a sweep and its run, of which nothing is missing, as the run noted."""
    sweep = write_sweep(sizes=["rung-32"])
    launch(sweep, devices=1, command=stand_in())
    (run,) = plan(sweep)
    record = RunRecord(sweep.run_dir(run.run_id))
    for budget in run.budgets:
        for path in (record.model_file(budget), record.validation_file(budget)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"bytes")
        name, losses = (
            validation_name(record, run.config, budget),
            dict(zip(VALIDATION_COLUMNS, (0.5, 0.1, 9), strict=True)),
        )
        np.savez_compressed(record.validation_file(budget), name=name, loss_sum=np.arange(9.0), **losses)
        record.record_row({"run_id": run.run_id, "images_seen": budget, "validation": name, **losses})
    with record.hold():
        assert pending_work(record, run.config) == []
    return sweep, run, record


def test_a_look_at_a_finished_run_asks_a_file_server_ten_times_at_most(finished: Any) -> None:
    _, run, record = finished
    read_state(run, record)  # its data are looked at once in a while
    calls: Counter[str] = Counter()
    sys.setprofile(lambda _, kind, what: calls.update([what.__name__] if kind == "c_call" else []))
    try:
        found = read_state(run, record)
    finally:
        sys.setprofile(None)
    assert found.state == "finished"
    assert sum(calls[name] for name in CALLS) <= 10, {name: calls[name] for name in CALLS}


def test_a_thorough_look_finds_a_lost_file_and_tells_workers(finished: Any) -> None:
    sweep, run, record = finished
    record.validation_file(run.budgets[0]).unlink()
    assert read_state(run, record).state == "finished"
    planned = PlannedSweep(sweep, is_thorough=True)
    assert [each.state for each in planned.states] == ["paused"]
    planned.forget_notes()
    assert read_state(run, record).state == "paused"


def test_a_thorough_look_finds_each_flipped_bit_that_changes_validation_losses(finished: Any) -> None:
    sweep, run, record = finished
    path = record.validation_file(run.budgets[0])
    whole, expected, num_found = path.read_bytes(), values_of(path), 0
    for place in range(0, 8 * len(whole), 41):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        (state,) = PlannedSweep(sweep, is_thorough=True).states
        if state.state == "finished":  # a bit of the archive's dates, say
            assert values_of(path) == expected
        else:
            assert [each.what for each in state.missing] == ["validation"]
            num_found += 1
    assert num_found > 100


def values_of(path: Path) -> dict[str, Any]:
    with np.load(path) as file:
        return {name: file[name].tolist() for name in ("name", "loss_sum", *VALIDATION_COLUMNS)}


@pytest.mark.parametrize("change", [{"val_loss": 0.4}, {"val_loss_se": 0.2}, {"lr_peak": 1.0}, {"params_total": 9}])
def test_rows_without_a_checksum_are_compared_with_other_files_when_collected(
    finished: Any, change: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier releases wrote them, or as they are after an edit that took the checksum out."""
    sweep, run, record = finished
    rows = record.read_rows()
    write_json(record.results, {"version": 1, "starts": [], "rows": rows})
    assert collect(PlannedSweep(sweep)).num_complete == 2
    with record.hold():
        assert pending_work(record, run.config) == []  # and notes it
    with monkeypatch.context() as patch:
        patch.setattr(np, "load", lambda _: pytest.fail("the losses of a noted run were read again"))
        assert collect(PlannedSweep(sweep)).num_complete == 2
    write_json(record.results, {"version": 1, "starts": [], "rows": [rows[0] | change, rows[1]]})
    found = collect(PlannedSweep(sweep))
    assert next(iter(change)) in found.damaged[run.run_id]
    assert found.num_rows == 0


def test_damaged_losses_are_not_collected(finished: Any) -> None:
    sweep, run, record = finished
    path = record.validation_file(run.budgets[0])
    path.write_bytes(path.read_bytes()[:-30])
    record.record_row(record.read_rows()[0])  # the note tells of earlier results
    assert path.name in collect(PlannedSweep(sweep)).damaged[run.run_id]


def test_new_results_end_the_trust_in_the_note(finished: Any) -> None:
    _, run, record = finished
    record.record_row({"images_seen": run.budgets[0], "val_loss": None})
    assert read_state(run, record).state == "paused"


def test_finished_runs_are_looked_at_once(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, *_ = finished
    planned = PlannedSweep(sweep)
    states = planned.states
    monkeypatch.setattr(RunRecord, "read_status", lambda _: pytest.fail("looked at again"))
    assert planned.look() == states == planned.launch_states(retry=True)


def test_a_file_that_cannot_be_read_may_pass_and_a_damaged_one_does_not(write_sweep: Any, tmp_path: Path) -> None:
    sweep = write_sweep(sizes=["rung-32"])
    (run,) = plan(sweep)
    record = RunRecord(sweep.run_dir(run.run_id))
    RunRecord.create(record.path, run.config)
    record.status.write_text("{")
    assert (read_state(run, record).state, read_state(run, record).may_pass) == ("damaged", False)


def test_each_state_is_startable_held_or_over() -> None:
    """Else `status --wait` would wait for ever, or a launch leave a run alone and say nothing."""
    by_worker = {State.QUEUED, State.WAITING}
    for state in State:
        assert [state.startable, state.active, state.over, state in by_worker].count(True) == 1, state
        assert bool(state.advice) == (state.retryable or state in (State.LOST, State.PAUSED)), state
    assert {state for state in State if state.needs_person} == {"failed", "diverged", "off-track", "damaged"}
    assert {state for state in State if state.retryable} == {"failed", "diverged", "off-track", "cancelled"}


def test_launch_and_status_say_the_same_of_a_run(write_sweep: Any) -> None:
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1, 2])
    runs = plan(sweep)
    records = [RunRecord(RunRecord.create(sweep.run_dir(run.run_id), run.config).path) for run in runs]
    diverged, cancelled, damaged = records
    diverged.write_status(state="diverged", reason="loss is NaN", reason_class="nan")
    attempt = {"attempt": 1, "ended": 1.0, "device_hours": 0.0, "saved": diverged.saved_progress()}
    diverged.append_attempt(**attempt, reason_class="nan")
    cancelled.cancelled.write_text("")
    damaged.status.write_text("{")
    planned = PlannedSweep(sweep)
    sentences = [state.sentence for state in planned.states]
    assert sentences[0] == "nan: loss is NaN; `aimscale launch --retry` resumes it"
    assert sentences[1] == "`aimscale launch --retry` resumes it"
    assert str(damaged.status) in sentences[2]
    assert [line.text for line in launch_view(planned, planned.states, None) if line.level] == sentences
    assert [line.status.reason for line in sweep_status(planned).runs] == sentences
