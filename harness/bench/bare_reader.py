"""The bare readers of `aimscale bench data`: what one writes first, with plain torch and each JPEG library.

Their images lie in memory, and their pictures are thrown away.
"""

from __future__ import annotations

import importlib.util
import io
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from aimscale.harness.data.processes import heed_signals, start_process

CROP_SIZE = 224
"""Side of a picture, pixels."""
TURN = 32
"""Images that a library decodes before the next has its turn."""

Box = tuple[int, int, int, int, bool]
"""A crop: top, left, height, width, pixels, and whether it is flipped."""
Reader = Callable[[bytes, Box], torch.Tensor]
"""An image file and its crop to uint8 (3, CROP_SIZE, CROP_SIZE)."""


def readers() -> dict[str, Reader]:
    """Decode, crop, resize and flip with each library that is installed."""

    def with_simplejpeg(data: bytes, box: Box) -> torch.Tensor:
        return _plain_crop(torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1), box)

    def with_torchvision(data: bytes, box: Box) -> torch.Tensor:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return _plain_crop(decode_jpeg(encoded, mode=ImageReadMode.RGB), box)

    def with_pillow(data: bytes, box: Box) -> torch.Tensor:
        top, left, height, width, flip = box
        image = Image.open(io.BytesIO(data)).convert("RGB")
        image = image.resize(
            (CROP_SIZE, CROP_SIZE), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
        )
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return pixels.flip(-1) if flip else pixels

    found: dict[str, Reader] = {
        "simplejpeg + torch": with_simplejpeg,
        "torchvision": with_torchvision,
        "Pillow": with_pillow,
    }
    if importlib.util.find_spec("cv2") is not None:
        found["OpenCV + torch"] = _opencv_reader()
    return found


def _plain_crop(image: torch.Tensor, box: Box) -> torch.Tensor:
    """Crop, resize and flip with torch's public functions; without the copy its kernel takes a quarter longer."""
    top, left, height, width, flip = box
    crop = image[None, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
    (resized,) = F.interpolate(crop, size=(CROP_SIZE, CROP_SIZE), mode="bicubic", antialias=True)
    return resized.flip(-1) if flip else resized


def _opencv_reader() -> Reader:
    cv2 = importlib.import_module("cv2")  # an optional package: measured where it happens to be installed
    cv2.setNumThreads(1)

    def read(data: bytes, box: Box) -> torch.Tensor:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        return _plain_crop(torch.from_numpy(pixels).permute(2, 0, 1), box)

    return read


def read_turn(reader: Reader, work: Sequence[tuple[bytes, Box]], first: int) -> None:
    """Read the next images from `first` on, over and over the same ones."""
    for i in range(first, first + TURN):
        reader(*work[i % len(work)])


class Rate(NamedTuple):
    """Images in a second of wall time, and of processor time of all processes that load them."""

    per_s: float
    per_cpu_s: float


def bare_rate(name: str, work: Sequence[tuple[bytes, Box]], num_processes: int, seconds: float) -> Rate:
    """The rate of one reader in some processes that begin together."""
    pipes, processes = [], []
    for _ in range(num_processes):
        ours, theirs = Pipe()
        processes.append(start_process(_read_bare, name, work, seconds, theirs))
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


def _read_bare(name: str, work: Sequence[tuple[bytes, Box]], seconds: float, pipe: Connection) -> None:
    """One process of `bare_rate`."""
    heed_signals()
    torch.set_num_threads(1)
    reader, number = readers()[name], 0
    read_turn(reader, work, number)  # warm-up
    pipe.send(None)
    pipe.recv()
    start, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() < start + seconds:
        read_turn(reader, work, number)
        number += TURN
    pipe.send((number / (time.perf_counter() - start), number / (time.process_time() - cpu)))
