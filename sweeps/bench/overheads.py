"""How fast a sweep is planned, looked at and collected, and how soon a command answers, beside the floor of each.

A floor does the least that the answer needs: the plan's validates and hashes the same configurations one by one, the
status's reads and parses the same status files, the command's starts the bare interpreter (with torch, for `train`).
Ours and the floor take turns, and medians count, so that a busy machine slows both alike.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.provenance import cpu_name, git_commit
from aimscale.sweeps.plan.costs import cost_cards
from aimscale.sweeps.plan.planner import Run, plan
from aimscale.sweeps.plan.sweepfile import Sweep, load_sweep
from aimscale.sweeps.runs.claims import RunRecord
from aimscale.sweeps.table.collection import collect
from aimscale.sweeps.table.status import sweep_status

SIZES = ("rung-24", "rung-32", "rung-48", "rung-64", "rung-96")
POOL = 1_000_000


def run(*, num_runs: int = 500, repeats: int = 5) -> dict[str, Any]:
    """Measure a sweep of at least `num_runs` runs, finished ones with two rows each, and the start of commands.

    Returns:
        `rows`: name, seconds of ours, what the floor does, its seconds, and `ratio` (median of turns); `setting`.
    """
    with tempfile.TemporaryDirectory() as folder:
        sweep = _sweep(Path(folder), num_runs)
        runs = plan(sweep)
        cards = cost_cards(sweep, runs)
        plain = [one.config.model_dump(mode="json") for one in runs]
        records = _finish(sweep, runs)
        rows = [
            _compare(
                f"plan of {len(runs)} runs, with cost cards",
                lambda: cost_cards(sweep, plan(sweep)),
                "validating and hashing the same configurations",
                lambda: [RunConfig.model_validate(values).run_id for values in plain],
                repeats,
            ),
            _compare(
                f"status of {len(runs)} runs",
                lambda: sweep_status(sweep, runs, cards),
                "reading and parsing their status.json",
                lambda: [json.loads(record.status.read_text()) for record in records],
                repeats,
            ),
            _compare(
                f"collect of {2 * len(runs)} rows",
                lambda: collect(sweep, runs, cards),
                "reading and parsing their results.json",
                lambda: [json.loads(record.results.read_text()) for record in records],
                repeats,
            ),
        ]
    ours = [sys.executable, "-m", "aimscale"]
    for words, floor in (
        (["--help"], "pass"),
        (["plan", "demo"], "import pydantic, typer, rich, yaml"),
        (["train", "--help"], "pass"),
        (["fit", "--help"], "pass"),
    ):
        rows.append(_compare_commands([*ours, *words], floor, repeats))
    rows.append(
        _compare_commands(
            [sys.executable, "-c", "import aimscale.harness.train.attempt"],
            "import torch",
            repeats,
            "import of the trainer",
        )
    )
    commit, is_dirty = git_commit()
    setting = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "python": sys.version.split()[0]}
    return {"rows": rows, "setting": {**setting, "git_commit": commit, "git_dirty": is_dirty, "repeats": repeats}}


def _sweep(folder: Path, num_runs: int) -> Sweep:
    seeds = list(range(-(-num_runs // (2 * len(SIZES)))))
    values = {
        "name": "bench",
        "sizes": list(SIZES),
        "budgets": [6400, 12800],
        "unique_images": [1000, 2000],
        "seeds": seeds,
        "base": {
            "model": {"image_size": 32, "patch_size": 4},
            "data": {"sources": [{"path": "train"}]},
            "optimiser": {"batch_size": 64},
            "validation": {"path": "validation"},
        },
        "cost": {"pool_images": POOL},
    }
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_sweep(path, folder / "root")


def _finish(sweep: Sweep, runs: Sequence[Run]) -> list[RunRecord]:
    """Run directories as finished runs leave them, without weights."""
    records = []
    for one in runs:
        record = RunRecord(sweep.run_dir(one.run_id))
        RunRecord.create(record.path, one.config)
        for budget in one.budgets:
            record.record_row({"run_id": one.run_id, "images_seen": budget, "val_loss": 0.5, "finished_at": 1.0})
        record.write_status(state="finished", images_seen=max(one.budgets), heartbeat=time.time())
        records.append(record)
    return records


def _compare(name: str, ours: Callable[[], Any], what: str, floor: Callable[[], Any], repeats: int) -> dict[str, Any]:
    ours()  # caches fill
    floor()
    seconds: list[float] = []
    floor_seconds: list[float] = []
    for _ in range(repeats):
        for job, times in ((ours, seconds), (floor, floor_seconds)):
            start = time.perf_counter()
            job()
            times.append(time.perf_counter() - start)
    ratios = [mine / least for mine, least in zip(seconds, floor_seconds, strict=True)]
    return {
        "name": name,
        "seconds": statistics.median(seconds),
        "floor": what,
        "floor_seconds": statistics.median(floor_seconds),
        "ratio": statistics.median(ratios),
    }


def _compare_commands(words: Sequence[str], code: str, repeats: int, name: str = "") -> dict[str, Any]:
    def start(command: Sequence[str]) -> Callable[[], Any]:
        return lambda: subprocess.run(command, check=True, capture_output=True)

    name = name or f"aimscale {' '.join(words[3:])}"
    return _compare(name, start(words), f"python -c '{code}'", start([sys.executable, "-c", code]), repeats)


def table(result: dict[str, Any]) -> str:
    """The result of `run` as lines for a terminal."""
    setting = result["setting"]
    lines = [f"{setting['cpu']}, {setting['cores']} cores, Python {setting['python']}, median of {setting['repeats']}"]
    width = max(len(row["name"]) for row in result["rows"])
    for row in result["rows"]:
        floor = f"{1e3 * row['floor_seconds']:8.0f} ms {row['floor']}"
        lines.append(f"{row['name']:<{width}}  {1e3 * row['seconds']:8.0f} ms  {row['ratio']:6.2f} x {floor}")
    return "\n".join(lines)
