"""Faults tried on real processes: disturb a small sweep (`sweeps.bench.disturb`), and compare what comes of it.

Every trial disturbs a fresh sweep, or a fresh copy of a trained one, finishes it by the same command that began it, and
must end with the undisturbed one's metric lines, rows, weights, losses, probes, tables and shards, to the byte.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from aimscale.aim.errors import UserError
from aimscale.aim.machine import cpu_name
from aimscale.harness.data.store.pack import PackedImage, encode, write_dataset
from aimscale.harness.run.provenance import git_commit
from aimscale.sweeps.bench.disturb import CROWD, FAULTS, IMAGES, PACKED, PATIENCE_S, Disturbed, Fault, Victim
from aimscale.sweeps.plan.sweepfile import Sweep, load_sweep

TIMING = {"wall_s", "device_hours", "images_per_s", "mfu", "finished_at", "git_commit"}
"""Columns of a row in which two executions may differ."""
SWEEP_NAME = "faults.yaml"
MAX_STARTS = 30
COMMANDS: tuple[Victim, ...] = ("collect", "pack")
"""Victims that are one process."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One disturbed sweep."""

    fault: str
    moments: list[str] = field(default_factory=list)
    """What the victim was doing each time."""
    num_kills: int
    """SIGKILLs that met a living process."""
    problems: list[str] = field(default_factory=list)
    """How it differs from the undisturbed sweep; none where all is well."""
    seconds: float
    """From the first start to the end."""


def run(
    folder: Path, *, rounds: int, seed: int = 0, report: Callable[[Trial], None] = lambda trial: None
) -> dict[str, Any]:
    """Try every fault in each round, crowds twice.

    Args:
        folder: empty, on a local disk; what is wrong stays there to be looked at.

    Returns:
        `trials` (see `Trial`) and `setting`.
    """
    draw = random.Random(seed)
    _write_data(folder)
    trained = {number: _disturbed(folder, f"undisturbed-{number}", "training", draw, number) for number in (1, 3)}
    for whole in trained.values():
        _finish(whole)
    expected = {("training", number): _outcome(whole) for number, whole in trained.items()}
    victims: dict[Victim, float] = {"training": _worked_s(trained[1])}
    for victim in ("evaluation", "probes", *COMMANDS):
        whole = _disturbed(folder, f"undisturbed-{victim}", victim, draw, 1, trained[1])
        started = time.monotonic()
        _finish(whole)
        victims[victim] = time.monotonic() - started if victim in COMMANDS else _worked_s(whole)
        expected[victim, 1] = _outcome(whole)
        if victim not in COMMANDS and (differ := _differences(expected["training", 1], expected[victim, 1])):
            raise UserError(f"undisturbed {victim} give other results than training with them: {', '.join(differ)}")
    done: list[Trial] = []
    for fault in [each for each in FAULTS for _ in range(each.times)] * rounds:
        name = f"{len(done)}-{fault.name.replace(' ', '-')}"
        disturbed = _disturbed(folder, name, fault.victim, draw, fault.num_runs, trained[1])
        disturbed.work_s = victims[fault.victim]
        done.append(_try(fault, disturbed, expected[fault.victim, fault.num_runs]))
        report(done[-1])
        if not done[-1].problems:
            shutil.rmtree(disturbed.root)
    commit, is_dirty = git_commit()
    setting = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "git_commit": commit, "git_dirty": is_dirty}
    return {"trials": [asdict(trial) for trial in done], "setting": {**setting, "seed": seed}}


def _try(fault: Fault, disturbed: Disturbed, expected: dict[str, Any]) -> Trial:
    started = time.monotonic()
    try:
        fault.act(disturbed)
        num_starts = _finish(disturbed)
        problems = _differences(expected, _outcome(disturbed))
        if fault.name == CROWD:
            problems += _executed_twice(disturbed, num_starts)
    except (UserError, subprocess.TimeoutExpired) as error:
        problems = [str(error)]
    return Trial(
        fault=fault.name,
        moments=disturbed.moments,
        num_kills=disturbed.num_kills,
        problems=problems,
        seconds=time.monotonic() - started,
    )


