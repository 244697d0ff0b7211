"""A run that is damaged, or whose end cannot be recorded, does not affect the others."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.state.planned_sweep import PlannedSweep
from aimscale.sweeps.state.record import RunRecord
from aimscale.sweeps.sweep_status import sweep_status

DAMAGE = [
    ("config.yaml", ""),
    ("config.yaml", "- 1"),
    ("results.json", ""),
    ("results.json", "[]"),
    ("results.json", '{"rows": 3}'),
    ("status.json", "null"),
    ("status.json", '{"version": 1, "state": 7}'),
    ("status.json", '{"version": 99}'),
    ("attempts.jsonl", "7\n7\n"),
    ("attempts.jsonl", '{"attempt": 1}\n{"forgiven": true}\n'),
    ("attempts.jsonl", '{"reason_class": null, "saved": [], "device_hours": [], "ended": 1}\n7\n'),
    ("status.json", "\udcff"),
]


def test_damaged_runs_are_named_and_left_and_the_others_are_executed(
    write_sweep: Any, launch: Any, stand_in: Any
) -> None:
    """Each kind of damage has its own run, beside two intact runs."""
    sweep = write_sweep(sizes=["rung-32"], seeds=list(range(len(DAMAGE) + 2)))
    runs = plan(sweep)
    for (name, text), run in zip(DAMAGE, runs, strict=False):
        record = RunRecord(sweep.run_dir(run.run_id))
        RunRecord.create(record.path, run.config)
        record.write_status(state="preempted")
        (record.path / name).write_bytes(text.encode(errors="surrogateescape"))
    result = launch(sweep, devices=2, command=stand_in())
    assert len(result.finished) == 2
    whys = {decision.run.run_id: decision.reason for decision in result.skipped if decision.state == "damaged"}
    assert len(whys) == len(DAMAGE)
    status = sweep_status(PlannedSweep(sweep))
    for (name, _), run, line in zip(DAMAGE, runs, status.runs, strict=False):
        assert name in whys[run.run_id]
        assert "\n" not in whys[run.run_id]
        if name == "status.json":
            assert line.state == "damaged"
    assert [line.state for line in status.runs][-2:] == ["finished", "finished"]


def test_a_run_that_damages_itself_is_left_while_the_others_train_on(
    write_sweep: Any, launch: Any, stand_in: Any
) -> None:
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1, 2])
    bad = sweep.run_dir(plan(sweep)[0].run_id)
    spoil = "import pathlib, sys; pathlib.Path(sys.argv[1], 'results.json').write_text(''); sys.exit(1)"

    def command(run_dir: Path, devices: int) -> list[str]:
        return [sys.executable, "-c", spoil, str(run_dir)] if run_dir == bad else stand_in()(run_dir, devices)

    result = launch(sweep, devices=3, command=command)
    assert result.failed == (bad.name,)
    assert len(result.finished) == 2


def test_a_full_disk_at_the_end_of_one_run_leaves_the_others_alone(
    write_sweep: Any, launch: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1, 2])
    bad = plan(sweep)[1].run_id
    append = RunRecord.append_attempt

    def full(self: RunRecord, **values: Any) -> None:
        if self.path.name == bad:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.attempts))
        append(self, **values)

    monkeypatch.setattr(RunRecord, "append_attempt", full)
    result = launch(sweep, devices=3, command=stand_in())
    assert (result.failed, len(result.finished)) == ((bad,), 2)
    assert f"left {bad}: how it ended cannot be written down" in capsys.readouterr().out
