"""Probing at scale on one machine: many small images in shards, many classes, one budget, beside the card's forecast.

The same task is probed alone, by two ranks, and by a process that is killed three times; all must give equal numbers.
The images are crops of the photographs that ship inside installed packages: a class is a place in one of them. Weights
are random: what probing costs does not depend on them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from aimscale.aim.cost import flops_per_image
from aimscale.aim.machine import cpu_name
from aimscale.aim.model import AIM
from aimscale.aim.weights import write_weights
from aimscale.harness.data.random_access import make_key, random_uniform
from aimscale.harness.data.resize import crop_centre
from aimscale.harness.data.store.bundled import photographs
from aimscale.harness.data.store.pack import PackedImage, encode, write_dataset
from aimscale.harness.device.memory import host_bytes
from aimscale.harness.device.peak import measure_peak
from aimscale.harness.run.config import RunConfig, RuntimeConfig, run_config
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.provenance import git_commit
from aimscale.harness.run.row import model_of
from aimscale.sweeps.plan.evaluation_cost import ProbeCost, probe_costs

IMAGE_SIDE = 16
"""Of the small images, pixels."""
CROP_SIDE = 48
"""Of a crop before it is shrunk, pixels."""
JITTER = 12
"""A crop's corner is at most so far from its class's place, pixels."""
TEST_SHARE = 0.05
"""Test images for each training image."""
CACHE_GB = 0.005
"""Memory for features: so little that tokens are streamed and pooled features go to disk."""
BUDGET = 4096
NUM_KILLS = 3
ASSUMED_MFU = 0.5
"""Assumption of the forecast: the share of the matrix-product rate that probing reaches."""


def run(
    *, num_images: int, num_classes: int, size: str, iterations: int, batch_size: int, folder: Path | None = None
) -> dict[str, Any]:
    """Make the images, probe them in three ways and compare with the card.

    Args:
        num_classes: places in photographs.
        size: rung whose random weights are probed.
        iterations: optimiser steps of the linear and the attentive grid.
        folder: where everything goes and stays; None takes a temporary one.

    Returns:
        `ways`: one row for each way (alone, two ranks, killed), with time, memory, disk and whether its numbers are
        those of the first; `forecast` and `measured`: what the card says and what the first way took; `setting`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        root = folder or Path(temporary)
        started = time.monotonic()
        for split, count in (("train", num_images), ("test", max(num_classes, round(TEST_SHARE * num_images)))):
            classes = tuple(f"place-{number:04d}" for number in range(num_classes))
            write_dataset(root / split, crops(split, count, num_classes), classes=classes)
        made_s = time.monotonic() - started
        config = _config(root, size, iterations, batch_size)
        ways: list[dict[str, Any]] = []
        for name, ranks, kills in (("alone", 1, 0), ("two ranks", 2, 0), (f"killed {NUM_KILLS} times", 1, NUM_KILLS)):
            limit = ways[0]["wall_s"] * 0.3 if ways else 0.0
            ways.append({"way": name} | _probe(root / name.replace(" ", "-"), config, ranks, kills, limit))
        for way in ways:
            way["largest_difference"] = _largest_difference(ways[0]["entries"], way["entries"])
            way["same_choices"] = _choices(ways[0]["entries"]) == _choices(way["entries"])
        model = model_of(config.training)
        (cost,) = probe_costs(config.evaluation, model, flops_per_image(model), 1, host_bytes() / 1e9)
    return {
        "ways": ways,
        "forecast": _forecast(cost),
        "measured": {name: ways[0][name] for name in ("backbone_images", "feature_bytes", "wall_s")},
        "setting": {
            "images": num_images,
            "classes": num_classes,
            "size": size,
            "iterations": iterations,
            "batch_size": batch_size,
            "packing_s": made_s,
            "cpu": cpu_name(),
            "torch": torch.__version__,
            "commit": git_commit()[0],
        },
    }


def table(result: dict[str, Any]) -> str:
    """For a terminal."""
    heads = ("wall s", "CPU s", "peak GB", "disk MB", "same choices", "top-1 differs by")
    lines = [f"{'':<16}" + "".join(f"{head:>18}" for head in heads)]
    for way in result["ways"]:
        values = (
            f"{way['wall_s']:.0f}",
            f"{way['cpu_s']:.0f}",
            f"{way['peak_process_bytes'] / 1e9:.2f}",
            f"{way['feature_bytes']['disk'] / 1e6:.1f}",
            "yes" if way["same_choices"] else "NO",
            f"{way['largest_difference']:.5f}",
        )
        lines.append(f"{way['way']:<16}" + "".join(f"{value:>18}" for value in values))
    forecast, measured = result["forecast"], result["measured"]
    kept_mb = sum(measured["feature_bytes"].values()) / 1e6
    lines += [
        "",
        f"images through the backbone: forecast {forecast['backbone_images']:,.0f}, "
        f"counted {measured['backbone_images']:,}",
        f"pooled features: forecast {forecast['feature_bytes'] / 1e6:.1f} MB, kept {kept_mb:.1f} MB",
        f"time: forecast {forecast['wall_s']:.0f} s at {100 * ASSUMED_MFU:.0f} % of the measured matrix-product rate, "
        f"took {measured['wall_s']:.0f} s",
    ]
    for way in result["ways"][:1]:
        lines += [f"{entry['kind']:<10} top-1 {100 * entry['top1']:.2f} %" for entry in way["entries"]]
    return "\n".join(lines)


