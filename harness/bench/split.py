"""Measured breakdown of a step's time: computation, communication that nothing hides, images, and the rest."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from aimscale.harness.bench.reference import ReferenceEngine
from aimscale.harness.data.stream.loader import rank_batches
from aimscale.harness.data.stream.stream import TrainStream
from aimscale.harness.device.distributed import Group
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.row import model_of
from aimscale.harness.step.engine import Engine
from aimscale.harness.step.feed import Feed

NUM_STEPS = 3
"""Number of steps that are profiled."""
WARM_UP = 3
"""Number of first steps whose waits for images do not count: loader processes are starting."""

Span = tuple[float, float]


def step_shares(take_step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Measure shares of a step's time: `compute`, while anything is computed, the optimiser included;
    `exposed_communication`, while something is sent or awaited and nothing is computed; and `other`, while the device
    is idle, since the host prepares, launches or waits.

    They are measured by torch's profiler, which slows small steps, so only shares are meaningful. On a GPU kernels
    count, NCCL's as communication; these last until the slowest rank is there. On a CPU operators count, and gloo's
    collectives.

    Args:
        take_step: returns when the step is done on the device.
    """
    on_gpu = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler writes to stderr when it starts and stops
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        started = time.perf_counter()
        for _ in range(NUM_STEPS):
            take_step()
        wall_us = 1e6 * (time.perf_counter() - started)
    return shares_of(recorded.events() or (), wall_us, on_gpu=on_gpu)


def shares_of(events: Iterable[Any], wall_us: float, *, on_gpu: bool) -> dict[str, float]:
    """Compute those shares from the profiler's events over `wall_us`."""
    computed: list[Span] = []
    sent: list[Span] = []
    for event in events:
        span = event.time_range.start, event.time_range.end
        if on_gpu and event.is_user_annotation:  # it spans kernels and the gaps between them
            continue
        if event.name.startswith("gloo:") or (on_gpu and "nccl" in event.name.lower()):
            sent.append(span)
        elif event.device_type == DeviceType.CUDA if on_gpu else event.name.startswith("aten::"):
            computed.append(span)
    compute = covered(computed) / wall_us
    exposed = covered([*computed, *sent]) / wall_us - compute
    return {"compute": compute, "exposed_communication": exposed, "other": 1 - compute - exposed}


def covered(spans: Iterable[Span]) -> float:
    """Return the length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def image_wait_s(
    config: RunConfig, engine: Engine | ReferenceEngine, group: Group, *, micro_batch: int, num_steps: int
) -> float:
    """Measure the mean wait of a step for its images, read from the configuration's data while steps are computed."""
    batch_size, num_workers = config.training.optimiser.batch_size, config.runtime.num_workers
    batches = rank_batches(
        TrainStream(config),
        group=group,
        start=0,
        stop=(WARM_UP + num_steps) * batch_size,
        batch_size=batch_size,
        micro_batch=micro_batch,
        num_workers=num_workers,
    )
    num_tokens = model_of(config.training).num_tokens
    feed = Feed(group, num_tokens=num_tokens, max_bad_fraction=1.0, has_workers=num_workers > 0)
    waits = []
    with feed.reading(batches):
        for _ in range(WARM_UP + num_steps):
            step = feed.next(num_images=batch_size, num_bad=0)
            engine.step(step.micro_batches, num_targets=step.num_targets, lr=1e-3).loss_sum.item()
            step.micro_batches.clear()
            waits.append(step.wait_s)
    return statistics.fmean(waits[WARM_UP:])
