"""How fast images are read: the training stream beside the bare decode-and-crop limit of each JPEG library.

The minimal loop is what any loader must do and no more: read each file, decode, crop, resize and store in a batch.
All take turns in one process on one thread, in processor time, switching every few dozen images, so that a busy machine
slows all alike; then the loader with and without worker processes, which resizes or leaves that to the device,
alternating with as many bare readers. The images are JPEGs of 500 x 375 px cut from the bundled photographs.
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision.transforms import v2

from aimscale.harness.bench.bare_reader import CROP_SIZE, TURN, Box, Rate, bare_rate, read_turn, readers
from aimscale.harness.data.random_access import make_key, random_uniform
from aimscale.harness.data.store.bundled import IMAGE_SIZE, photograph_crops, photographs
from aimscale.harness.data.store.pack import PackedImage, write_dataset
from aimscale.harness.data.stream.augment import box_draws, crop_resize_into, draw_boxes
from aimscale.harness.data.stream.loader import train_batches
from aimscale.harness.data.stream.positions import TrainStream
from aimscale.harness.data.threads import one_thread
from aimscale.harness.device.distributed import choose_device, find_placement
from aimscale.harness.run.config import RunConfig, run_config

_HEIGHT, _WIDTH, _QUALITY = 375, 500, 90
_NUM_HELD_OUT = 8
_ROUNDS = 5  # in each of which the bare reader and the loaders have a turn: a busy machine slows all alike
_Place = Literal["loader", "device"]
_PLACES: tuple[_Place, ...] = ("loader", "device")


def run(*, num_images: int = 256, seconds: float = 10.0, workers: Sequence[int] | None = None) -> dict[str, Any]:
    """Measure for about `seconds` per table (three tables).

    Args:
        num_images: JPEGs to cycle over.
        seconds: wall time of the single-thread comparison, and of all loader runs together.
        workers: numbers of loader processes; none, one and every core by default.

    Returns:
        `single_thread`: images/s of each library, of the minimal loop and of the stream; `fastest_limit`: the best
        library's; `stream_share` and `minimal_share`: the stream and the minimal loop over it, and `stream_of_minimal`,
        medians of turns; `loader`: rows with workers, who augments, images/s, the limit (the fastest library in as many
        processes at once, at most one per core: cores share caches and clocks), the median of their ratio over rounds
        in which both have a turn, the same of processor time per image over all processes, which a busy machine
        disturbs less, and kB per image handed to the trainer;
        `device`: its name and the images/s that it resizes when the loader only cuts out; `jitter`: images/s with
        colour jitter on one thread, of the stream by who augments, and of the fastest library with torchvision's;
        `small`: images/s of 32 px images, first epoch and later ones; `setting`.
    """
    cores = len(os.sched_getaffinity(0))
    device = choose_device(find_placement(), "auto")  # it multiplies as in training
    with tempfile.TemporaryDirectory() as folder, one_thread():
        config = _config(Path(folder) / "large", _photographs(num_images), CROP_SIZE)
        streams = {where: TrainStream(config, augment_on=where) for where in _PLACES}
        stream = streams["loader"]
        work = _work(stream, num_images)
        times = _single_thread(stream, work, seconds)
        single = {name: TURN / statistics.median(values) for name, values in times.items()}
        fastest = max(readers(), key=single.__getitem__)
        numbers = workers if workers is not None else sorted({0, 1, cores})
        loader = [
            row for number in numbers for row in _loader_rows(streams, fastest, work, number, seconds / len(numbers))
        ]
        crops = (crop for crop, _ in zip(photograph_crops("validation"), range(2000), strict=False))
        small = _small(TrainStream(_config(Path(folder) / "small", crops, IMAGE_SIZE)))
        resized = _device_rate(streams["device"], device, seconds / 4)
        jitter = _jitter(_with_jitter(config), fastest, work, seconds / 4)
    return {
        "single_thread": single,
        "fastest_limit": single[fastest],
        "stream_share": _share(times, "stream", fastest),
        "minimal_share": _share(times, "minimal", fastest),
        "stream_of_minimal": _share(times, "stream", "minimal"),
        "loader": loader,
        "device": {"name": device.type, "images_per_s": resized},
        "jitter": jitter,
        "small": small,
        "setting": {
            "image_px": [_HEIGHT, _WIDTH],
            "jpeg_quality": _QUALITY,
            "crop_px": CROP_SIZE,
            "num_images": num_images,
            "cores": cores,
            "torch": torch.__version__,
        },
    }


def table(result: dict[str, Any]) -> str:
    """The measurements for people."""
    setting, limit = result["setting"], result["fastest_limit"]
    height, width = setting["image_px"]
    lines = [
        f"decode + random resized crop to {setting['crop_px']} px, JPEGs of {width} x {height} px, one thread",
        f"  {'':<38}{'images/s':>10}{'of limit':>10}",
    ]
    labels = {"stream": "training stream", "minimal": "minimal loop: read, decode, crop, store"}
    for name, rate in sorted(result["single_thread"].items(), key=lambda entry: -entry[1]):
        share = result.get(f"{name}_share", rate / limit)
        lines.append(f"  {labels.get(name, f'bare {name}'):<40}{rate:>8,.0f}{share:>10.1%}")
    lines.append(f"  {'training stream, of the minimal loop':<48}{result['stream_of_minimal']:>10.1%}")
    lines += [
        f"loader on {setting['cores']} cores; limit: the fastest library in as many processes at once, interleaved",
        f"  {'':<38}{'images/s':>10}{'of limit':>10}{'of its CPU time':>17}",
    ]
    for row in result["loader"]:
        label = f"{row['workers']} worker{'s' if row['workers'] != 1 else ''}"
        label += ", resizing left to the device" if row["augment_on"] == "device" else ""
        shares = f"{row['share']:>10.1%}{row['cpu_share']:>17.1%}"
        lines.append(f"  {label:<38}{row['images_per_s']:>10,.0f}{shares}{row['kb_per_image']:>7.0f} kB")
    device, small, jitter = result["device"], result["small"], result["jitter"]
    lines.append("training stream with colour jitter, one thread")
    for key, label in (
        ("loader", "all in the loader"),
        ("device", "resizing and jitter left to the device"),
        ("torchvision", "torchvision's, after the fastest library"),
    ):
        lines.append(f"  {label:<38}{jitter[key]:>10,.0f}")
    lines.append(f"resize, flip and normalise crops in the batch on {device['name']}")
    lines.append(f"  {'in the trainer':<38}{device['images_per_s']:>10,.0f}")
    lines.append("training stream, 32 px PNGs, one thread")
    for name, key in (("first epoch", "first_epoch"), ("later epochs (in memory)", "later_epochs")):
        lines.append(f"  {name:<38}{small[key]:>10,.0f}")
    return "\n".join(lines)


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


def _minimal_turn(
    read: Callable[[int], bytes], work: Sequence[tuple[bytes, Box]], into: Sequence[torch.Tensor], first: int
) -> None:
    """What any loader must do."""
    for slot, i in zip(into, range(first, first + TURN), strict=True):
        number = i % len(work)
        crop_resize_into(slot, simplejpeg.decode_jpeg(read(number)), work[number][1])


def _shard_reader(stream: TrainStream, num_images: int, stack: contextlib.ExitStack) -> Callable[[int], bytes]:
    """The bytes of one of the first image files, from its shard."""
    dataset = stream.datasets[0]
    places = dataset.places(range(num_images))
    opened = {name: os.open(f"{dataset.path}/{name}", os.O_RDONLY) for name in {name for name, _, _ in places}}
    for descriptor in opened.values():
        stack.callback(os.close, descriptor)
    where = [(opened[name], size, offset) for name, offset, size in places]
    return lambda i: os.pread(*where[i])


def _stream_turn(stream: TrainStream, first: int) -> None:
    stream.batch(range(first, first + TURN))


def _times_of(turns: Mapping[str, Callable[[int], object]], seconds: float) -> dict[str, list[float]]:
    """Processor time of every turn, interleaved, three or more of each; a turn is told its first image."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    for turn in turns.values():
        turn(0)  # warm-up
    stop = time.perf_counter() + seconds
    first, names = 0, list(turns)
    while time.perf_counter() < stop or min(map(len, times.values())) < 3:
        for name in names:
            start = time.thread_time()
            turns[name](first)
            times[name].append(time.thread_time() - start)
        first += TURN
        names = names[1:] + names[:1]  # none always comes behind the same
    return times


