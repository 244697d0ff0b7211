"""What becomes of a run when one of its processes is killed? Each process, at each moment, with real launches.

`python tests/experiments/kills.py FOLDER [CELL ...]` launches a tiny run again and again, sends SIGKILL to one process
at one moment, and prints a line per cell: seconds until the launcher has recorded it, seconds until the run was
finished by the same launch or by the next one, or the sentence that the launch ended with. Weights and rows must equal
those of a run that nobody disturbed. A cell is named RANKS-WORKERS-MOMENT-VICTIM, as in `2-0-save-rank1`; by default
all are run.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.torch import load_file
from trainers import rows

from aimscale.harness.data.store.listing import Listing
from aimscale.harness.data.store.pack import pack_images
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.lock import read_holder

MOMENTS = ("start", "train", "save", "evaluate", "probe")
OF_EVALUATION = ("evaluate", "probe")
"""Moments of the program that evaluates the run: its start, and its middle."""
VICTIMS = ("launcher", "parent", "forks", "rank0", "rank1", "server", "worker")
BUDGET = 512
LIMIT_S = 120.0


def cells() -> Iterator[str]:
    """Names of all cells that there are."""
    for ranks, workers, moment, victim in itertools.product((1, 2), (0, 2), MOMENTS, VICTIMS):
        has_victim = {"parent": ranks == 2, "forks": ranks == 1, "rank1": ranks == 2} | dict.fromkeys(
            ("server", "worker"), workers
        )
        if has_victim.get(victim, True) and (moment not in OF_EVALUATION or victim not in ("server", "worker")):
            yield f"{ranks}-{workers}-{moment}-{victim}"


def write_data(folder: Path) -> None:
    """Pack random pictures."""
    rng = np.random.default_rng(0)
    for name, number, classes in (("train", 128, None), ("held", 32, None), ("fit", 64, 2), ("test", 32, 2)):
        if not (folder / name).exists():
            pixels = rng.integers(0, 255, (number, 16, 16, 3), dtype=np.uint8)
            labels = None if classes is None else [i % classes for i in range(number)]
            names = None if classes is None else ("left", "right")
            pack_images(Listing(source=folder, images=pixels, labels=labels, classes=names), folder / name)


def write_sweep(folder: Path, ranks: int, workers: int) -> Path:
    """Write a sweep of one run, which saves at every fourth step and probes at its end."""
    probe = {"train": str(folder / "fit"), "test": str(folder / "test"), "kinds": ["attentive"], "iterations": 100}
    sweep = {
        "name": f"kills-{ranks}-{workers}",
        "sizes": ["w16-d2"],
        "budgets": [BUDGET],
        "base": {
            "devices": ranks,
            "model": {"image_size": 16, "patch_size": 4},
            "data": {"sources": [{"path": str(folder / "train")}]},
            "optimiser": {"batch_size": 8, "precision": "fp32"},
            "schedule": {"warmup_images": 16},
            "validation": {"path": str(folder / "held"), "centre_crop": 1.0},
            "probes": [{"task": "sides", "lrs": [0.01], "batch_size": 16, "centre_crop": 1.0} | probe],
            "runtime": {"num_workers": workers, "checkpoint_every_images": 32, "log_every_steps": 1, "device": "cpu"},
        },
    }
    path = folder / f"{sweep['name']}.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


def launch(sweep: Path, root: Path, ranks: int, log: Path) -> subprocess.Popen[bytes]:
    """Start `aimscale launch`."""
    words = ["launch", str(sweep), "--root", str(root), "--on", "local", "--devices", str(ranks), "--yes"]
    environment = os.environ | {"AIMSCALE_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "aimscale", *words], stdout=output, stderr=output, env=environment,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip


def processes(run: Path) -> Iterator[tuple[int, int, list[str], dict[str, str]]]:
    """Yield id, parent, words and environment of the live processes that its launch started, the launch included."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            told = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            parent = int((folder / "stat").read_text().rpartition(") ")[2].split()[1])
        except (OSError, ValueError):
            continue
        environment = dict(each.partition("=")[::2] for each in told)
        if environment.get("AIMSCALE_CACHE") == str(run.parents[2] / "cache"):
            yield int(folder.name), parent, words, environment


def find_victim(run: Path, victim: str) -> int | None:
    """Return the id of the process that started a run's ranks or of which they are forks, of a rank, or of its last
    rank's server or loader."""
    found, folder = [*processes(run)], RunDir(run)
    if victim == "forks":
        alike = {pid: parent for pid, parent, words, _ in found if "distributed.preloaded" in str(words)}
        return next((pid for pid, parent in alike.items() if parent not in alike), None)
    holders = [read_holder(lock) for lock in (folder.lock, folder.evaluation.lock)]  # a fork has its server's words
    forks = {holder.pid for holder in holders if holder is not None}
    if victim == "parent":
        return next((pid for pid, _, words, _ in found if "aimscale.harness.distributed.ranks" in words), None)
    ranks = {
        int(environment.get("RANK", "0")): pid
        for pid, _, words, environment in found
        if (str(run) in words or pid in forks) and "aimscale.harness.distributed.ranks" not in words
    }
    if victim.startswith("rank"):
        return ranks.get(int(victim.removeprefix("rank")))
    servers = [
        pid for pid, parent, words, _ in found if ranks and parent == ranks[max(ranks)] and "forkserver" in str(words)
    ]
    if victim == "server":
        return next(iter(servers), None)
    return next((pid for pid, parent, _, _ in found if parent in servers), None)