def crops(split: str, num_images: int, num_classes: int) -> Iterator[PackedImage]:
    """Small images of every class in turn: crops near the class's place, flipped or not, a little darker or lighter."""
    pictures = [photographs()[name] for name in sorted(photographs())]
    places = random_uniform(make_key("place"), torch.arange(2 * num_classes).numpy()).reshape(-1, 2)
    for number in range(num_images):
        label = number % num_classes
        picture = pictures[label % len(pictures)]
        draw = random_uniform(make_key("crop", 0 if split == "train" else 1), 4 * number + torch.arange(4).numpy())
        corner = [
            int(place * (side - CROP_SIDE - JITTER) + jitter * JITTER)
            for place, side, jitter in zip(places[label], picture.shape[-2:], draw[:2], strict=True)
        ]
        crop = picture[:, corner[0] : corner[0] + CROP_SIDE, corner[1] : corner[1] + CROP_SIDE]
        small = crop_centre(crop, IMAGE_SIDE)
        small = small.flip(-1) if draw[2] < 0.5 else small
        shade = (small.float() * (0.8 + 0.4 * draw[3])).clamp(0, 255).byte()
        yield PackedImage(f"{number:07d}", *encode(shade), label)


def _config(root: Path, size: str, iterations: int, batch_size: int) -> RunConfig:
    task = {
        "task": "places",
        "train": str(root / "train"),
        "test": str(root / "test"),
        "kinds": ["linear", "attentive", "knn"],
        "iterations": iterations,
        "batch_size": batch_size,
        "lrs": [3e-3, 1e-2],
        "holdout_fraction": 0.05,
        "centre_crop": 1.0,
        "precision": "fp32",
    }
    fields = {
        "model": {"size": size, "image_size": IMAGE_SIDE, "patch_size": 4},
        "data": {"sources": [{"path": str(root / "train")}]},
        "optimiser": {"batch_size": BUDGET},
        "schedule": {"warmup_images": 0},
        "budgets": [BUDGET],
        "validation": {"path": str(root / "test"), "centre_crop": 1.0},
        "probes": [task],
    }
    return run_config(fields, "the benchmark", RuntimeConfig(device="cpu"))


def _probe(path: Path, config: RunConfig, ranks: int, kills: int, kill_after_s: float) -> dict[str, Any]:
    """Probe a run of random weights in processes of its own; the first `kills` of them are killed after a while."""
    shutil.rmtree(path, ignore_errors=True)
    directory = RunDir.create(path, config)
    write_weights(AIM(model_of(config.training)).state_dict(), directory.model_file(BUDGET))
    started = time.monotonic()
    for _ in range(kills):
        processes = _start(path, ranks)
        try:
            processes[0].wait(kill_after_s)
        except subprocess.TimeoutExpired:
            for process in processes:
                process.send_signal(signal.SIGKILL)
        for process in processes:
            process.wait()
    processes = _start(path, ranks)
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"a probing process ended with {[process.returncode for process in processes]}")
    document = json.loads(next(directory.probes_dir(BUDGET).glob("places-*.json")).read_text())
    names = ("cpu_s", "peak_process_bytes", "feature_bytes", "backbone_images")
    return {
        "wall_s": time.monotonic() - started,
        "entries": json.loads(outputs[0]),
        **{name: document[name] for name in names},
    }


def _start(path: Path, ranks: int) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "aimscale", "probe", str(path), "--device", "cpu", "--json"]
    return [
        subprocess.Popen(
            [*command, "--cache-gb", str(CACHE_GB)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ
            | group
            | ({"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
        )
        for rank in range(ranks)
    ]


def _choices(entries: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What the hold-out chose for each kind."""
    return [(entry["kind"], entry["blocks"], entry["lr"], entry["num_neighbours"]) for entry in entries]


def _largest_difference(first: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> float:
    """Of any accuracy, in points of one."""
    names = ("top1", "last_top1", "holdout_top1")
    return max(abs(one[name] - two[name]) for one, two in zip(first, other, strict=True) for name in names)


def _forecast(cost: ProbeCost) -> dict[str, float]:
    rate = measure_peak(torch.device("cpu"), "fp32").flops_per_s * ASSUMED_MFU
    return {
        "backbone_images": cost.images,
        "feature_bytes": cost.feature_bytes,
        "head_bytes": cost.head_bytes,
        "flops": cost.flops,
        "wall_s": cost.flops / rate,
    }