def _single_thread(stream: TrainStream, work: Sequence[tuple[bytes, Box]], seconds: float) -> dict[str, list[float]]:
    """Times of every reader on bytes in memory, and of the minimal loop and the stream on shards."""
    turns: dict[str, Callable[[int], object]] = {
        name: functools.partial(read_turn, reader, work) for name, reader in readers().items()
    }
    into = torch.empty(TURN, CROP_SIZE, CROP_SIZE, 3, dtype=torch.uint8).permute(0, 3, 1, 2).split(1)
    with contextlib.ExitStack() as stack:
        turns["minimal"] = functools.partial(_minimal_turn, _shard_reader(stream, len(work), stack), work, into)
        turns["stream"] = functools.partial(_stream_turn, stream)
        return _times_of(turns, seconds)


def _share(times: Mapping[str, Sequence[float]], ours: str, limit: str) -> float:
    """Speed over a limit's, median of turns beside each other."""
    return statistics.median(theirs / mine for mine, theirs in zip(times[ours], times[limit], strict=True))


def _loader_rows(
    streams: Mapping[_Place, TrainStream], fastest: str, work: Sequence[tuple[bytes, Box]], workers: int, seconds: float
) -> list[dict[str, Any]]:
    """Images/s of `train_batches` once its workers run, beside the bare reader in as many processes."""
    num_processes = min(max(1, workers), len(os.sched_getaffinity(0)))
    turn_s = seconds / _ROUNDS / (1 + len(streams))
    limits: list[Rate] = []
    rates: dict[_Place, list[Rate]] = {where: [] for where in streams}
    sizes: dict[_Place, float] = {}
    for _ in range(_ROUNDS):
        limits.append(bare_rate(fastest, work, num_processes, turn_s))
        for where, stream in streams.items():
            rate, sizes[where] = _loader_rate(stream, workers, turn_s)
            rates[where].append(rate)
    return [
        {
            "workers": workers,
            "augment_on": where,
            "images_per_s": statistics.median(rate.per_s for rate in rates[where]),
            "limit_images_per_s": statistics.median(limit.per_s for limit in limits),
            "share": statistics.median(
                rate.per_s / limit.per_s for rate, limit in zip(rates[where], limits, strict=True)
            ),
            "cpu_share": statistics.median(
                rate.per_cpu_s / limit.per_cpu_s for rate, limit in zip(rates[where], limits, strict=True)
            ),
            "kb_per_image": sizes[where] / 1000,
        }
        for where in streams
    ]


