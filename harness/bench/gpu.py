"""Everything that must be measured on a GPU, in one command and one JSON file.

Every part is a command in a process of its own, with a time limit. A part that fails, or for which no time is left, is
recorded as such, and the next one runs.
"""

from __future__ import annotations

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
SHAPE = {"image_size": 224, "patch_size": 14, "head_rule": "released"}
"""Geometry of the models trained on a GPU."""
TRAINING = (
    ("aim-600M", 128, "auto"),
    ("rung-384", 256, "auto"),
    ("rung-128", 512, "auto"),
    ("aim-1B", 128, "auto"),
    ("aim-600M", 128, "false"),
    ("rung-384", 256, "false"),
    ("rung-128", 512, "false"),
)
"""Size, batch, `runtime.compile`."""


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
    yield Part(name="doctor", words=[*AIMSCALE, "doctor", "--root", str(folder)], limit_s=60)
    # Ignore pyproject's options: plugins such as xdist may be missing.
    pytest = [sys.executable, "-m", "pytest", "-v", "-rfEs", "-o", "addopts=", "--import-mode=importlib", "-m", "cuda"]
    yield Part(name="tests", words=[*pytest, *(["-k", "bytes or cpu"] if rehearse else []), str(TESTS)], limit_s=200)
    training = list(_training(rehearse=rehearse))
    yield training[0]
    num_gpus = 2 if rehearse else torch.cuda.device_count()
    yield from _stages(num_gpus, rehearse=rehearse) if num_gpus > 1 else ()
    yield from training[1:4]
    sweep = _write_sweep(folder, rehearse=rehearse)
    yield Part(name="sweep", words=[*AIMSCALE, "launch", str(sweep), "--root", str(folder)], limit_s=120)
    words = [*AIMSCALE, "status", str(sweep), "--root", str(folder), "--json"]
    yield Part(name="status", words=words, limit_s=30)
    words = [*AIMSCALE, "bench", "data", "--seconds", "0.5" if rehearse else "4", "--workers", "1"]
    yield Part(name="loader", words=words, limit_s=60)
    yield from training[4:]


def _training(*, rehearse: bool) -> Iterator[Part]:
    """Yield every training step to be timed on one GPU."""
    for size, batch, how in [("w16-d2", 8, "auto")] if rehearse else TRAINING:
        words = _step_of(size, batch, "fp32" if rehearse else "bf16", rehearse=rehearse, compile=how)
        yield Part(name=f"train {size} {how}", words=AIMSCALE + words, limit_s=120)


def _stages(num_gpus: int, *, rehearse: bool) -> Iterator[Part]:
    """Yield training steps on all GPUs of this machine, with gradients reduced during the backward pass (ZeRO 2) and
    after it (1)."""
    size, batch = ("w16-d2", 4) if rehearse else ("aim-600M", 128)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_gpus)]
    for stage in (2, 1):
        words = _step_of(size, num_gpus * batch, "bf16", rehearse=rehearse, zero_stage=stage)
        words = [*launcher, *AIMSCALE[1:], *words]
        yield Part(name=f"train {size} on {num_gpus}, ZeRO {stage}", words=words, limit_s=150)


def _step_of(size: str, batch: int, precision: str, *, rehearse: bool, **runtime: object) -> list[str]:
    """Return the words of `aimscale` that time a training step."""
    settings: dict[str, object] = {"runtime.device": "cpu" if rehearse else "cuda"}
    settings |= {"model.image_size": 16} if rehearse else {f"model.{key}": value for key, value in SHAPE.items()}
    settings |= {f"runtime.{key}": value for key, value in runtime.items()}
    words = ["bench", "train", "--size", size, "--batch", str(batch), "--precision", precision]
    words += ["--steps", "2" if rehearse else "10"]
    return [*words, *(word for key, value in settings.items() for word in ("--set", f"{key}={value}"))]


def run(out: Path, *, rehearse: bool = False) -> dict[str, Any]:
    """Run all parts and write `gpu.json` into `out`.

    Args:
        out: folder, made if need be.

    Returns:
        Contents of `gpu.json`: `setting`, and command, seconds, result and problem of every part.
    """
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
            found = _execute(part, min(patience * part.limit_s, left_s), rehearse)
            done["parts"][part.name] = found
            bar.say(f"{part.name}: {found['problem'] or 'done'}, {found['seconds']:.0f} s")
            done["seconds"] = time.monotonic() - started
            (out / "gpu.json").write_text(json.dumps(done, indent=1))  # now: the process may end without warning
    return done


def _execute(part: Part, limit_s: float, rehearse: bool) -> dict[str, Any]:
    """Run a part within its time limit, and return its result."""
    found: dict[str, Any] = {"command": part.words, "seconds": 0.0, "result": None, "problem": ""}
    if limit_s < 5:
        return found | {"problem": "no time was left"}
    env = os.environ | ({"AIMSCALE_TEST_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"} if rehearse else {})
    started = time.monotonic()
    process = subprocess.Popen(part.words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    is_late = False
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        is_late = True
        process.terminate()  # a launch then ends its runs, which would hold the GPU
        try:
            out, err = process.communicate(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
    lines = out.strip().splitlines()
    if is_late:
        problem = f"not done after {limit_s:.0f} s"
        return found | {"seconds": time.monotonic() - started, "result": lines[-MAX_LINES:], "problem": problem}
    said = err.strip().splitlines() or lines
    problem = "" if process.returncode == 0 else f"exit code {process.returncode}: {(said or [''])[-1]}"
    try:
        result = json.loads(out[min(i for i in map(out.find, "[{") if i >= 0) :])
    except ValueError:
        result = lines[-MAX_LINES:]
    return found | {"seconds": time.monotonic() - started, "result": result, "problem": problem}


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
