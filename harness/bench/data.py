"""How fast images are read: the training stream beside the limit, a bare reader that decodes and crops.

The bare reader is what one writes first, with plain torch and the fastest JPEG library (`data.store.decoding`): its
images lie in memory, and its pictures are thrown away. Both take turns in one process on one thread, in processor time,
switching every few dozen images, so that a busy machine slows both alike; then the loader with and without worker
processes, alternating with as many bare readers. The images are JPEGs of 500 x 375 px cut from the bundled photographs.
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
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image

from aimscale.harness.data.random_access import make_key, random_uniform
from aimscale.harness.data.store.bundled import photograph_crops, photographs
from aimscale.harness.data.store.pack import PackedImage, write_dataset
from aimscale.harness.data.stream.augment import box_draws, draw_boxes
from aimscale.harness.data.stream.loader import start_server, train_batches
from aimscale.harness.data.stream.positions import TrainStream
from aimscale.harness.data.threads import kernel_threads
from aimscale.harness.run.config import RunConfig, run_config

CROP_SIZE = 224
"""Side of a picture, pixels."""
TURN = 32
"""Images that a reader decodes before the next has its turn."""
HEIGHT, WIDTH, QUALITY = 375, 500, 90
"""Of the JPEGs: pixels, and the encoder's quality."""
NUM_IMAGES = 256
"""JPEGs to cycle over."""
ROUNDS = 5
"""In each of which the bare reader and the loader have a turn."""

Box = tuple[int, int, int, int, bool]
"""A crop: top, left, height, width, pixels, and whether it is flipped."""


class Rate(NamedTuple):
    """Images in a second of wall time, and of processor time of all processes that load them."""

    per_s: float
    per_cpu_s: float


