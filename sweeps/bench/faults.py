"""Faults tried on real processes: kill, stop and crowd the processes of a small sweep, and compare what comes of it.

Every trial disturbs a fresh sweep of one or a few runs at random moments, finishes it by the same command that began
it, and must end with the undisturbed sweep's metric lines, rows, weights, losses and probes, to the byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
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
from aimscale.harness.data.store.pack import PackedImage, encode, write_dataset
from aimscale.harness.run.provenance import cpu_name, git_commit
from aimscale.sweeps.plan.planner import plan
from aimscale.sweeps.plan.sweepfile import Sweep, load_sweep
from aimscale.sweeps.runs.claims import RunRecord

TIMING = {"wall_s", "device_hours", "images_per_s", "mfu", "finished_at", "git_commit"}
"""Columns of a row in which two executions may differ."""
SWEEP_NAME = "faults.yaml"
MAX_LAUNCHES = 30
PATIENCE_S = 600.0
"""A sweep of this size that has not ended by then hangs."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One disturbed sweep."""

    fault: str
    """What was done to it."""
    moments: list[str] = field(default_factory=list)
    """What the run was doing each time."""
    problems: list[str] = field(default_factory=list)
    """How it differs from the undisturbed sweep; none where all is well."""
    seconds: float
    """From the first launch to the end."""


@dataclass(kw_only=True)
class _Disturbed:
    """A sweep in the making, and what may be done to it."""

    sweep: Sweep
    random: random.Random
    work_s: float
    """How long one run takes from its lease to its end."""
    moments: list[str] = field(default_factory=list)

    @property
    def records(self) -> list[RunRecord]:
        return [RunRecord(self.sweep.run_dir(run.run_id)) for run in plan(self.sweep)]

    def start(self, verb: str = "launch") -> subprocess.Popen[bytes]:
        root = self.sweep.directory.parent
        root.mkdir(exist_ok=True)
        words = [sys.executable, "-m", "aimscale", verb, str(self.sweep.base_dir / SWEEP_NAME), "--root", str(root)]
        with (root / f"{verb}.log").open("ab") as log:
            return subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)

    def wait_for_work(self, launcher: subprocess.Popen[bytes]) -> int | None:
        """Wait for a trainer, and then for a random moment of its work; None where the sweep ended before."""
        (record,) = self.records
        until = time.monotonic() + PATIENCE_S
        while (holder := record.read_holder()) is None or not record.is_held():
            if launcher.poll() is not None or time.monotonic() > until:
                return None
            time.sleep(0.02)
        time.sleep(self.random.uniform(0, 0.9 * self.work_s))
        self.moments.append(record.checked_status().phase or "end")
        return holder.pid


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _kill_trainer(disturbed: _Disturbed) -> None:
    launcher = disturbed.start()
    for _ in range(2):
        pid = disturbed.wait_for_work(launcher)
        if pid is not None:
            _signal(pid, signal.SIGKILL)
    launcher.wait(PATIENCE_S)


def _kill_launcher(disturbed: _Disturbed) -> None:
    launcher = disturbed.start()
    disturbed.wait_for_work(launcher)
    launcher.kill()
    launcher.wait()


def _kill_both(disturbed: _Disturbed) -> None:
    launcher = disturbed.start()
    pid = disturbed.wait_for_work(launcher)
    launcher.kill()
    launcher.wait()
    if pid is not None:
        _signal(pid, signal.SIGKILL)


def _close_terminal(disturbed: _Disturbed) -> None:
    launcher = disturbed.start()
    disturbed.wait_for_work(launcher)
    _signal(launcher.pid, signal.SIGHUP)
    launcher.wait(PATIENCE_S)


def _stop_and_continue(disturbed: _Disturbed) -> None:
    launcher = disturbed.start()
    pid = disturbed.wait_for_work(launcher)
    if pid is not None:
        _signal(pid, signal.SIGSTOP)
        time.sleep(disturbed.random.uniform(0.1, 3.0))
        _signal(pid, signal.SIGCONT)
    launcher.wait(PATIENCE_S)


def _crowd(disturbed: _Disturbed) -> None:
    crowd = [disturbed.start(verb) for verb in ("launch", "work") * 3]
    for process in crowd:
        process.wait(PATIENCE_S)
    disturbed.moments.append("start")


def _kill_collect(disturbed: _Disturbed) -> None:
    disturbed.start().wait(PATIENCE_S)
    for _ in range(3):
        collect = disturbed.start("collect")
        time.sleep(disturbed.random.uniform(0, 3.0))
        collect.kill()
        collect.wait()
    if disturbed.start("collect").wait(PATIENCE_S):
        raise UserError(f"collect fails after it was killed, see {disturbed.sweep.directory.parent / 'collect.log'}")
    disturbed.moments.append("collect")


FAULTS: dict[str, tuple[Callable[[_Disturbed], None], str, int]] = {
    "kill the trainer, twice": (_kill_trainer, "trainer", 1),
    "kill the launcher": (_kill_launcher, "launcher", 1),
    "kill launcher and trainer": (_kill_both, "both", 1),
    "close the terminal": (_close_terminal, "terminal", 1),
    "stop the trainer, go on": (_stop_and_continue, "stopped", 1),
    "three launches and three workers at once": (_crowd, "crowd", 3),
    "kill collect, three times": (_kill_collect, "collect", 1),
}
"""Name -> what does it, the name of its folder, runs of its sweep."""


