"""Throughput of reading images: the loader on a data set, with and without worker processes.

Without a data set it reads JPEGs of 500 x 375 px, cut from the bundled photographs, the size of typical web photos.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from aimscale.harness.data.images import kernel_threads
from aimscale.harness.data.random_access import make_key, random_uniform
from aimscale.harness.data.store.bundled import photograph_crops, photographs
from aimscale.harness.data.store.pack import PackedImage, write_dataset
from aimscale.harness.data.stream.loader import train_batches
from aimscale.harness.data.stream.stream import TrainStream
from aimscale.harness.log.progress import Bar
from aimscale.harness.run.config import RunConfig, run_config

CROP_SIZE = 224
"""Side of a crop, pixels."""
BATCH_SIZE = 32
HEIGHT, WIDTH, QUALITY = 375, 500, 90
"""Size of the JPEGs in pixels, and the encoder's quality."""
NUM_IMAGES = 256
"""Number of JPEGs to cycle over."""


def run(
    dataset: str | None = None,
    *,
    seconds: float = 10.0,
    workers: Sequence[int] | None = None,
    cache_dir: str | None = None,
) -> list[dict[str, Any]]:
    """Measure for about `seconds` how fast the loader reads a data set, with crops of 224 px.

    Args:
        dataset: folder or URL; the photographs above by default.
        workers: numbers of loader processes; none, one and every core by default.

    Returns:
        Rows with `workers`, `images_per_s`, and `images_per_cpu_s`, per second of all processes' processor time.
    """
    numbers = workers if workers is not None else sorted({0, 1, len(os.sched_getaffinity(0))})
    rows = []
    with tempfile.TemporaryDirectory() as folder, kernel_threads(1), Bar() as bar:
        if dataset is None:
            write_dataset(Path(folder) / "train", photograph_jpegs(NUM_IMAGES))
        write_dataset(Path(folder) / "validation", islice(photograph_crops("test"), 8))
        stream = TrainStream(stream_config(Path(folder), dataset), cache_dir=cache_dir)
        for done, number in enumerate(numbers):
            bar(f"{number} workers", done, len(numbers), "measurements")
            per_s, per_cpu_s = loader_rate(stream, number, seconds / len(numbers))
            rows.append({"workers": number, "images_per_s": per_s, "images_per_cpu_s": per_cpu_s})
            bar.say(f"{number} workers: {per_s:,.0f} images/s, {per_cpu_s:,.0f} per core", err=True)
    return rows


def loader_rate(stream: TrainStream, workers: int, seconds: float) -> tuple[float, float]:
    """Measure images per second of wall time and of all processes' processor time, once the workers run."""
    batches = train_batches(
        stream, start=0, stop=10**9, batch_size=BATCH_SIZE, micro_batch=BATCH_SIZE, num_workers=workers
    )
    with contextlib.closing(batches):
        for _ in range(4 * (workers + 1)):
            next(batches)  # start the workers, and consume what they loaded ahead
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        start, cpu_s, number = time.perf_counter(), _cpu_s(processes), 0
        while time.perf_counter() < start + seconds or not number:
            number += sum(map(len, next(batches)))
        cpu_s = _cpu_s(processes) - cpu_s
        return number / (time.perf_counter() - start), number / max(cpu_s, 0.01)  # counted in steps of 10 ms


def _cpu_s(processes: Sequence[psutil.Process]) -> float:
    """Return the processor time of some processes so far."""
    return float(sum(sum(each.cpu_times()[:2]) for each in processes))


def photograph_jpegs(number: int) -> Iterator[PackedImage]:
    """Yield crops of the bundled photographs, resized to the size of a typical web photo."""
    pictures = list(photographs().values())
    draws = random_uniform(make_key("bench photograph"), np.arange(2 * number)).reshape(number, 2)
    for i in range(number):
        picture = pictures[i % len(pictures)]
        scale = min(picture.shape[-2] / HEIGHT, picture.shape[-1] / WIDTH, 1.0)
        height, width = int(HEIGHT * scale), int(WIDTH * scale)
        top = int(draws[i, 0] * (picture.shape[-2] - height + 1))
        left = int(draws[i, 1] * (picture.shape[-1] - width + 1))
        pixels = picture[:, top : top + height, left : left + width].permute(1, 2, 0).numpy()
        buffer = io.BytesIO()
        image = Image.fromarray(np.ascontiguousarray(pixels)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        image.save(buffer, "jpeg", quality=QUALITY)
        yield PackedImage(f"{i:06d}", "jpg", buffer.getvalue(), None)


def stream_config(folder: Path, dataset: str | None = None) -> RunConfig:
    """Return the configuration of a run on a data set, by default `train` of the folder."""
    return run_config(
        {
            "model": {"size": "rung-32", "image_size": CROP_SIZE, "patch_size": CROP_SIZE // 8},
            "data": {"sources": [{"path": dataset or str(folder / "train")}]},
            "optimiser": {"batch_size": BATCH_SIZE},
            "budgets": [BATCH_SIZE],
            "validation": {"path": str(folder / "validation")},
        },
        "the benchmark",
    )
