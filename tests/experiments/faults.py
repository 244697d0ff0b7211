"""Kill, stop and crowd the processes of a small sweep at random moments; each must end as an undisturbed one, bitwise.

    python tests/experiments/faults.py 10    # rounds, each of which tries every fault once

A disturbed sweep is finished by launching again, as a user would; rows, weights, validation losses, completions and
probes are compared, and nothing may be left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.numpy import load_file

from aimscale.harness.data.store.pack import PackedImage, encode, write_dataset
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.lease import read_lease

TIMING = {"wall_s", "device_hours", "images_per_s", "mfu", "finished_at", "git_commit"}
PATIENCE_S, MAX_STARTS = 600.0, 30


def write_data(folder: Path) -> None:
    """Smooth random pictures of 16 px: a pool, a validation set, and a task of two classes."""
    draw = torch.Generator().manual_seed(0)

    def pictures(number: int, *, labelled: bool) -> Iterator[PackedImage]:
        for index in range(number):
            coarse = torch.randint(0, 256, (1, 3, 4, 4), generator=draw).float()
            smooth = torch.nn.functional.interpolate(coarse, size=16, mode="bicubic").clamp(0, 255)
            label = index % 2 if labelled else None
            yield PackedImage(f"{index:05d}", *encode((smooth[0] // (1 + (label or 0))).to(torch.uint8)), label)

    for name, number in (("pool", 64), ("validation", 16)):
        write_dataset(folder / name, pictures(number, labelled=False))
    for name, number in (("train", 48), ("test", 24)):
        write_dataset(folder / name, pictures(number, labelled=True), classes=("dark", "light"))


class Sweep:
    """A sweep in the making, and what is done to it."""

    def __init__(self, folder: Path, name: str, num_runs: int) -> None:
        task = {"task": "dark", "train": "train", "test": "test", "epochs": 4, "batch_size": 16}
        base = {
            "model": {"image_size": 16, "patch_size": 4},
            "data": {"sources": [{"path": "pool"}]},
            "optimiser": {"batch_size": 8, "precision": "fp32"},
            "schedule": {"warmup_images": 64},
            "validation": {"path": "validation", "num_prefixes": 2},
            "probes": [task],
            "runtime": {"checkpoint_every_images": 104, "log_every_steps": 3, "device": "cpu"},
        }
        values = {"name": "faults", "sizes": ["w16-d2"], "budgets": [512, 1024], "seeds": list(range(num_runs))}
        self.file, self.root = folder / f"{num_runs}-runs.yaml", folder / name
        self.file.write_text(yaml.safe_dump(values | {"base": base}))
        self.moments: list[str] = []
        self.work_s = 0.0

    @property
    def runs(self) -> list[RunDir]:
        return [RunDir(path) for path in sorted(self.root.glob("faults/runs/*"))]

    def start(self) -> subprocess.Popen[bytes]:
        self.root.mkdir(exist_ok=True)
        words = [sys.executable, "-m", "aimscale", "launch", str(self.file), "--root", str(self.root)]
        with (self.root / "launch.log").open("ab") as log:
            return subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)

    def wait_for_moment(self, launcher: subprocess.Popen[bytes]) -> int | None:
        """Wait for the trainer and then for a random moment in its work; its process, None where none came."""
        until = time.monotonic() + PATIENCE_S
        while launcher.poll() is None and time.monotonic() < until:
            if self.runs and self.runs[0].is_held() and (holder := read_lease(self.runs[0].lease)):
                time.sleep(random.uniform(0, 0.8 * self.work_s))
                self.moments.append((self.runs[0].read_status().phase or "end").split()[0])
                return holder.pid
            time.sleep(0.02)
        return None

    def finish(self) -> int:
        """Launch until all is done; how often that took."""
        for number in range(MAX_STARTS):
            if self.runs and all(run.read_status().state == "finished" for run in self.runs):
                return number
            self.start().wait(PATIENCE_S)
            while any(run.is_held() for run in self.runs):
                time.sleep(0.2)  # a trainer that outlived its launcher
        raise RuntimeError(f"{self.root} is not finished after {MAX_STARTS} starts")

    def outcome(self) -> dict[str, Any]:
        """What must be equal, by file."""
        found: dict[str, Any] = {}
        for run in self.runs:
            rows = [{key: value for key, value in row.items() if key not in TIMING} for row in run.read_rows()]
            found[f"{run.path.name}: rows"] = json.dumps(rows, sort_keys=True)
            for path in sorted(run.path.rglob("*.safetensors")):
                if "checkpoints" not in path.parts:
                    tensors = load_file(path)
                    name = f"{run.path.name}: {path.relative_to(run.path)}"
                    found[name] = {key: tensors[key].tobytes() for key in sorted(tensors)}
            for path in sorted(run.path.rglob("*.npz")):
                with np.load(path) as arrays:
                    name = f"{run.path.name}: {path.relative_to(run.path)}"
                    found[name] = {key: arrays[key].tobytes() for key in arrays}
            found[f"{run.path.name}: left behind"] = sorted(path.name for path in run.path.rglob(".*"))
        return found


def tell(pid: int | None, number: int) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_trainer_twice(sweep: Sweep) -> None:
    launcher = sweep.start()
    for _ in range(2):
        tell(sweep.wait_for_moment(launcher), signal.SIGKILL)
    launcher.wait(PATIENCE_S)


def kill_in_a_save(sweep: Sweep) -> None:
    launcher = sweep.start()
    pid = sweep.wait_for_moment(launcher)
    while pid is not None and sweep.runs[0].is_held():
        if any(sweep.runs[0].path.glob(".writer-*/writing-checkpoints-*")):
            tell(pid, signal.SIGKILL)
            sweep.moments.append("save")
            break
        time.sleep(0.001)
    launcher.wait(PATIENCE_S)


def kill_launcher(sweep: Sweep) -> int | None:
    launcher = sweep.start()
    pid = sweep.wait_for_moment(launcher)
    launcher.kill()
    launcher.wait()
    return pid


def kill_both(sweep: Sweep) -> None:
    tell(kill_launcher(sweep), signal.SIGKILL)


def close_terminal(sweep: Sweep) -> None:
    launcher = sweep.start()
    sweep.wait_for_moment(launcher)
    tell(launcher.pid, signal.SIGHUP)
    launcher.wait(PATIENCE_S)


def stop_and_continue(sweep: Sweep) -> None:
    launcher = sweep.start()
    pid = sweep.wait_for_moment(launcher)
    tell(pid, signal.SIGSTOP)
    time.sleep(random.uniform(0.1, 3.0))
    tell(pid, signal.SIGCONT)
    launcher.wait(PATIENCE_S)


def crowd(sweep: Sweep) -> None:
    for launcher in [sweep.start() for _ in range(6)]:
        launcher.wait(PATIENCE_S)


ALONE = (kill_trainer_twice, kill_in_a_save, kill_launcher, kill_both, close_terminal, stop_and_continue)
FAULTS: dict[Callable[[Sweep], Any], int] = {**dict.fromkeys(ALONE, 1), crowd: 3}
"""What is done, and to a sweep of how many runs."""


def main(rounds: int) -> int:
    folder, wrong = Path(tempfile.mkdtemp(prefix="faults-")), 0
    write_data(folder)
    undisturbed = {number: Sweep(folder, f"undisturbed-{number}", number) for number in (1, 3)}
    for sweep in undisturbed.values():
        sweep.finish()
    expected = {number: sweep.outcome() for number, sweep in undisturbed.items()}
    status = undisturbed[1].runs[0].read_status()
    for number, (act, num_runs) in enumerate([*FAULTS.items()] * rounds):
        sweep = Sweep(folder, f"{number}-{act.__name__}", num_runs)
        sweep.work_s = (status.heartbeat or 0.0) - (status.started or 0.0)
        started = time.monotonic()
        act(sweep)
        num_starts, found = sweep.finish(), sweep.outcome()
        whole = expected[num_runs]
        problems = [name for name in sorted(whole | found) if whole.get(name) != found.get(name)]
        if act is crowd:
            attempts = Counter(len(run.read_starts()) for run in sweep.runs)
            problems += [f"runs by their starts: {dict(attempts)}"] * (set(attempts) != {1})
        said = f"differs: {', '.join(problems)}" if problems else "as undisturbed"
        print(f"{act.__name__} (while {', '.join(sweep.moments)}): {said}, {num_starts} launches more, "
              f"{time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
        wrong += bool(problems)
        if not problems:
            shutil.rmtree(sweep.root)
    print(f"{wrong} of {len(FAULTS) * rounds} differ; what does is in {folder}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