def run(
    folder: Path, *, trials: int, seed: int = 0, report: Callable[[Trial], None] = lambda trial: None
) -> dict[str, Any]:
    """Try every fault `trials` times, in turns.

    Args:
        folder: empty, on a local disk; what is wrong stays there to be looked at.
        trials: of each fault.
        seed: of the moments.
        report: called after every trial.

    Returns:
        `trials` (see `Trial`) and `setting`.
    """
    draw = random.Random(seed)
    _write_data(folder / "data")
    expected, work_s = {}, 0.0
    for num_runs in sorted({num_runs for _, _, num_runs in FAULTS.values()}):
        whole = _Disturbed(sweep=_sweep(folder, f"undisturbed-{num_runs}", num_runs), random=draw, work_s=0.0)
        for _ in _finish(whole):
            pass
        expected[num_runs] = _outcome(whole)
        (status, *_) = [record.checked_status() for record in whole.records]
        work_s = (status.heartbeat or 0.0) - (status.started or 0.0)
    done = []
    for number in range(trials):
        for name, (fault, short, num_runs) in FAULTS.items():
            sweep = _sweep(folder, f"{short}-{number}", num_runs)
            disturbed = _Disturbed(sweep=sweep, random=draw, work_s=work_s)
            started = time.monotonic()
            problems = []
            try:
                fault(disturbed)
                num_launches = sum(1 for _ in _finish(disturbed))
                problems = _differences(expected[num_runs], _outcome(disturbed))
                if fault is _crowd:
                    problems += _executed_twice(disturbed, num_launches)
            except (UserError, subprocess.TimeoutExpired) as error:
                problems.append(str(error))
            seconds = time.monotonic() - started
            done.append(Trial(fault=name, moments=disturbed.moments, problems=problems, seconds=seconds))
            report(done[-1])
    commit, is_dirty = git_commit()
    setting = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "git_commit": commit, "git_dirty": is_dirty}
    return {"trials": [asdict(trial) for trial in done], "setting": {**setting, "seed": seed}}


def _write_data(folder: Path) -> None:
    """Smooth random pictures of 16 px: a pool, a validation set, and a task of two classes."""
    draw = torch.Generator().manual_seed(0)

    def pictures(number: int, *, labelled: bool) -> Iterator[PackedImage]:
        for index in range(number):
            coarse = torch.randint(0, 256, (1, 3, 4, 4), generator=draw).float()
            smooth = torch.nn.functional.interpolate(coarse, size=16, mode="bicubic").clamp(0, 255)
            label = index % 2 if labelled else None
            extension, data = encode((smooth[0] // (1 + (label or 0))).to(torch.uint8))
            yield PackedImage(f"{index:05d}", extension, data, label)

    folder.mkdir(parents=True)
    for name, number in (("pool", 64), ("validation", 16)):
        write_dataset(folder / name, pictures(number, labelled=False))
    for name, number in (("task-train", 48), ("task-test", 24)):
        write_dataset(folder / name, pictures(number, labelled=True), classes=("dark", "light"))


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
    path = folder / SWEEP_NAME
    path.write_text(yaml.safe_dump(values))
    return load_sweep(path, folder / name)


def _finish(disturbed: _Disturbed) -> Iterator[int]:
    """Launch until the sweep is finished, as a user would; yields at every launch.

    Raises:
        UserError: it does not end.
    """
    for number in range(MAX_LAUNCHES):
        states = [record.checked_status().state for record in disturbed.records]
        if all(state == "finished" for state in states):
            return
        yield number
        if "failed" in states:
            disturbed.start("retry").wait(PATIENCE_S)
        disturbed.start().wait(PATIENCE_S)
        while any(record.is_held() for record in disturbed.records):
            time.sleep(0.2)  # a trainer that outlived its launcher
    raise UserError(f"{disturbed.sweep.directory} is not finished after {MAX_LAUNCHES} launches")


def _outcome(disturbed: _Disturbed) -> dict[str, Any]:
    """What must be equal, by file or column."""
    found: dict[str, Any] = {}
    for record in disturbed.records:
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


def _executed_twice(disturbed: _Disturbed, num_launches: int) -> list[str]:
    """Runs of which more than one attempt ended, although none was disturbed."""
    counts = Counter({record.path.name: len(record.read_attempts()) for record in disturbed.records})
    problems = [f"{name} was executed {count} times" for name, count in counts.items() if count != 1]
    return problems + [f"the crowd left {num_launches} launches to do"] * (num_launches > 0)


def table(trials: Sequence[dict[str, Any]]) -> str:
    """A line for every fault."""
    lines = [f"{'fault':<42} trials  as undisturbed  median s  while"]
    for name in FAULTS:
        mine = [trial for trial in trials if trial["fault"] == name]
        good = sum(not trial["problems"] for trial in mine)
        moments = Counter(moment for trial in mine for moment in trial["moments"])
        during = ", ".join(f"{moment} {count}" for moment, count in moments.most_common())
        seconds = float(np.median([trial["seconds"] for trial in mine])) if mine else 0.0
        lines.append(f"{name:<42} {len(mine):>6}  {good:>14}  {seconds:>8.0f}  {during}")
    lines += [f"{trial['fault']}: {problem}" for trial in trials for problem in trial["problems"]]
    return "\n".join(lines)
