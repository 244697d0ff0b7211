"""`aimscale collapse`: from the logged losses of a sweep's runs to the sizes that deviate."""

import json
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from aimscale.sweeps.cli.main import verb
from aimscale.sweeps.plan.planner import plan
from aimscale.sweeps.plan.sweepfile import SweepError


def test_the_curves_are_read_from_the_run_directories(write_sweep: Any, tmp_path: Any) -> None:
    sizes = ["rung-32", "rung-48", "rung-64", "rung-96", "rung-128", "rung-192"]
    sweep = write_sweep(sizes=sizes, budgets=[640, 6400])
    args = [str(sweep.source), "--root", str(sweep.root)]
    with pytest.raises(SweepError, match="has logged a loss"):
        CliRunner().invoke(verb("collapse"), args, catch_exceptions=False)
    rng = np.random.default_rng(0)
    for i, run in enumerate(plan(sweep)):
        folder = sweep.run_dir(run.run_id)
        folder.mkdir(parents=True)
        bump = 1 + (0.1 if run.cell["size"] == "rung-96" else 0.0) * np.linspace(1, 0, 100)
        losses = (1 + np.arange(1, 101) ** -(0.5 + 0.01 * i)) * bump * np.exp(0.002 * rng.standard_normal(100))
        trunk = [{"images_seen": 64 * (k + 1), "branch": None, "loss": float(v)} for k, v in enumerate(losses)]
        other = {"images_seen": 600, "branch": 640, "loss": 9.0}  # the decay towards another budget is left out
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*trunk, other]))
    out = CliRunner().invoke(
        verb("collapse"), [*args, "--json", "--figure", str(tmp_path / "collapse")], catch_exceptions=False
    )
    found = json.loads(out.output)
    assert found["deviating"] == ["rung-96"]
    assert [row["rung"] for row in found["rungs"]] == sizes
    assert (tmp_path / "collapse.svg").is_file()


def test_status_forecasts_the_end_of_a_running_run(write_sweep: Any) -> None:
    sweep = write_sweep(sizes=["rung-32", "rung-48", "rung-64", "rung-96"], budgets=[6400])
    for i, run in enumerate(plan(sweep)):
        folder = sweep.run_dir(run.run_id)
        folder.mkdir(parents=True)
        losses = 1 + (0.5 + 0.01 * i) * np.arange(1, 101) ** -0.5
        lines = [{"images_seen": 64 * (k + 1), "branch": None, "loss": float(v)} for k, v in enumerate(losses)]
        text = "".join(json.dumps(line) + "\n" for line in (lines[:50] if i == 1 else lines))
        (folder / "metrics.jsonl").write_text(text + '{"images_seen": 9')  # a line that is being written
    args = [str(sweep.source), "--root", str(sweep.root), "--ends"]
    out = CliRunner().invoke(verb("status"), args, catch_exceptions=False)
    assert "at 50% of its training, will end at a training loss of 1.05" in out.output
    (ending,) = json.loads(CliRunner().invoke(verb("status"), [*args, "--json"], catch_exceptions=False).output)[
        "endings"
    ]
    assert ending["num_finished"] == 3
    assert ending["low"] < 1 + 0.51 * 0.1025 < ending["high"]
