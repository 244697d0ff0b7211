"""Throughput of one training step against two plain PyTorch loops and the measured matrix-multiplication peak.

The bare loop is ours without DeepSpeed and bookkeeping: its ratio is what those cost. The peer (`harness.bench.peer`)
is the loop that others write: its ratio is what scoring only what counts, paired prefixes and faster kernels gain.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from aimscale.aim.config import ModelConfig
from aimscale.aim.cost import param_count
from aimscale.aim.model import AIM
from aimscale.harness.bench.peer import peer_step
from aimscale.harness.data.stream.batch import Batch
from aimscale.harness.device.distributed import find_placement, start_group, stop_group
from aimscale.harness.device.memory import execution_plan
from aimscale.harness.device.peak import device_name, measure_peak, utilisation
from aimscale.harness.log.record import device_memory_bytes
from aimscale.harness.run.config import OptimiserSection
from aimscale.harness.run.provenance import process_age_s
from aimscale.harness.step.engine import Engine, EngineOptions
from aimscale.harness.step.feed import count_targets


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainBench:
    """What `aimscale bench train` measured."""

    size: str
    """Model."""
    params: int
    """Parameters, pixel head included."""
    batch_size: int
    """Images per step."""
    micro_batch: int
    """Images per forward pass."""
    precision: str
    """fp32 or bf16."""
    zero_stage: int
    """DeepSpeed ZeRO stage."""
    activation_checkpointing: bool
    """Whether activations are recomputed."""
    compiled: bool
    """Whether the blocks are compiled."""
    device: str
    """Device model."""
    num_threads: int
    """Torch threads (CPU)."""
    ms_per_step: float
    """Median over the timed steps, images ready."""
    images_per_s: float
    """At that rate."""
    mfu_published: float | None
    """FLOPs by the published formula over the device's nominal peak; null where no nominal peak is known."""
    mfu_executed: float | None
    """FLOPs executed over the nominal peak."""
    mfu: float
    """FLOPs executed over the measured peak."""
    peak_flops_per_s: float
    """Matrix-multiplication rate measured in the same process."""
    nominal_flops_per_s: float | None
    """The data sheet's."""
    bare_ms_per_step: float
    """The same model, batch and optimiser in a plain PyTorch loop, steps interleaved with ours."""
    ratio_to_bare: float
    """Median of the ratio within neighbouring steps."""
    memory_bytes: int
    """Peak of the device, or of the process on a CPU, before the bare loop exists."""
    memory_estimate_bytes: int
    """By `harness.device.memory`."""
    startup_s: float
    """From the start of the process to the end of the first step."""
    data_wait: float | None = None
    """Share of the time spent waiting for images; null when no data set was given."""
    peer_ms_per_step: float | None = None
    """A plain loop that trains as the paper describes, steps interleaved with ours; null when not asked for."""
    ratio_to_peer: float | None = None
    """Median of the ratio within neighbouring steps."""