def is_moment(run: RunDir, moment: str) -> bool:
    """Return whether a run does now what the name says."""
    if moment == "start":
        return run.lock.exists()
    if moment == "evaluate":
        return run.evaluation.lock.exists()
    if moment == "probe":
        return run.evaluation.read_status().phase.startswith("probe")
    if moment == "save":
        return any(run.path.glob(".writer-*/writing-checkpoints-*/part-*"))
    return run.metrics.exists() and run.metrics.read_bytes().count(b"\n") > 5


def until(condition: Callable[[], Any], process: subprocess.Popen[bytes] | None = None) -> Any:
    """Wait for a condition, and return it, or None if the process ends before."""
    deadline = time.monotonic() + 1800
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError("half an hour passed")
        if process is not None and process.poll() is not None:
            return condition() or None
        time.sleep(0.002)
    return found


def outcome(run: RunDir) -> Any:
    """Return the rows and the bytes of the weights."""
    tensors = load_file(run.model_file(BUDGET))
    return rows(run), {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def try_cell(folder: Path, cell: str, whole: Any) -> str:
    """Run one cell, and say what came of it."""
    ranks, workers, moment, victim = cell.split("-")
    sweep, root, log = write_sweep(folder, int(ranks), int(workers)), folder / cell, folder / f"{cell}.log"
    shutil.rmtree(root, ignore_errors=True)
    log.unlink(missing_ok=True)
    process = launch(sweep, root, int(ranks), log)
    path = until(lambda: next(root.glob("*/runs/*/config.yaml"), None), process)
    assert path is not None, log.read_text()
    run = RunDir(path.parent)
    until(lambda: is_moment(run, moment), process)
    pid = process.pid if victim == "launcher" else until(lambda: find_victim(run.path, victim), process)
    attempts = (run.evaluation if moment in OF_EVALUATION else run).path / "attempts.jsonl"
    before = attempts.read_bytes() if attempts.exists() else b""
    os.kill(pid, signal.SIGKILL)
    killed, noticed_s = time.monotonic(), None
    while process.poll() is None:
        if noticed_s is None and attempts.exists() and attempts.read_bytes() != before:
            noticed_s = time.monotonic() - killed
        time.sleep(0.05)
    ended_s, last = time.monotonic() - killed, log.read_text().strip().splitlines()[-1:]
    how = "same launch" if process.returncode == 0 else f"next launch (this one: {process.returncode}, {last})"
    if process.returncode:
        code = launch(sweep, root, int(ranks), log).wait()
        how += "" if code == 0 else f"; that one ended with {code}: {log.read_text().strip().splitlines()[-1]}"
    if run.is_held() or run.evaluation.is_held():  # by ranks that outlived their launcher, which the next left alone
        until(lambda: not run.is_held() and not run.evaluation.is_held())
        how += f", and by ranks that outlived it, {time.monotonic() - killed:.0f} s after the kill"
    is_equal = run.model_file(BUDGET).exists() and outcome(run) == whole
    has_traceback = "Traceback" in log.read_text()
    deadline = time.monotonic() + LIMIT_S
    while (num_left := len([*processes(run.path)])) and time.monotonic() < deadline:
        time.sleep(0.1)
    noticed = "-" if noticed_s is None else f"{noticed_s:.0f} s"
    is_late = " LATE" * ((noticed_s if noticed_s is not None else ended_s) > LIMIT_S)
    return (
        f"noticed after {noticed}{is_late}, ended after {ended_s:.0f} s; finished by {how}; "
        f"{'bitwise equal' if is_equal else 'NOT EQUAL'}{', a TRACEBACK' if has_traceback else ''}"
        f"{f', {num_left} processes LEFT' if num_left else ''}"
    )


def main() -> None:
    """Run the cells."""
    folder, chosen = Path(sys.argv[1]).absolute(), sys.argv[2:] or [*cells()]
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder)
    whole: dict[str, Any] = {}
    for cell in chosen:
        shape = cell[:3]
        if shape not in whole:
            root = folder / f"whole-{shape}"
            ranks, workers = map(int, shape.split("-"))
            sweep = write_sweep(folder, ranks, workers)
            assert launch(sweep, root, ranks, folder / f"whole-{shape}.log").wait() == 0
            (path,) = root.glob("*/runs/*/config.yaml")
            whole[shape] = outcome(RunDir(path.parent))
        print(f"{cell:24} {try_cell(folder, cell, whole[shape])}", flush=True)
    print(json.dumps({"load": os.getloadavg()}))


if __name__ == "__main__":
    main()
