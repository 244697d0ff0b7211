"""The faults that are tried on real processes are told apart from harmless ones."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aimscale.sweeps.bench import faults
from aimscale.sweeps.bench.disturb import FAULTS, Disturbed
from aimscale.sweeps.cli import bench as cli_bench


def finished(folder: Path, **row: Any) -> Disturbed:
    """A sweep of one run as it is found at the end, of which nothing was executed."""
    faults._write_data(folder)
    disturbed = faults._disturbed(folder, "one", "training", random.Random(0), 1)
    (record,) = disturbed.runs
    record.record_row({"images_seen": 512, "val_loss": 0.5, "finished_at": "now", **row})
    record.metrics.write_text('{"images_seen": 8}\n')
    return disturbed


def test_a_doubled_line_another_number_and_a_file_left_behind_are_found(tmp_path: Path) -> None:
    disturbed = finished(tmp_path)
    (record,) = disturbed.runs
    expected = faults._outcome(disturbed)
    record.record_row({"images_seen": 512, "val_loss": 0.5, "finished_at": "later"})
    assert faults._differences(expected, faults._outcome(disturbed)) == [], "times may differ"
    record.record_row({"images_seen": 512, "val_loss": 0.5000001})
    record.metrics.write_text('{"images_seen": 8}\n' * 2)
    (record.path / ".writer-dead").mkdir()
    found = faults._differences(expected, faults._outcome(disturbed))
    assert [problem.partition(": ")[2] for problem in found] == [
        "files left behind differs", "metrics.jsonl differs", "rows differs",
    ]  # fmt: skip


def test_a_run_that_was_executed_twice_is_found(tmp_path: Path) -> None:
    disturbed = finished(tmp_path)
    (record,) = disturbed.runs
    attempt = {"ended": 0.0, "exit_code": 0, "where": "here", "saved": [1], "reason_class": None, "reason": None}
    record.append_attempt(attempt=1, **attempt)
    assert faults._executed_twice(disturbed, 0) == []
    record.append_attempt(attempt=2, **attempt)
    assert faults._executed_twice(disturbed, 1) == [
        f"{record.path.name} was executed 2 times", "the crowd left 1 launches to do",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_fault_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli_bench.app, ["faults", "--rounds", "1", "--folder", str(tmp_path / "f"), "--json"])
    assert result.exit_code == 0, result.output
    trials = json.loads(result.stdout)["trials"]
    assert {trial["fault"] for trial in trials} == {fault.name for fault in FAULTS}
    assert not any(trial["problems"] for trial in trials)
    killed = {trial["fault"] for trial in trials if trial["num_kills"]}
    assert killed >= {"kill the launcher or worker", "kill launcher and trainer"}, "the others may end before"
    assert "as undisturbed" in faults.table(trials)