def run(
    model_config: ModelConfig,
    optimiser: OptimiserSection,
    *,
    zero_stage: Literal["auto"] | int = "auto",
    micro_batch: Literal["auto"] | int = "auto",
    activation_checkpointing: Literal["auto"] | bool = "auto",
    compile_blocks: bool = False,
    device: str = "auto",
    num_steps: int = 20,
    batches: Iterator[list[Batch]] | None = None,
    with_peer: bool = False,
) -> TrainBench:
    """Time `num_steps` optimiser steps of ours and of plain loops, alternating, after three of each to warm up.

    Args:
        model_config: the model.
        optimiser: batch size, precision and the rest.
        zero_stage: as in the runtime configuration.
        micro_batch: as in the runtime configuration.
        activation_checkpointing: as in the runtime configuration.
        compile_blocks: torch.compile the blocks (ours and the bare loop's).
        device: `auto`, `cpu` or `cuda`.
        num_steps: timed steps.
        batches: the training loader, to measure the wait for data; None takes random images.
        with_peer: time the peer, too.
    """
    group = start_group(find_placement(), device)
    plan = execution_plan(
        model_config,
        batch_size=optimiser.batch_size,
        world_size=group.world_size,
        precision=optimiser.precision,
        device_bytes=group.memory_bytes(),
        zero_stage=zero_stage,
        micro_batch=micro_batch,
        activation_checkpointing=activation_checkpointing,
        on_cpu=group.device.type == "cpu",
    )
    try:
        options = EngineOptions(
            zero_stage=plan.zero_stage,
            activation_checkpointing=plan.activation_checkpointing,
            compile=compile_blocks,
        )
        engine = Engine(AIM(model_config), optimiser, options, group)
        step = random_batches(model_config, optimiser.batch_size, plan.micro_batch)
        num_targets = count_targets(step, model_config.num_tokens)

        def ours() -> Tensor:
            return engine.step(step, num_targets=num_targets, lr=optimiser.lr_peak).loss_sum

        _timed(ours)
        startup_s = process_age_s()
        for _ in range(2):
            _timed(ours)
        memory = device_memory_bytes(group)
        loops = [ours, bare_step(model_config, optimiser, step, num_targets, group.device, options)]
        if with_peer:
            loops.append(peer_step(model_config, optimiser, step, group.device))
        for loop in loops[1:]:
            for _ in range(3):
                _timed(loop)
        rounds = [[_timed(loop) for loop in loops] for _ in range(num_steps)]
        our_s, *other_s = (statistics.median(times) for times in zip(*rounds, strict=True))
        ratios = [statistics.median(times[0] / times[index] for times in rounds) for index in range(1, len(loops))]
        peak = measure_peak(group.device, optimiser.precision)
        images_per_s = optimiser.batch_size / our_s
        return TrainBench(
            size=model_config.name,
            params=param_count(model_config).total,
            batch_size=optimiser.batch_size,
            micro_batch=plan.micro_batch,
            precision=optimiser.precision,
            zero_stage=plan.zero_stage,
            activation_checkpointing=plan.activation_checkpointing,
            compiled=compile_blocks,
            device=device_name(group.device),
            num_threads=torch.get_num_threads(),
            ms_per_step=1000 * our_s,
            images_per_s=images_per_s,
            **utilisation(  # type: ignore[arg-type]
                model_config,
                peak,
                images_per_s=images_per_s,
                scored_tokens=num_targets / optimiser.batch_size,
                world_size=group.world_size,
            ),
            peak_flops_per_s=peak.flops_per_s,
            nominal_flops_per_s=peak.nominal_flops_per_s,
            bare_ms_per_step=1000 * other_s[0],
            ratio_to_bare=ratios[0],
            peer_ms_per_step=1000 * other_s[1] if with_peer else None,
            ratio_to_peer=ratios[1] if with_peer else None,
            memory_bytes=memory,
            memory_estimate_bytes=plan.estimate.total,
            startup_s=startup_s,
            data_wait=None if batches is None else _data_wait(engine, batches, num_steps, model_config.num_tokens),
        )
    finally:
        stop_group()


def random_batches(config: ModelConfig, batch_size: int, micro_batch: int) -> list[Batch]:
    """A step of random images with paired prefixes."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, config.channels, config.image_size, config.image_size)
    images = torch.randn(shape, generator=generator)
    first = torch.randint(1, config.num_tokens, (batch_size // 2,), generator=generator)
    prefix_len = torch.stack([first, config.num_tokens - first], dim=1).reshape(-1)
    positions = torch.arange(batch_size)
    parts = (torch.split(part, micro_batch) for part in (images, prefix_len, positions))
    return [Batch(images=i, prefix_len=s, positions=p) for i, s, p in zip(*parts, strict=True)]


def bare_step(
    config: ModelConfig,
    optimiser: OptimiserSection,
    step: list[Batch],
    num_targets: int,
    device: torch.device,
    options: EngineOptions,
) -> Callable[[], Tensor]:
    """One step of the loop that anybody would write: fused AdamW, clipping, autocast for bf16."""
    model = AIM(config).to(device)
    model.set_activation_checkpointing(options.activation_checkpointing)
    if options.compile:
        model.compile_blocks()
    adamw = torch.optim.AdamW(
        model.param_groups(optimiser.weight_decay),
        lr=optimiser.lr_peak,
        betas=optimiser.betas,
        eps=optimiser.eps,
        fused=True,
    )

    def one() -> Tensor:
        total = torch.zeros((), device=device)
        for batch in step:
            images = batch.images_on(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=optimiser.precision == "bf16"):
                loss_sum, _ = model(images, batch.prefix_len)
            (loss_sum / num_targets).backward()
            total += loss_sum.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimiser.clip_norm)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return total

    return one


def _timed(step: Callable[[], Tensor]) -> float:
    """Seconds of one step, to the moment its loss is on the host."""
    started = time.perf_counter()
    step().item()
    return time.perf_counter() - started


def _data_wait(engine: Engine, batches: Iterator[list[Batch]], num_steps: int, num_tokens: int) -> float:
    """Share of the time that a loop over real batches waits for the loader."""
    next(batches)
    waited, started = 0.0, time.perf_counter()
    for _ in range(num_steps):
        before = time.perf_counter()
        step = next(batches)
        waited += time.perf_counter() - before
        engine.step(step, num_targets=count_targets(step, num_tokens), lr=0.0).loss_sum.item()
    return waited / (time.perf_counter() - started)
