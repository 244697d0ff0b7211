"""Do sound runs stay on their forecast, and are faults seen? Real runs on CIFAR-10 and photographs, and with faults.

    python tests/experiments/on_track.py OUT --cifar FOLDER_OF_JPEGS > on_track.md

packs the images, launches two sweeps of six sizes over 48 times in FLOPs (30 runs), trains ten of the runs again with
each of six faults from half way on (`faulty_runs`), and prints the tables of docs/forecasts.md: some 70 minutes of one
core. What is in OUT already is not made again; `--only-tables` prints what is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faulty_runs
import numpy as np
import pandas as pd

from aimscale.analysis import trajectory
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.expected import Expected
from aimscale.sweeps.engine.forecasts import PERSISTENT, expected_losses, points, scan
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.run import Run
from aimscale.sweeps.planning.sweepfile import load_sweep

SWEEP = """
name: ontrack-{kind}
recipe: small
sizes: [w16-d2-h4, w24-d2-h4, w36-d2-h4, w56-d2-h4, w84-d2-h4, w128-d2-h4]
budgets: [32768, 65536]
seeds: [0, 1, 2]
base:
  model: {{image_size: 32, patch_size: 8}}
  lr_multiplier: 1.4
  optimiser: {{batch_size: 32}}
  schedule: {{warmup_images: 2048, decay_fraction: 0.1}}
  runtime: {{log_every_steps: 64}}
  data: {{sources: [{{path: {train}}}]}}
  validation: {{path: {validation}, num_images: 1000, num_prefixes: 2, centre_crop: 1.0, every_images: 2048}}
exclude:
  - {{size: w84-d2-h4, seed: 2}}
  - {{size: w128-d2-h4, seed: [1, 2]}}
