from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aimscale.sweeps.bench import overheads as bench_sweep
from aimscale.sweeps.cli import bench as cli_bench
from aimscale.sweeps.plan.costs import cost_cards
from aimscale.sweeps.plan.planner import plan
from aimscale.sweeps.table.status import sweep_status


def test_the_sweep_that_is_measured_is_of_the_size_asked_for_and_finished(tmp_path: Path) -> None:
    sweep = bench_sweep._sweep(tmp_path, 37)
    runs = plan(sweep)
    assert len(runs) == 40  # whole sets of five sizes and two subsets
    bench_sweep._finish(sweep, runs)
    status = sweep_status(sweep, runs, cost_cards(sweep, runs))
    assert status.counts == {"finished": 40}
    assert status.progress == 1.0


def test_ratios_are_medians_of_turns() -> None:
    row = bench_sweep._compare("slow", lambda: time.sleep(0.02), "least", lambda: time.sleep(0.004), 3)
    assert 1 < row["ratio"] < 20
    assert row["seconds"] > row["floor_seconds"] > 0


@pytest.mark.slow
def test_every_comparison_is_made() -> None:
    result = CliRunner().invoke(cli_bench.app, ["sweep", "--runs", "10", "--repeats", "1", "--json"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    names = [row["name"] for row in values["rows"]]
    assert names[:3] == ["plan of 10 runs, with cost cards", "status of 10 runs", "collect of 20 rows"]
    assert "aimscale --help" in names
    assert "import of the trainer" in names
    assert all(row["ratio"] > 0 and row["floor"] for row in values["rows"])
    assert "x " in bench_sweep.table(values)
