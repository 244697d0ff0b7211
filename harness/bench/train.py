"""Throughput of a training step against PyTorch's own engines and the measured matrix-multiplication peak.

FSDP2 and the bare loop (`harness.bench.reference`) step the same model: their ratios are what DeepSpeed costs.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from aimscale.aim.config import ModelConfig
from aimscale.aim.cost import param_count
from aimscale.aim.model import AIM
from aimscale.harness.bench.expected import expected_rates
from aimscale.harness.bench.reference import ReferenceEngine
from aimscale.harness.bench.split import image_wait_s, step_shares
from aimscale.harness.data.store.dataset_info import find_info
from aimscale.harness.data.stream.stream import Batch, masks
from aimscale.harness.device.distributed import Group, find_placement, start_group, stop_group
from aimscale.harness.device.execution import ExecutionPlan, execution_plan
from aimscale.harness.device.gpu_specs import device_here
from aimscale.harness.device.peak import device_name, measure_peak, utilisation
from aimscale.harness.log.progress import Bar
from aimscale.harness.log.record import device_memory_bytes
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.provenance import process_age_s
from aimscale.harness.run.row import model_of
from aimscale.harness.step.deepspeed_setup import EngineOptions
from aimscale.harness.step.engine import Engine, should_compile
from aimscale.harness.step.feed import count_targets

T = TypeVar("T")


def run(config: RunConfig, *, num_steps: int = 20, with_references: bool = True, loads: bool = False) -> dict[str, Any]:
    """Time `num_steps` optimiser steps of our engine and of the references, after three warm-up steps each.

    On a CPU all take turns, since other processes slow them. A GPU is ours alone and holds one model at a time.

    Args:
        config: model, optimiser and runtime, used on random images; budgets and evaluations do not matter.
        with_references: time FSDP2 and, on one rank, the bare loop, too.
        loads: also read the configuration's data, and measure how long steps wait for them.

    Returns:
        `ms_per_step` is the median with images ready, `images_per_s` the rate at it; `mfu_published` and `mfu` as in
        `device.peak.utilisation`, with their peaks; `memory_bytes` is the device's, or on a CPU the process's, before
        the bare loop exists, `memory_estimate_bytes` that of `device.memory`; `startup_s` ends with the first step.
        `split_ms` is a step of ours, see `bench.split`: `compute`, `exposed_communication` and `other` add up to
        `ms_per_step`, and `loader`, the wait for images, comes on top (null without `loads`); `split_estimate_ms` is
        the plan's, without `other`.
        `others`: of `fsdp2` (PyTorch's own sharding) and `bare` (a plain loop on one rank, bf16 by autocast) the median
        `ms_per_step` and `ours_over_it`, the median ratio of neighbouring steps, or on a GPU of steps one after the
        other.
    """
    model, optimiser, runtime = model_of(config.training), config.training.optimiser, config.runtime
    group = start_group(find_placement(), runtime.device)
    peak = group.from_first(lambda: measure_peak(group.device, optimiser.precision))
    world_size, pace = group.world_size, group.from_first(lambda: group.pace(peak))
    device_bytes = group.min_over_ranks(group.memory_bytes())
    plan = execution_plan(config.training, runtime, pace=pace, world_size=world_size, device_bytes=device_bytes)
    options = EngineOptions(
        zero_stage=plan.zero_stage,
        activation_checkpointing=plan.activation_checkpointing,
        compile=should_compile(runtime.compile, group.device, plan.zero_stage),
    )
    on_host = random_batches(model, optimiser.batch_size // group.world_size, plan.micro_batch)
    step = [batch.on(group.device) for batch in on_host]  # as in a run, which moves them one step ahead
    num_targets = group.world_size * count_targets(step, model.num_tokens)
    try:
        makers = _engines(config, options, group, with_references=with_references)

        def look(
            engine: Engine | ReferenceEngine, take_step: Callable[[], float]
        ) -> tuple[dict[str, float], float | None]:
            shares = step_shares(take_step, group.device)
            if not loads:
                return shares, None
            return shares, image_wait_s(config, engine, group, micro_batch=plan.micro_batch, num_steps=num_steps)

        times, memory_bytes, startup_s, (shares, wait_s) = _time(makers, step, num_targets, num_steps, group, look)
    finally:
        stop_group()
    ours_s = statistics.median(times["ours"])
    images_per_s = optimiser.batch_size / ours_s
    scored = num_targets / optimiser.batch_size
    return {
        "size": model.name,
        "params": param_count(model).total,
        "batch_size": optimiser.batch_size,
        "micro_batch": plan.micro_batch,
        "world_size": group.world_size,
        "precision": optimiser.precision,
        "zero_stage": plan.zero_stage,
        "activation_checkpointing": plan.activation_checkpointing,
        "compiled": options.compile,
        "device": device_name(group.device),
        "num_threads": torch.get_num_threads(),
        "ms_per_step": 1000 * ours_s,
        "images_per_s": images_per_s,
        **utilisation(model, peak, images_per_s=images_per_s, scored_tokens=scored, world_size=group.world_size),
        "peak_flops_per_s": peak.flops_per_s,
        "nominal_flops_per_s": peak.nominal_flops_per_s,
        "split_ms": {
            **{name: 1000 * share * ours_s for name, share in shares.items()},
            "loader": None if wait_s is None else 1000 * wait_s,
        },
        "split_estimate_ms": {
            "compute": 1000 * plan.step.compute_s,
            "exposed_communication": 1000 * plan.step.exposed_communication_s,
            "loader": 1000 * _image_wait_s(config, plan, group) if loads else None,
        },
        "others": {name: _beside(times["ours"], its) for name, its in times.items() if name != "ours"},
        "memory_estimate_bytes": plan.memory_bytes,
        "memory_bytes": memory_bytes,
        "startup_s": startup_s,
    }


def _image_wait_s(config: RunConfig, plan: ExecutionPlan, group: Group) -> float:
    """Estimate how long a step waits for its images."""
    device = device_here(wants_cpu=group.device.type == "cpu")
    rates = expected_rates(config, group.world_size, device, plan, mfu=None, lookup=find_info)
    return max(0.0, rates.loading_s - rates.step_s) if rates.is_ahead else rates.loading_s


def _beside(ours: list[float], its: list[float]) -> dict[str, float]:
    """Compare the step times of another engine with ours."""
    ratios = [our / other for our, other in zip(ours, its, strict=True)]
    return {"ms_per_step": 1000 * statistics.median(its), "ours_over_it": statistics.median(ratios)}


def _engines(
    config: RunConfig, options: EngineOptions, group: Group, *, with_references: bool
) -> dict[str, Callable[[], Engine | ReferenceEngine]]:
    """Return a factory for each engine, by its name in `others`; ours comes first."""
    model, optimiser = model_of(config.training), config.training.optimiser

    def reference(*, sharded: bool) -> ReferenceEngine:
        return ReferenceEngine(AIM(model), optimiser, options, group, sharded=sharded)

    makers: dict[str, Callable[[], Engine | ReferenceEngine]] = {
        "ours": lambda: Engine(model, optimiser, options, group)
    }
    if with_references:
        makers["fsdp2"] = lambda: reference(sharded=True)
    if with_references and group.world_size == 1:
        makers["bare"] = lambda: reference(sharded=False)
    return makers


def _time(
    makers: dict[str, Callable[[], Engine | ReferenceEngine]],
    step: list[Batch],
    num_targets: int,
    num_steps: int,
    group: Group,
    look: Callable[[Engine | ReferenceEngine, Callable[[], float]], T],
) -> tuple[dict[str, list[float]], int, float, T]:
    """Time every engine's steps; returns seconds per step, memory before the second engine is made, seconds to the end
    of the first step, and the result of `look` on the first engine and its step, called after that was timed."""

    def step_s(engine: Engine | ReferenceEngine) -> float:
        started = time.perf_counter()
        engine.step(step, num_targets=num_targets, lr=1e-3).loss_sum.item()
        return time.perf_counter() - started

    is_on_cpu = group.device.type == "cpu"
    times: dict[str, list[float]] = {}
    memory_bytes, startup_s = 0, 0.0
    seen: list[T] = []
    for together in [list(makers)] if is_on_cpu else [[name] for name in makers]:
        engines = {}
        for name in together:
            engines[name] = makers[name]()
            for _ in range(3):
                step_s(engines[name])
                startup_s = startup_s or process_age_s()
            memory_bytes = memory_bytes or device_memory_bytes(group)
        rounds = []
        with Bar(shows=group.is_first) as bar:
            for number in range(num_steps):
                bar(f"timing {', '.join(engines)}", number, num_steps, "steps")
                rounds.append({name: step_s(engine) for name, engine in engines.items()})
            times |= {name: [each[name] for each in rounds] for name in engines}
            for name in engines:  # the standard output is JSON alone
                bar.say(f"{name}: {1000 * statistics.median(times[name]):,.1f} ms/step", err=True)
        if not seen:
            first = engines[together[0]]
            seen.append(look(first, functools.partial(step_s, first)))
        while engines:
            engines.popitem()[1].close()
        if not is_on_cpu:
            torch.cuda.empty_cache()
    return times, memory_bytes, startup_s, seen[0]


def random_batches(config: ModelConfig, batch_size: int, micro_batch: int) -> list[Batch]:
    """Make a step of random images with paired prefixes, or masks."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, config.channels, config.image_size, config.image_size)
    images = torch.randn(shape, generator=generator)
    first = torch.randint(1, config.num_tokens, (batch_size // 2,), generator=generator)
    prefix_lengths = torch.stack([first, config.num_tokens - first], dim=1).reshape(-1)
    positions = torch.arange(batch_size)
    if config.masked is not None:
        prefix_lengths = torch.from_numpy(masks(0, positions.numpy(), config))
    parts = (torch.split(part, micro_batch) for part in (images, prefix_lengths, positions))
    return [Batch(images=i, prefix_lengths=g, positions=p) for i, g, p in zip(*parts, strict=True)]