cost: {{device: CPU core, peak_tflops: 0.12, mfu: 0.5, memory_gb: 8}}
"""
DATA = {
    "cifar": ("data/cifar-pretrain", "data/cifar-validation"),
    "photographs": ("data/bundled/photographs-pretrain", "data/bundled/photographs-validation"),
}
FAULTY = ("w36-d2-h4_uall_s0", "w36-d2-h4_uall_s1", "w56-d2-h4_uall_s0", "w56-d2-h4_uall_s1", "w84-d2-h4_uall_s0")
"""Runs that are trained with faults, of each kind of images."""
NEAR = 5.0
"""A run of fewer times the largest N of its forecast counts as "3 times", others as "10 times"."""
MIN_POINTS = 14
"""Number of points from which a run counts as there."""
LAST = 6
"""Number of last points over which what a fault costs is averaged."""

Runs = list[tuple[Run, pd.DataFrame]]
"""Runs with their points."""


def train(out: Path, cifar: Path) -> None:
    """Pack the images, launch the sweeps, and train runs with faults."""
    command = [sys.executable, "-m", "aimscale"]
    for folder, words in (
        ("data/cifar-pretrain", [cifar, "data/cifar-pretrain", "--images", "0:45000", "--shard-mb", "4"]),
        ("data/cifar-validation", [cifar, "data/cifar-validation", "--images", "48500:50000"]),
        ("data/bundled", ["--bundled", "data/bundled"]),
    ):
        if not (out / folder).exists():
            subprocess.run([*command, "data", "pack", *map(str, words)], cwd=out, check=True, stdout=sys.stderr)
    for kind, (images, validation) in DATA.items():
        (out / f"{kind}.yaml").write_text(SWEEP.format(kind=kind, train=images, validation=validation))
        launch = ["launch", f"{kind}.yaml", "--on", "local", "--devices", "1", "--root", "runs"]
        subprocess.run([*command, *launch], cwd=out, check=True, stdout=sys.stderr)
    for kind in DATA:
        sweep, other = load_sweep(out / f"{kind}.yaml", out / "runs"), DATA[next(each for each in DATA if each != kind)]
        for run in (run for run in plan(sweep) if run.run_id.startswith(FAULTY)):
            words = [str(sweep.run_dir(run.run_id)), str(out / "faults" / kind / run.run_id), "--other", other[0]]
            subprocess.run([sys.executable, faulty_runs.__file__, *words], cwd=out, check=True, stdout=sys.stderr)


def finished(out: Path, kind: str) -> Runs:
    """Return the runs of a sweep that have finished, with their points."""
    sweep = load_sweep(out / f"{kind}.yaml", out / "runs")
    rows = [(run, pd.DataFrame(points(sweep, run))) for run in plan(sweep)]
    return [(run, each[each["images_seen"] <= run.budgets[-1]]) for run, each in rows if len(each) > MIN_POINTS]


def forecasts(runs: Runs) -> Iterator[tuple[Run, pd.DataFrame, float, pd.DataFrame]]:
    """Yield each run with its points, how many times the largest N of smaller runs it has, and their points: those of
    all seeds, and of its own seed alone, as most sweeps have."""
    for run, rows in runs:
        for largest in sorted({each.num_params for each, _ in runs if each.num_params < run.num_params}):
            chosen = [(each, points) for each, points in runs if each.num_params <= largest]
            own = [(each, points) for each, points in chosen if each.cell["seed"] == run.cell["seed"]]
            sizes, own_sizes = ({each.cell["size"] for each, _ in some} for some in (chosen, own))
            for some in (chosen, own) if sizes == own_sizes else (chosen,):
                if len(sizes) > 1:
                    yield run, rows, run.num_params / largest, pd.concat([points for _, points in some])


def watched(expected: Expected, losses: dict[int, float]) -> tuple[float, int | None]:
    """Return the largest deviation of a run at any of its points, and the images seen at its first alarm, if any."""
    points = tuple(point for point in expected.points if point.images_seen in losses)
    seen = dataclasses.replace(expected, points=points)
    found, _ = scan(seen, np.log([[losses[point.images_seen] / point.loss] for point in points]))
    alarms = [
        point.images_seen
        for number, (point, sd) in enumerate(zip(points, found[:, 0], strict=True))
        if number + 1 >= PERSISTENT and sd > (expected.alarm_sd or np.inf)
    ]
    return float(found.max()), alarms[0] if alarms else None


def coverage(kind: str, runs: Runs) -> Iterator[dict[str, Any]]:
    """Yield, for each forecast, the share of points inside, and whether the sound run raised an alarm."""
    for run, rows, times, reference in forecasts(runs):
        both = rows.merge(trajectory(reference, run.num_params).table, on=["images_seen", "is_budget"])
        inside = both["val_loss"].between(both["low"], both["high"])
        off = np.log(both["val_loss"] / both["loss"])
        during = rows[~rows["is_budget"]]
        largest, alarm = watched(
            expected_losses(reference.to_dict("records"), run.num_params),
            dict(zip(during["images_seen"].tolist(), during["val_loss"].tolist(), strict=True)),
        )
        yield {
            "images": kind,
            "run": run.run_id,
            "distance": "3 times" if times < NEAR else "10 times",
            "num": len(both),
            "inside": inside.sum(),
            "budgets": both["is_budget"].sum(),
            "inside_budgets": inside[both["is_budget"]].sum(),
            "error": off.abs().mean(),
            "width": both["sd"].mean(),
            "largest": largest,
            "alarm": alarm,
        }


def faults(out: Path, kind: str, runs: Runs) -> Iterator[dict[str, Any]]:
    """Yield, for each run with a fault, when the alarm was raised; the forecast follows from all smaller runs."""
    for folder in sorted((out / "faults" / kind).glob("*/*/")):
        name = folder.name.replace("-", " ")
        run = next((run for run, _ in runs if run.run_id == folder.parent.name), None)
        if name not in faulty_runs.FAULTS or run is None:
            continue
        smaller = pd.concat([rows for each, rows in runs if each.num_params < run.num_params])
        losses = {point["images_seen"]: point["val_loss"] for point in RunDir(folder).read_curve()}
        largest, alarm = watched(expected_losses(smaller.to_dict("records"), run.num_params), losses)
        start = faulty_runs.HALF * run.budgets[-1]
        sound = next(rows for each, rows in runs if each is run)
        sound = sound[~sound["is_budget"]].set_index("images_seen")["val_loss"].iloc[-LAST:]
        cost = float(np.mean([np.log(losses[at] / loss) for at, loss in sound.items()]))
        delay = alarm - start if alarm else np.nan
        yield {"images": kind, "fault": name, "delay": delay, "largest": largest, "cost": cost}


def main() -> None:
    """Train what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cifar", type=Path, help="folder of CIFAR-10's training images, a folder a class")
    parser.add_argument("--only-tables", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.only_tables:
        train(options.out.resolve(), options.cifar.resolve())
    runs = {kind: finished(options.out, kind) for kind in DATA}
    sound = pd.DataFrame([row for kind, each in runs.items() for row in coverage(kind, each)])
    broken = pd.DataFrame([row for kind, each in runs.items() for row in faults(options.out, kind, each)])
    by = sound.groupby(["images", "distance"])
    table = by.agg(runs=("run", "nunique"), forecasts=("run", "size"), error=("error", "mean"), sd=("width", "mean"))
    table["inside"] = by["inside"].sum() / by["num"].sum()
    table["budgets inside"] = by["inside_budgets"].sum() / by["budgets"].sum()
    table["alarms"] = by["alarm"].count()
    table["largest"] = by["largest"].max()
    print(table.round(4).to_markdown(), "\n")
    seen = broken.assign(share=broken["delay"] / 65536).groupby(["fault", "images"])
    print(
        seen.agg(
            runs=("delay", "size"),
            seen=("delay", "count"),
            images=("delay", "median"),
            share=("share", "median"),
            largest=("largest", "median"),
            cost=("cost", "median"),
        )
        .round(4)
        .to_markdown()
    )
    whole = {"alarms": int(sound["alarm"].count()), "forecasts": len(sound), "runs": int(sound["run"].nunique())}
    whole |= {
        f"inside {name}": float(each["inside"].sum() / each["num"].sum()) for name, each in sound.groupby("distance")
    }
    print("\n", json.dumps(whole))


if __name__ == "__main__":
    main()