def _write_data(folder: Path) -> None:
    """Smooth random pictures of 16 px: a pool, a validation set, a task of two classes, and files to be packed."""
    draw = torch.Generator().manual_seed(0)

    def pictures(number: int, *, labelled: bool = False) -> Iterator[PackedImage]:
        for index in range(number):
            coarse = torch.randint(0, 256, (1, 3, 4, 4), generator=draw).float()
            smooth = torch.nn.functional.interpolate(coarse, size=16, mode="bicubic").clamp(0, 255)
            label = index % 2 if labelled else None
            extension, data = encode((smooth[0] // (1 + (label or 0))).to(torch.uint8))
            yield PackedImage(f"{index:05d}", extension, data, label)

    (folder / IMAGES).mkdir(parents=True)
    for picture in pictures(2000):
        (folder / IMAGES / f"{picture.key}.{picture.extension}").write_bytes(picture.data)
    for name, number in (("pool", 64), ("validation", 16)):
        write_dataset(folder / "data" / name, pictures(number))
    for name, number in (("task-train", 48), ("task-test", 24)):
        write_dataset(folder / "data" / name, pictures(number, labelled=True), classes=("dark", "light"))


def _sweep(folder: Path, name: str, num_runs: int) -> Sweep:
    task = {"task": "dark", "train": "data/task-train", "test": "data/task-test", "epochs": 4, "batch_size": 16}
    values = {
        "name": "faults",
        "sizes": ["w16-d2"],
        "budgets": [512, 1024],
        "seeds": list(range(num_runs)),
        "base": {
            "model": {"image_size": 16, "patch_size": 4},
            "data": {"sources": [{"path": "data/pool"}]},
            "optimiser": {"batch_size": 8, "precision": "fp32"},
            "schedule": {"warmup_images": 64},
            "validation": {"path": "data/validation", "num_prefixes": 2},
            "probes": [task],
            "runtime": {"checkpoint_every_images": 104, "log_every_steps": 3, "device": "cpu", "num_threads": 1},
        },
    }
    path = folder / f"{num_runs}-{SWEEP_NAME}"
    path.write_text(yaml.safe_dump(values))
    return load_sweep(path, folder / name)


def _disturbed(
    folder: Path, name: str, victim: Victim, draw: random.Random, num_runs: int, trained: Disturbed | None = None
) -> Disturbed:
    """A sweep to be disturbed; what comes after training gets a copy of a trained one without what it is to make."""
    disturbed = Disturbed(sweep=_sweep(folder, name, num_runs), victim=victim, random=draw)
    if trained is None or victim in ("training", "pack"):
        return disturbed
    shutil.copytree(trained.root, disturbed.root)
    for run in disturbed.runs if victim != "collect" else ():
        shutil.rmtree(run.path / "probes")
        if victim == "probes":
            for row in run.read_rows():
                run.record_row({**row, "probes": []})
        else:
            for made in (run.path / "validation", run.path / "completions"):
                shutil.rmtree(made)
            run.results.unlink()
    return disturbed


def _finish(disturbed: Disturbed) -> int:
    """Start the command until its work is done, as a user would; the number of starts that took.

    Raises:
        UserError: it does not end.
    """
    for number in range(MAX_STARTS):
        if _is_finished(disturbed, number):
            return number
        if any(job.checked_status().state == "failed" for job in disturbed.jobs):
            disturbed.start("retry").wait(PATIENCE_S)
        disturbed.start().wait(PATIENCE_S)
        while any(job.is_held() for job in disturbed.jobs):
            time.sleep(0.2)  # a worker that outlived its launcher
    raise UserError(f"{disturbed.root} is not finished after {MAX_STARTS} starts")


def _is_finished(disturbed: Disturbed, num_starts: int) -> bool:
    if disturbed.victim == "pack":
        return (disturbed.root / PACKED).is_dir()
    if disturbed.victim == "collect":
        return num_starts > 0
    return all(job.checked_status().state == "finished" for job in disturbed.jobs)


def _worked_s(disturbed: Disturbed) -> float:
    status = disturbed.jobs[0].checked_status()
    return (status.heartbeat or 0.0) - (status.started or 0.0)


def _outcome(disturbed: Disturbed) -> dict[str, Any]:
    """What must be equal, by file or column."""
    if disturbed.victim in COMMANDS:
        where = disturbed.root / PACKED if disturbed.victim == "pack" else disturbed.sweep.directory
        found: dict[str, Any] = {path.name: path.read_bytes() for path in where.glob("*.*")}
        left = [path.name for folder in (where, where.parent) for path in folder.glob(".*")]
        return found | {"files left behind": sorted(name for name in left if not name.endswith(".lock"))}
    found = {}
    for record in disturbed.runs:
        rows = [{name: value for name, value in row.items() if name not in TIMING} for row in record.read_rows()]
        found[f"{record.path.name}: rows"] = json.dumps(rows, sort_keys=True)
        found[f"{record.path.name}: metrics.jsonl"] = record.metrics.read_bytes()
        for path in sorted(record.path.glob("budgets/*/*.safetensors")):
            found[f"{record.path.name}: {path.relative_to(record.path)}"] = path.read_bytes()
        for path in sorted(record.path.glob("validation/*.npz")):
            with np.load(path) as arrays:
                found[f"{record.path.name}: validation/{path.name}"] = {name: arrays[name].tobytes() for name in arrays}
        left = [path.name for path in record.path.rglob(".*") if not path.name.endswith(".lock")]
        found[f"{record.path.name}: files left behind"] = sorted(left)
    return found


def _differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    return [f"{name} differs" for name in sorted(expected | found) if expected.get(name) != found.get(name)]


def _executed_twice(disturbed: Disturbed, num_starts: int) -> list[str]:
    """Runs of which more than one attempt ended, although none was disturbed."""
    counts = Counter({record.path.name: len(record.read_attempts()) for record in disturbed.runs})
    problems = [f"{name} was executed {count} times" for name, count in counts.items() if count != 1]
    return problems + [f"the crowd left {num_starts} launches to do"] * (num_starts > 0)


def table(trials: Sequence[dict[str, Any]]) -> str:
    """A line for every fault."""
    lines = [f"{'fault':<42} trials  as undisturbed  SIGKILLs  median s  while"]
    total = Counter[str]()
    for name in dict.fromkeys(trial["fault"] for trial in trials):
        mine = [trial for trial in trials if trial["fault"] == name]
        good, kills = sum(not trial["problems"] for trial in mine), sum(trial["num_kills"] for trial in mine)
        moments = Counter(moment for trial in mine for moment in trial["moments"])
        during = ", ".join(f"{moment} {count}" for moment, count in moments.most_common())
        seconds = float(np.median([trial["seconds"] for trial in mine]))
        lines.append(f"{name:<42} {len(mine):>6}  {good:>14}  {kills:>8}  {seconds:>8.0f}  {during}")
        total.update(trials=len(mine), good=good, kills=kills)
    lines.append(f"{'all':<42} {total['trials']:>6}  {total['good']:>14}  {total['kills']:>8}")
    lines += [f"{trial['fault']}: {problem}" for trial in trials for problem in trial["problems"]]
    return "\n".join(lines)
