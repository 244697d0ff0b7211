"""The training curves of a sweep's runs, from what they have logged."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

import pandas as pd

from aimscale.harness.run.row import model_of
from aimscale.sweeps.plan.planner import Run, counts_of
from aimscale.sweeps.plan.sweepfile import Sweep, SweepError


def training_curves(sweep: Sweep, runs: Sequence[Run], *, per_param: bool = False) -> pd.DataFrame:
    """Logged losses of every run that has begun, by size in order of N, on the way to one budget each.

    Args:
        per_param: end each run at the budget whose D/N is nearest to the sweep's median, instead of the largest.

    Returns:
        One row a logged interval: rung (the size), run, progress (share of that budget), loss.

    Raises:
        SweepError: no run has logged a loss, or a log is damaged.
    """
    params = {run.run_id: counts_of(model_of(run.config.training))[0].total for run in runs}
    middle = statistics.median(math.log(max(run.budgets) / params[run.run_id]) for run in runs)
    rows: list[dict[str, Any]] = []
    for run in sorted(runs, key=lambda run: params[run.run_id]):
        path = sweep.run_dir(run.run_id) / "metrics.jsonl"
        if not path.is_file():
            continue
        end = max(run.budgets)
        if per_param:
            end = min(run.budgets, key=lambda seen: abs(math.log(seen / params[run.run_id]) - middle))
        try:
            lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
            rows += [
                {
                    "rung": run.cell["size"],
                    "run": run.run_id,
                    "progress": line["images_seen"] / end,
                    "loss": float("nan" if line["loss"] is None else line["loss"]),
                }
                for line in lines
                if line.get("branch") in (None, end) and line["images_seen"] <= end
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SweepError(f"{path} is damaged ({error}); move the run's directory away") from error
    if not rows:
        raise SweepError(f"no run of {sweep.name} has logged a loss under {sweep.runs_dir}; launch it first")
    return pd.DataFrame(rows)
