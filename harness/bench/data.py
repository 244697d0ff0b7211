"""Throughput of reading images: the training stream beside its limit, a bare reader that decodes and crops.

The bare reader is what one writes first, with plain torch and the fastest JPEG library (`data.store.decoding`): its
images are in memory, and its results are discarded. First both take turns in one process on one thread, measured in
processor time and switching every few dozen images, so that a busy machine slows both alike. Then the loader runs with
and without worker processes, and its processor time per image is compared with the bare reader's. The images are JPEGs
of 500 x 375 px cut from the bundled photographs.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image

from aimscale.harness.data.random_access import make_key, random_uniform
from aimscale.harness.data.store.bundled import photograph_crops, photographs
from aimscale.harness.data.store.decoding import kernel_threads
from aimscale.harness.data.store.pack import PackedImage, write_dataset
from aimscale.harness.data.stream.augment import box_uniforms, draw_boxes
from aimscale.harness.data.stream.loader import train_batches
from aimscale.harness.data.stream.stream import TrainStream
from aimscale.harness.device.gpu_specs import store_rate
from aimscale.harness.log.progress import Bar
from aimscale.harness.run.config import RunConfig, run_config

CROP_SIZE = 224
"""Side of a picture, pixels."""
TURN = 32
"""Number of images that a reader decodes before the other has its turn."""
HEIGHT, WIDTH, QUALITY = 375, 500, 90
"""Size of the JPEGs in pixels, and the encoder's quality."""
NUM_IMAGES = 256
"""Number of JPEGs to cycle over."""

Box = tuple[int, int, int, int, bool]
"""Crop: top, left, height, width, pixels, and whether it is flipped."""


def run(*, seconds: float = 10.0, workers: Sequence[int] | None = None, num_images: int = NUM_IMAGES) -> dict[str, Any]:
    """Measure for about `seconds` per table (two tables), and store the stream's rate, which plans on this machine then
    use.

    Args:
        seconds: wall time of the single-thread comparison, and of all loader runs together.
        workers: numbers of loader processes; none, one and every core by default.

    Returns:
        `stream`, `limit`: images/s of one thread; `share`: their ratio, median of turns; `loader`: rows with workers,
        images/s, and `cpu_share`, images in a second of all processes' time over `limit`, which a busy machine disturbs
        little; `setting`.
    """
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder, kernel_threads(1), Bar() as bar:
        stream = TrainStream(_config(Path(folder) / "images", _photographs(num_images)))
        work = _work(stream, num_images)
        bar("one thread", 0, 1, "comparisons")
        ours, limit = _turn_times(stream, work, seconds)
        stream_per_s, limit_per_s = (TURN / statistics.median(each) for each in (ours, limit))
        share = statistics.median(bare / stream for stream, bare in zip(ours, limit, strict=True))
        bar.say(f"one thread: {stream_per_s:,.0f} images/s, {share:.2f} of the limit of {limit_per_s:,.0f}", err=True)
        store_rate("decoded_per_s", stream_per_s)
        loader = []
        for number, per_s, per_cpu_s in _loader_rates(stream, workers, seconds, bar):
            loader.append({"workers": number, "images_per_s": per_s, "cpu_share": per_cpu_s / limit_per_s})
            rate = f"{per_s:,.0f} images/s, {per_cpu_s / limit_per_s:.2f} of the limit per core"
            bar.say(f"{number} workers: {rate}", err=True)
    return {
        "stream": stream_per_s,
        "limit": limit_per_s,
        "share": share,
        "loader": loader,
        "setting": {
            "image_px": [HEIGHT, WIDTH],
            "jpeg_quality": QUALITY,
            "crop_px": CROP_SIZE,
            "num_images": num_images,
            "cores": cores,
            "torch": torch.__version__,
        },
    }


