"""Throughput and memory of a training step on random images, against the measured matrix-multiplication peak."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from aimscale.aim.config import ModelConfig
from aimscale.aim.cost import param_count
from aimscale.harness.data.stream.loader import count_targets
from aimscale.harness.data.stream.stream import Batch, masks
from aimscale.harness.device.execution import EngineOptions, execution_plan, should_compile
from aimscale.harness.device.memory import peak_memory_bytes
from aimscale.harness.device.speed import device_name, has_fast_link, measure_peak, utilisation
from aimscale.harness.distributed.group import find_placement, start_group, stop_group
from aimscale.harness.log.progress import Bar
from aimscale.harness.run.config import RunConfig, build_model_config
from aimscale.harness.run.provenance import process_age_s
from aimscale.harness.step.engine import Engine

NUM_WARM_UP = 3
"""Number of steps before those that are timed."""


def run(config: RunConfig, *, num_steps: int = 20) -> dict[str, Any]:
    """Time optimiser steps after some to warm up; budgets and evaluations of the configuration do not matter.

    Returns:
        The median time of a step with images ready, the rate at it, and how it was executed; MFU as `device.speed`
        states it and, as `cost.mfu` counts it, `mfu_nominal`; `memory_bytes`, the device's or on a CPU the process's,
        beside the estimate; `startup_s`, which ends with the first step.
    """
    model, optimiser, runtime = build_model_config(config.training), config.training.optimiser, config.runtime
    group = start_group(find_placement(), runtime.device)
    try:
        peak = group.broadcast_from_rank0(lambda: measure_peak(group.device, optimiser.precision))
        device_bytes = group.min_over_ranks(group.memory_bytes())
        name, is_gpu = group.broadcast_from_rank0(lambda: device_name(group.device)), group.device.type == "cuda"
        where = {"world_size": group.world_size, "device_bytes": device_bytes}
        plan = execution_plan(config.training, runtime, **where, is_gpu=is_gpu, is_linked=has_fast_link(name))
        options = EngineOptions(
            zero_stage=plan.zero_stage,
            activation_checkpointing=plan.activation_checkpointing,
            compile=should_compile(runtime.compile, group.device, plan.zero_stage),
        )
        on_host = random_batches(model, optimiser.batch_size // group.world_size, plan.micro_batch)
        step = [batch.on(group.device) for batch in on_host]
        num_targets = group.world_size * count_targets(step, model.num_tokens)
        engine = Engine(model, optimiser, options, group)
        times, startup_s = [], 0.0
        with Bar(shows=group.is_first) as bar:
            for number in range(NUM_WARM_UP + num_steps):
                bar("timing", number, NUM_WARM_UP + num_steps, "steps")
                started = time.perf_counter()
                engine.step(step, num_targets=num_targets, lr=1e-3).loss_sum.item()
                times.append(time.perf_counter() - started)
                startup_s = startup_s or process_age_s()
        memory_bytes = peak_memory_bytes(group.device)
        engine.close()
    finally:
        stop_group()
    step_s = statistics.median(times[NUM_WARM_UP:])
    images_per_s, scored = optimiser.batch_size / step_s, num_targets / optimiser.batch_size
    measured = utilisation(model, peak, images_per_s=images_per_s, scored_tokens=scored, world_size=group.world_size)
    nominal, mfu = peak.nominal_flops_per_s, measured["mfu"]
    return {
        "size": model.name,
        "params": param_count(model).total,
        "batch_size": optimiser.batch_size,
        "precision": optimiser.precision,
        **plan.settings(device=device_name(group.device), world_size=group.world_size),
        "compiled": options.compile,
        "num_threads": torch.get_num_threads(),
        "ms_per_step": 1000 * step_s,
        "images_per_s": images_per_s,
        **measured,
        "mfu_nominal": mfu * peak.flops_per_s / nominal if mfu and nominal else None,
        "peak_flops_per_s": peak.flops_per_s,
        "nominal_flops_per_s": nominal,
        "memory_estimate_bytes": plan.memory_bytes,
        "memory_bytes": memory_bytes,
        "startup_s": startup_s,
    }


def random_batches(config: ModelConfig, batch_size: int, micro_batch: int) -> list[Batch]:
    """Make a step of random images with paired prefixes, or masks."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, config.channels, config.image_size, config.image_size)
    images = torch.randn(shape, generator=generator)
    first = torch.randint(1, config.num_tokens, (-(-batch_size // 2),), generator=generator)
    prefix_lengths = torch.stack([first, config.num_tokens - first], dim=1).reshape(-1)[:batch_size]
    positions = torch.arange(batch_size)
    if config.masked is not None:
        prefix_lengths = torch.from_numpy(masks(0, positions.numpy(), config))
    parts = (torch.split(part, micro_batch) for part in (images, prefix_lengths, positions))
    return [Batch(images=i, prefix_lengths=g, positions=p) for i, g, p in zip(*parts, strict=True)]
