"""How fast are a step and the loader beside what anybody would write?

`python tests/experiments/peers.py step [SIZE BATCH PRECISION]` times our step, FSDP2's and a bare loop's in turns, in
processor time on one thread; `... loader` the training stream beside a bare reader that decodes, crops and resizes with
plain torch and the fastest JPEG library. Ratios are medians over turns, so a busy machine slows all alike.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from reference_engine import ReferenceEngine

from aimscale.aim.config import model_config
from aimscale.aim.model import AIM
from aimscale.harness.bench.data import CROP_SIZE, photograph_jpegs, stream_config
from aimscale.harness.bench.train import random_batches
from aimscale.harness.data.images import draw_boxes, kernel_threads
from aimscale.harness.data.random_access import make_key
from aimscale.harness.data.store.bundled import photograph_crops
from aimscale.harness.data.store.pack import write_dataset
from aimscale.harness.data.stream.loader import count_targets
from aimscale.harness.data.stream.stream import TrainStream
from aimscale.harness.device.execution import EngineOptions
from aimscale.harness.distributed.group import find_placement, start_group
from aimscale.harness.run.config import OptimiserSection
from aimscale.harness.step.engine import Engine

NUM_TURNS = 20
TURN = 32
"""Images of a turn of the loader."""


def compare(work: dict[str, Callable[[], object]]) -> None:
    """Time all pieces of work in turns, and print each one's time and the first one's over it."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(NUM_TURNS + 2):
        for name, call in work.items():
            started = time.process_time()
            call()
            if turn >= 2:  # warm by now
                times[name].append(time.process_time() - started)
    ours = next(iter(times.values()))
    for name, its in times.items():
        ratio = statistics.median(our / other for our, other in zip(ours, its, strict=True))
        print(f"{name:<8} {1000 * statistics.median(its):8.1f} ms   ours / {name}: {ratio:.3f}")


def steps(size: str = "rung-64", batch: str = "16", precision: str = "fp32") -> None:
    """Compare training steps."""
    config = model_config(size, image_size=32, patch_size=4)
    optimiser = OptimiserSection(batch_size=int(batch), precision=precision)  # type: ignore[arg-type]
    options, group = EngineOptions(zero_stage=0 if precision == "fp32" else 1), start_group(find_placement(), "cpu")
    images = random_batches(config, int(batch), int(batch))
    num_targets = count_targets(images, config.num_tokens)
    engines: dict[str, Engine | ReferenceEngine] = {"ours": Engine(config, optimiser, options, group)}
    for name in ("fsdp2", "bare"):
        engines[name] = ReferenceEngine(AIM(config), optimiser, options, group, sharded=name == "fsdp2")
    compare({name: lambda it=it: it.step(images, num_targets=num_targets, lr=1e-3) for name, it in engines.items()})


def loader() -> None:
    """Compare the training stream, with files on disk, with the bare reader, with bytes in memory."""
    with tempfile.TemporaryDirectory() as folder, kernel_threads(1):
        write_dataset(Path(folder) / "train", photograph_jpegs(TURN))
        write_dataset(Path(folder) / "validation", islice(photograph_crops("test"), 8))
        stream = TrainStream(stream_config(Path(folder)))
        dataset, numbers = stream.datasets[0], np.arange(TURN)
        boxes = draw_boxes(make_key("bench"), numbers, *dataset.sides(numbers), scale=(0.4, 1.0), horizontal_flip=True)
        work = [(dataset.read(i), boxes[i].item()) for i in range(TURN)]
        compare({
            "ours": lambda: stream.batch(range(TURN)),
            "bare": lambda: [bare_reader(data, *box) for data, box in work],
        })  # fmt: skip


def bare_reader(data: bytes, top: int, left: int, height: int, width: int, flip: bool) -> torch.Tensor:
    """Decode, crop, resize and flip one image; uint8 (3, CROP_SIZE, CROP_SIZE)."""
    image = torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)[None]
    # Without the copy torch's kernel takes a quarter longer.
    crop = image[..., top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
    (resized,) = F.interpolate(crop, size=(CROP_SIZE, CROP_SIZE), mode="bicubic", antialias=True)
    return resized.flip(-1) if flip else resized


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"step": steps, "loader": loader}[sys.argv[1]](*sys.argv[2:])