def _loader_rate(stream: TrainStream, workers: int, seconds: float) -> tuple[Rate, float]:
    """The rate, and bytes per image, with which a loader hands out images while nothing else runs."""
    before = set(multiprocessing.active_children())
    batches = train_batches(stream, start=0, stop=10**9, batch_size=TURN, micro_batch=TURN, num_workers=workers)
    with contextlib.closing(batches):
        for _ in range(4 * (workers + 1)):
            next(batches)  # start the workers, and use up what they loaded ahead meanwhile
        processes = [process.pid for process in set(multiprocessing.active_children()) - before]
        start, cpu, number, num_bytes = time.perf_counter(), _cpu_s(processes), 0, 0
        while time.perf_counter() < start + seconds or not number:
            for batch in next(batches):
                number += len(batch)
                num_bytes += batch.num_bytes
        cpu = _cpu_s(processes) - cpu
        return Rate(number / (time.perf_counter() - start), number / cpu), num_bytes / number


def _cpu_s(processes: Sequence[int | None]) -> float:
    """Processor time of this process and of some others so far."""
    clocks = [(~pid << 3) | 2 for pid in processes if pid is not None]  # as clock_getcpuclockid has it on Linux
    return time.process_time() + sum(map(time.clock_gettime, clocks))


def _jitter(config: RunConfig, fastest: str, work: Sequence[tuple[bytes, Box]], seconds: float) -> dict[str, float]:
    """Images/s with colour jitter on one thread, interleaved."""
    reader, streams = readers()[fastest], {where: TrainStream(config, augment_on=where) for where in _PLACES}
    peer = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8)
    turns: dict[str, Callable[[int], object]] = {
        where: functools.partial(_stream_turn, stream) for where, stream in streams.items()
    }
    turns["torchvision"] = functools.partial(read_turn, lambda data, box: peer(reader(data, box)), work)
    return {name: TURN / statistics.median(values) for name, values in _times_of(turns, seconds).items()}