def run_on(
    dataset: str, *, seconds: float = 10.0, workers: Sequence[int] | None = None, cache_dir: str | None = None
) -> list[dict[str, Any]]:
    """Measure for about `seconds` how fast the loader reads a data set, a folder or URL, with crops of 224 px.

    Returns rows with workers, images/s, and images in a second of all processes' time.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder, kernel_threads(1), Bar() as bar:
        stream = TrainStream(_config(Path(folder) / "images", _photographs(8), dataset), cache_dir=cache_dir)
        for number, per_s, per_cpu_s in _loader_rates(stream, workers, seconds, bar):
            rows.append({"workers": number, "images_per_s": per_s, "images_per_cpu_s": per_cpu_s})
            bar.say(f"{number} workers: {per_s:,.0f} images/s, {per_cpu_s:,.0f} per core", err=True)
    return rows


def bare_reader(data: bytes, box: Box) -> torch.Tensor:
    """Decode, crop, resize and flip one image; uint8 (3, CROP_SIZE, CROP_SIZE)."""
    top, left, height, width, flip = box
    image = torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)[None]
    # Without the copy torch's kernel takes a quarter longer.
    crop = image[..., top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
    (resized,) = F.interpolate(crop, size=(CROP_SIZE, CROP_SIZE), mode="bicubic", antialias=True)
    return resized.flip(-1) if flip else resized


def _work(stream: TrainStream, num_images: int) -> list[tuple[bytes, Box]]:
    """Load image files into memory and draw a crop for each as the stream does."""
    dataset = stream.datasets[0]
    data = [dataset.read(i) for i in range(num_images)]
    boxes = draw_boxes(
        box_uniforms(make_key("bench"), np.arange(num_images)),
        *dataset.sides(np.arange(num_images)),
        scale=(0.4, 1.0),
        horizontal_flip=True,
    )
    return [(data[i], boxes[i].item()) for i in range(num_images)]


def _turn_times(
    stream: TrainStream, work: Sequence[tuple[bytes, Box]], seconds: float
) -> tuple[list[float], list[float]]:
    """Measure the processor time of every turn of the stream and of the bare reader, interleaved, three or more of
    each."""
    ours: list[float] = []
    limit: list[float] = []
    stop, first = time.perf_counter() + seconds, 0
    while time.perf_counter() < stop or len(limit) < 4:
        start = time.thread_time()
        stream.batch(range(first, first + TURN))
        between = time.thread_time()
        for i in range(first, first + TURN):  # cycle over the same images
            bare_reader(*work[i % len(work)])
        ours.append(between - start)
        limit.append(time.thread_time() - between)
        first += TURN
    return ours[1:], limit[1:]  # the first turn is a warm-up


def _loader_rates(
    stream: TrainStream, workers: Sequence[int] | None, seconds: float, bar: Bar
) -> Iterator[tuple[int, float, float]]:
    """Yield numbers of workers (none, one and every core by default), images/s with each, and images per second of all
    processes' time; takes about `seconds`."""
    numbers = workers if workers is not None else sorted({0, 1, len(os.sched_getaffinity(0))})
    for done, number in enumerate(numbers):
        bar(f"{number} workers", done, len(numbers), "comparisons")
        yield number, *_loader_rate(stream, number, seconds / len(numbers))


def _loader_rate(stream: TrainStream, workers: int, seconds: float) -> tuple[float, float]:
    """Measure the rates at which `train_batches` yields images once its workers run and nothing else does."""
    before = set(multiprocessing.active_children())
    batches = train_batches(stream, start=0, stop=10**9, batch_size=TURN, micro_batch=TURN, num_workers=workers)
    with contextlib.closing(batches):
        for _ in range(4 * (workers + 1)):
            next(batches)  # start the workers, and consume what they loaded ahead
        processes = [process.pid for process in set(multiprocessing.active_children()) - before]
        start, cpu_s, number = time.perf_counter(), _cpu_s(processes), 0
        while time.perf_counter() < start + seconds or not number:
            number += sum(map(len, next(batches)))
        cpu_s = _cpu_s(processes) - cpu_s
        per_s = number / (time.perf_counter() - start)
    return per_s, number / cpu_s


def _cpu_s(processes: Sequence[int | None]) -> float:
    """Return the processor time of this process and of some others so far."""
    clocks = [(~pid << 3) | 2 for pid in processes if pid is not None]  # as clock_getcpuclockid has it on Linux
    return time.process_time() + sum(map(time.clock_gettime, clocks))


def _photographs(number: int) -> Iterator[PackedImage]:
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


def _config(folder: Path, images: Iterator[PackedImage], dataset: str | None = None) -> RunConfig:
    """Write the data sets and return the configuration of a run on them."""
    folder.mkdir()
    write_dataset(folder / "train", images)
    held_out = (image for image, _ in zip(photograph_crops("test"), range(8), strict=False))
    write_dataset(folder / "validation", held_out)
    return run_config(
        {
            "model": {"size": "rung-32", "image_size": CROP_SIZE, "patch_size": CROP_SIZE // 8},
            "data": {"sources": [{"path": dataset or str(folder / "train")}]},
            "optimiser": {"batch_size": TURN},
            "budgets": [TURN],
            "validation": {"path": str(folder / "validation")},
        },
        "the benchmark",
    )