def run(*, seconds: float = 10.0, workers: Sequence[int] | None = None, num_images: int = NUM_IMAGES) -> dict[str, Any]:
    """Measure for about `seconds` per table (two tables).

    Args:
        seconds: wall time of the single-thread comparison, and of all loader runs together.
        workers: numbers of loader processes; none, one and every core by default.

    Returns:
        `stream`, `limit`: images/s of one thread; `share`: their ratio, median of turns; `loader`: rows with workers,
        images/s, the limit (the bare reader in as many processes at once, at most one per core: cores share caches and
        clocks), the median of their ratio over rounds in which both have a turn, and the same of processor time per
        image over all processes, which a busy machine disturbs less; `setting`.
    """
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder, kernel_threads(1):
        stream = TrainStream(_config(Path(folder) / "images", _photographs(num_images), CROP_SIZE))
        work = _work(stream, num_images)
        ours, limit = _turn_times(stream, work, seconds)
        numbers = workers if workers is not None else sorted({0, 1, cores})
        loader = [_loader_row(stream, work, number, seconds / len(numbers)) for number in numbers]
    return {
        "stream": TURN / statistics.median(ours),
        "limit": TURN / statistics.median(limit),
        "share": statistics.median(bare / stream for stream, bare in zip(ours, limit, strict=True)),
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


def table(result: dict[str, Any]) -> str:
    """The measurements for people."""
    setting = result["setting"]
    height, width = setting["image_px"]
    lines = [
        f"decode + random resized crop to {setting['crop_px']} px, JPEGs of {width} x {height} px, one thread",
        f"  {'':<38}{'images/s':>10}{'of limit':>10}",
    ]
    lines.append(f"  {'bare reader (the limit)':<38}{result['limit']:>10,.0f}{1:>10.1%}")
    lines.append(f"  {'training stream':<38}{result['stream']:>10,.0f}{result['share']:>10.1%}")
    lines += [
        f"loader on {setting['cores']} cores; limit: the bare reader in as many processes at once, interleaved",
        f"  {'':<38}{'images/s':>10}{'of limit':>10}{'of its CPU time':>17}",
    ]
    for row in result["loader"]:
        label = f"{row['workers']} worker{'s' if row['workers'] != 1 else ''}"
        lines.append(f"  {label:<38}{row['images_per_s']:>10,.0f}{row['share']:>10.1%}{row['cpu_share']:>17.1%}")
    return "\n".join(lines)


def bare_reader(data: bytes, box: Box) -> torch.Tensor:
    """Decode, crop, resize and flip one image; uint8 (3, CROP_SIZE, CROP_SIZE)."""
    top, left, height, width, flip = box
    image = torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)[None]
    # Without the copy torch's kernel takes a quarter longer.
    crop = image[..., top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
    (resized,) = F.interpolate(crop, size=(CROP_SIZE, CROP_SIZE), mode="bicubic", antialias=True)
    return resized.flip(-1) if flip else resized


def _bare_turn(work: Sequence[tuple[bytes, Box]], first: int) -> None:
    """Read the next images from `first` on, over and over the same ones."""
    for i in range(first, first + TURN):
        bare_reader(*work[i % len(work)])


def _work(stream: TrainStream, num_images: int) -> list[tuple[bytes, Box]]:
    """Image files in memory with a crop each, drawn as the stream draws them."""
    dataset = stream.datasets[0]
    data = [dataset.read(i) for i in range(num_images)]
    boxes = draw_boxes(
        box_draws(make_key("bench"), np.arange(num_images)),
        *dataset.sides(np.arange(num_images)),
        scale=(0.4, 1.0),
        ratio=(3 / 4, 4 / 3),
        horizontal_flip=True,
    )
    return [(data[i], tuple(values[i].item() for values in boxes)) for i in range(num_images)]


def _turn_times(
    stream: TrainStream, work: Sequence[tuple[bytes, Box]], seconds: float
) -> tuple[list[float], list[float]]:
    """Processor time of every turn of the stream and of the bare reader, interleaved, three or more of each."""
    ours: list[float] = []
    limit: list[float] = []
    stop, first = time.perf_counter() + seconds, 0
    while time.perf_counter() < stop or len(limit) < 4:
        start = time.thread_time()
        stream.batch(range(first, first + TURN))
        between = time.thread_time()
        _bare_turn(work, first)
        ours.append(between - start)
        limit.append(time.thread_time() - between)
        first += TURN
    return ours[1:], limit[1:]  # the first warms up


def _loader_row(stream: TrainStream, work: Sequence[tuple[bytes, Box]], workers: int, seconds: float) -> dict[str, Any]:
    """Images/s of `train_batches` once its workers run, beside the bare reader in as many processes."""
    num_processes = min(max(1, workers), len(os.sched_getaffinity(0)))
    turn_s = seconds / ROUNDS / 2
    rounds = [(_loader_rate(stream, workers, turn_s), _bare_rate(work, num_processes, turn_s)) for _ in range(ROUNDS)]
    return {
        "workers": workers,
        "images_per_s": statistics.median(ours.per_s for ours, _ in rounds),
        "limit_images_per_s": statistics.median(limit.per_s for _, limit in rounds),
        "share": statistics.median(ours.per_s / limit.per_s for ours, limit in rounds),
        "cpu_share": statistics.median(ours.per_cpu_s / limit.per_cpu_s for ours, limit in rounds),
    }


def _loader_rate(stream: TrainStream, workers: int, seconds: float) -> Rate:
    """With which a loader hands out images while nothing else runs."""
    before = set(multiprocessing.active_children())
    batches = train_batches(stream, start=0, stop=10**9, batch_size=TURN, micro_batch=TURN, num_workers=workers)
    with contextlib.closing(batches):
        for _ in range(4 * (workers + 1)):
            next(batches)  # start the workers, and use up what they loaded ahead meanwhile
        processes = [process.pid for process in set(multiprocessing.active_children()) - before]
        start, cpu, number = time.perf_counter(), _cpu_s(processes), 0
        while time.perf_counter() < start + seconds or not number:
            number += sum(map(len, next(batches)))
        cpu = _cpu_s(processes) - cpu
        return Rate(number / (time.perf_counter() - start), number / cpu)


def _cpu_s(processes: Sequence[int | None]) -> float:
    """Processor time of this process and of some others so far."""
    clocks = [(~pid << 3) | 2 for pid in processes if pid is not None]  # as clock_getcpuclockid has it on Linux
    return time.process_time() + sum(map(time.clock_gettime, clocks))


def _bare_rate(work: Sequence[tuple[bytes, Box]], num_processes: int, seconds: float) -> Rate:
    """The rate of bare readers in some processes that begin together."""
    pipes, processes = [], []
    for _ in range(num_processes):
        ours, theirs = Pipe()
        processes.append(start_server().Process(target=_read_bare, args=(work, seconds, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()  # ready
    for pipe in pipes:
        pipe.send(None)
    told = [Rate(*pipe.recv()) for pipe in pipes]
    for process in processes:
        process.join()
    return Rate(sum(rate.per_s for rate in told), statistics.mean(rate.per_cpu_s for rate in told))


def _read_bare(work: Sequence[tuple[bytes, Box]], seconds: float, pipe: Connection) -> None:
    """One process of `_bare_rate`."""
    torch.set_num_threads(1)
    number = 0
    _bare_turn(work, number)  # warm-up
    pipe.send(None)
    pipe.recv()
    start, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() < start + seconds:
        _bare_turn(work, number)
        number += TURN
    pipe.send((number / (time.perf_counter() - start), number / (time.process_time() - cpu)))


def _photographs(number: int) -> Iterator[PackedImage]:
    """Crops of the bundled photographs, resized to the size of a typical web photo."""
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


def _config(folder: Path, images: Iterator[PackedImage], image_size: int) -> RunConfig:
    folder.mkdir()
    write_dataset(folder / "train", images)
    held_out = (image for image, _ in zip(photograph_crops("test"), range(8), strict=False))
    write_dataset(folder / "validation", held_out)
    return run_config(
        {
            "model": {"size": "rung-32", "image_size": image_size, "patch_size": image_size // 8},
            "data": {"sources": [{"path": str(folder / "train")}]},
            "optimiser": {"batch_size": TURN},
            "budgets": [TURN],
            "validation": {"path": str(folder / "validation")},
        },
        "the benchmark",
    )