def _device_rate(stream: TrainStream, device: torch.device, seconds: float) -> float:
    """Images/s that a device resizes, flips and normalises."""
    batch = stream.batch(np.arange(TURN))
    for _ in range(3):
        float(batch.images_on(device).sum())
    start, number = time.perf_counter(), 0
    while time.perf_counter() < start + seconds or not number:
        float(batch.images_on(device)[0, 0, 0, 0])  # waits for the device
        number += len(batch)
    return number / (time.perf_counter() - start)


def _small(stream: TrainStream) -> dict[str, float]:
    """Images/s of the in-memory path, one epoch each."""
    rates = []
    for epoch in range(3):
        start = time.perf_counter()
        for first in range(epoch * stream.unique_images, (epoch + 1) * stream.unique_images, 64):
            stream.batch(range(first, first + 64)).images_on("cpu")
        rates.append(stream.unique_images / (time.perf_counter() - start))
    return {"first_epoch": rates[0], "later_epochs": max(rates[1:])}


def _photographs(number: int) -> Iterator[PackedImage]:
    """Crops of the bundled photographs, resized to the size of a typical web photo."""
    pictures = list(photographs().values())
    draws = random_uniform(make_key("bench photograph"), np.arange(2 * number)).reshape(number, 2)
    for i in range(number):
        picture = pictures[i % len(pictures)]
        scale = min(picture.shape[-2] / _HEIGHT, picture.shape[-1] / _WIDTH, 1.0)
        height, width = int(_HEIGHT * scale), int(_WIDTH * scale)
        top = int(draws[i, 0] * (picture.shape[-2] - height + 1))
        left = int(draws[i, 1] * (picture.shape[-1] - width + 1))
        pixels = picture[:, top : top + height, left : left + width].permute(1, 2, 0).numpy()
        buffer = io.BytesIO()
        image = Image.fromarray(np.ascontiguousarray(pixels)).resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC)
        image.save(buffer, "jpeg", quality=_QUALITY)
        yield PackedImage(f"{i:06d}", "jpg", buffer.getvalue(), None)


def _with_jitter(config: RunConfig) -> RunConfig:
    data = config.training.data.model_copy(update={"color_jitter": True})
    return config.model_copy(update={"training": config.training.model_copy(update={"data": data})})


def _config(folder: Path, images: Iterator[PackedImage], image_size: int) -> RunConfig:
    folder.mkdir()
    write_dataset(folder / "train", images)
    held_out = (image for image, _ in zip(photograph_crops("test"), range(_NUM_HELD_OUT), strict=False))
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
