"""Everything that must be measured on a GPU, in one command and one JSON file.

Every part is a command in a process of its own, with a time limit. A part that fails, or for which no time is left, is
recorded as such, and the next one runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

import aimscale
from aimscale.harness.data.store.bundled import write_bundled
from aimscale.harness.log.progress import Bar
from aimscale.harness.run.provenance import git_commit, package_versions

TOTAL_S = 520
"""Time limit of all parts together."""
GRACE_S = 20
"""Seconds that a part has to end its own processes when it is late."""
AIMSCALE = [sys.executable, "-m", "aimscale"]
TESTS = Path(aimscale.__file__).resolve().parents[2] / "tests" / "cuda"
MAX_LINES = 40
"""Number of lines kept of a part's output that is no JSON."""
SIZES = (("aim-600M", 128), ("rung-384", 256), ("rung-128", 512), ("aim-1B", 128))
"""Sizes and batches of the steps timed on one GPU, all but the last also without compilation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Command to run."""

    name: str
    words: list[str]
    """Words of the command."""
    limit_s: int
    """Time limit."""


def parts(folder: Path, *, rehearse: bool) -> Iterator[Part]:
    """Yield the parts to run, the most important first; `rehearse` takes small sizes and the CPU."""
    root = ["--root", str(folder)]
    yield Part(name="doctor", words=[*AIMSCALE, "doctor", *root], limit_s=60)
    # Ignore pyproject's options: plugins such as xdist may be missing.
    pytest = [sys.executable, "-m", "pytest", "-v", "-rfEs", "-o", "addopts=", "--import-mode=importlib", "-m", "cuda"]
    num_gpus, of_ranks = 2 if rehearse else torch.cuda.device_count(), str(TESTS / "test_ranks.py")
    some = [*(["-k", "bytes or cpu"] if rehearse else []), "--ignore", of_ranks, str(TESTS)]
    yield Part(name="tests", words=[*pytest, *some], limit_s=200)
    if num_gpus > 1:
        yield Part(name="tests of 2 ranks", words=[*pytest, of_ranks], limit_s=150)
    steps = [(*each, "auto") for each in SIZES] + [(*each, "false") for each in SIZES[:-1]]
    training = [
        Part(name=f"train {size} {how}", words=AIMSCALE + _step_of(size, batch, rehearse, compile=how), limit_s=120)
        for size, batch, how in ([("w16-d2", 8, "auto")] if rehearse else steps)
    ]
    yield training[0]
    size, batch = ("w16-d2", 4) if rehearse else SIZES[0]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_gpus)]
    for stage in (2, 1) if num_gpus > 1 else ():  # gradients are reduced during the backward pass, and after it
        words = [*launcher, *AIMSCALE[1:], *_step_of(size, num_gpus * batch, rehearse, "bf16", zero_stage=stage)]
        yield Part(name=f"train {size} on {num_gpus}, ZeRO {stage}", words=words, limit_s=150)
    yield from training[1:4]
    sweep = str(_write_sweep(folder, rehearse=rehearse))
    yield Part(name="sweep", words=[*AIMSCALE, "launch", sweep, *root], limit_s=120)
    yield Part(name="status", words=[*AIMSCALE, "status", sweep, *root, "--json"], limit_s=30)
    words = [*AIMSCALE, "bench", "data", "--seconds", "0.5" if rehearse else "4", "--workers", "1"]
    yield Part(name="loader", words=words, limit_s=60)
    yield from training[4:]


def _step_of(size: str, batch: int, rehearse: bool, precision: str = "", **runtime: object) -> list[str]:
    """Return the words of `aimscale` that time a training step."""
    settings: dict[str, object] = {"model.image_size": 224, "model.patch_size": 14, "model.head_rule": "released"}
    settings = {"model.image_size": 16} if rehearse else settings
    settings |= {"runtime.device": "cpu" if rehearse else "cuda"}
    settings |= {f"runtime.{key}": value for key, value in runtime.items()}
    words = ["bench", "train", "--size", size, "--batch", str(batch), "--steps", "2" if rehearse else "10"]
    words += ["--precision", precision or ("fp32" if rehearse else "bf16")]
    return [*words, *(word for key, value in settings.items() for word in ("--set", f"{key}={value}"))]


def run(out: Path, *, rehearse: bool = False) -> dict[str, Any]:
    """Run all parts and write `gpu.json` into `out`: the setting, and command, seconds, result and problem of each."""
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    commit, is_dirty = git_commit()
    setting = {"git_commit": commit, "git_dirty": is_dirty, "packages": package_versions(), "rehearsal": rehearse}
    done: dict[str, Any] = {"setting": setting, "parts": {}}
    patience = 10 if rehearse else 1  # a rehearsal may meet a busy machine
    with tempfile.TemporaryDirectory() as folder, Bar() as bar:
        planned = list(parts(Path(folder), rehearse=rehearse))
        for number, part in enumerate(planned):
            bar(part.name, number, len(planned), "parts")
            left_s = patience * TOTAL_S - (time.monotonic() - started)
            outcome = _execute(part, min(patience * part.limit_s, left_s), rehearse)
            done["parts"][part.name] = outcome
            bar.say(f"{part.name}: {outcome['problem'] or 'done'}, {outcome['seconds']:.0f} s")
            done["seconds"] = time.monotonic() - started
            (out / "gpu.json").write_text(json.dumps(done, indent=1))  # now: the process may end without warning
    return done


def _execute(part: Part, limit_s: float, rehearse: bool) -> dict[str, Any]:
    """Run a part within its time limit, and return its result."""
    outcome: dict[str, Any] = {"command": part.words, "seconds": 0.0, "result": None, "problem": "no time was left"}
    if limit_s < 5:
        return outcome
    env = os.environ | ({"AIMSCALE_TEST_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"} if rehearse else {})
    started, problem = time.monotonic(), ""
    process = subprocess.Popen(part.words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        problem = f"not done after {limit_s:.0f} s"
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()  # a launch then ends its runs, which would hold the GPU
        try:
            out, err = process.communicate(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            for child in children:  # they may outlive it, and hold the pipes that are read here
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            out, err = process.communicate()
    lines = out.strip().splitlines()
    if process.returncode and not problem:
        problem = f"exit code {process.returncode}: {(err.strip().splitlines() or lines or [''])[-1]}"
    try:
        result = json.loads(out[min(i for i in map(out.find, "[{") if i >= 0) :])
    except ValueError:
        result = lines[-MAX_LINES:]
    return outcome | {"seconds": time.monotonic() - started, "result": result, "problem": problem}


def _write_sweep(folder: Path, *, rehearse: bool) -> Path:
    """Write a sweep of one size and two budgets on the bundled images."""
    write_bundled(folder / "data")
    size, batch, budgets = ("w16-d2", 16, [64, 128]) if rehearse else ("rung-128", 256, [25_600, 51_200])
    path = folder / "gpu.yaml"
    values = {
        "name": "gpu",
        "sizes": [size],
        "budgets": budgets,
        "base": {
            "model": {"image_size": 32, "patch_size": 4},
            "data": {"sources": [{"path": "data/photographs-pretrain"}], "color_jitter": True},
            "optimiser": {"batch_size": batch, "precision": "fp32" if rehearse else "bf16"},
            "schedule": {"warmup_images": budgets[0] // 4},
            "validation": {
                "path": "data/photographs-validation",
                "num_images": 64,
                "num_prefixes": 1,
                "centre_crop": 1.0,
            },
            "runtime": {"device": "cpu" if rehearse else "cuda", "log_every_steps": 4},
        },
    }
    path.write_text(yaml.safe_dump(values))
    return path
