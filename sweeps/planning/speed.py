"""Speed of planned runs: the device on which they are priced, and the rates of training and of loading there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from aimscale.aim.cost import executed_flops_per_image, mean_scored_tokens
from aimscale.harness.data.store.dataset_info import DatasetLookup
from aimscale.harness.device.clock import Clock, remembered
from aimscale.harness.device.execution import ExecutionPlan
from aimscale.harness.device.gpu_specs import (
    CORE_MEMORY_BYTES,
    DECODED_PER_S,
    MFU,
    Device,
    device_here,
    find_gpu,
    gpu_spec,
)
from aimscale.harness.device.memory import ELEMENT_BYTES
from aimscale.harness.device.roofline import step_s
from aimscale.harness.run.config import MAX_LOADERS, RunConfig
from aimscale.harness.run.row import build_model_config
from aimscale.sweeps.planning.run import PlanContext, Rates, Run
from aimscale.sweeps.planning.sweepfile import Sweep, SweepError

ASSUMED_GPU = "H100"
PHOTOGRAPH_BYTES, MIN_LOADING_SHARE = 51_000, 1 / 12
"""File size of the images that `DECODED_PER_S` counts, and the share of their time that the smallest image takes.
Assumption: in between, time is proportional to bytes."""


def planned_device(sweep: Sweep, runs: Sequence[Run]) -> Device:
    """Return the device on which all runs are priced.

    It is `cost.device` if that is given; with a `slurm` section, the GPU that it asks for, an H100 if it names none, or
    a core of a node; else this machine's GPU, or one of its cores.
    """
    cost, slurm = sweep.file.cost, sweep.file.slurm
    wants_cpu = all(run.wants_cpu for run in runs)
    if cost.device is not None:
        name, origin, is_gpu = cost.device, "cost.device", "cpu" not in cost.device.lower()
    elif not sweep.is_for_slurm:
        here = device_here(wants_cpu=wants_cpu)
        memory_bytes = here.memory_bytes if cost.memory_gb is None else round(cost.memory_gb * 1e9)
        return replace(here, peak_tflops=cost.peak_tflops or here.peak_tflops, memory_bytes=memory_bytes)
    elif wants_cpu or not slurm.gpus:
        name, origin, is_gpu = "CPU", "one core of a Slurm job", False
    elif slurm.gpus is True:
        name, origin, is_gpu = ASSUMED_GPU, "assumed of Slurm's GPUs, since slurm.gpus names no type", True
    else:
        name, origin, is_gpu = slurm.gpus, "slurm.gpus", True
    spec = find_gpu(name)
    if is_gpu and spec is None and None in (cost.peak_tflops, cost.memory_gb):
        raise SweepError(
            f"{sweep.source}: no data sheet of {origin} '{name}'; give cost.peak_tflops and cost.memory_gb"
        )
    usual_bytes = spec.memory_gb * 1e9 if spec else CORE_MEMORY_BYTES * slurm.cpus_per_task
    return Device(
        name=name,
        is_gpu=is_gpu,
        why=origin,
        memory_bytes=round(usual_bytes if cost.memory_gb is None else cost.memory_gb * 1e9),
        peak_tflops=cost.peak_tflops,
        cores=slurm.cpus_per_task if sweep.is_for_slurm else None,
    )


def is_measurable(run: Run, context: PlanContext) -> bool:
    """Return whether a run's times can be measured here: one process on this machine's cores, whose speed the sweep
    file leaves open."""
    cost = context.sweep.file.cost
    is_stated = cost.mfu is not None or cost.peak_tflops is not None or cost.device is not None
    return not (context.device.is_gpu or context.sweep.is_for_slurm or is_stated or run.devices > 1)


def measured_clock(config: RunConfig, run: Run, context: PlanContext) -> Clock | None:
    """Return the times of a run that were measured here, if any."""
    return remembered(config) if context.takes_measured and is_measurable(run, context) else None


def expected_rates(
    config: RunConfig, run: Run, fit: ExecutionPlan | None, context: PlanContext, lookup: DatasetLookup
) -> Rates:
    """Estimate how fast a run trains on its devices: at the stated MFU; or a GPU by a roofline, and a core by the
    assumed MFU."""
    training, runtime, sweep, device = config.training, config.runtime, context.sweep, context.device
    model = build_model_config(training)
    scored_tokens = mean_scored_tokens(model, training.objective.prefix)
    flops = executed_flops_per_image(model, scored_tokens).train
    optimiser, num_devices = training.optimiser, run.devices
    peak = device.flops_per_s(optimiser.precision) * (1 if device.is_gpu else runtime.num_threads)
    mfu = sweep.file.cost.mfu or MFU
    if device.is_gpu and sweep.file.cost.mfu is None and fit is not None:
        taken_s = step_s(
            model,
            fit,
            gpu_spec(device),
            batch_size=optimiser.batch_size,
            scored_tokens=scored_tokens,
            element=ELEMENT_BYTES[optimiser.precision],
            num_devices=num_devices,
            devices_per_node=sweep.file.slurm.devices_per_node if sweep.is_for_slurm else num_devices,
            is_compiled=runtime.compile is True or (runtime.compile == "auto" and fit.zero_stage < 3),
        )
        mfu = flops * optimiser.batch_size / (taken_s * num_devices * peak)
    file_bytes = 0.0
    for source in training.data.sources:
        info = lookup(source.path)
        file_bytes += source.probability * (info.total_bytes / max(1, info.num_samples) if info else PHOTOGRAPH_BYTES)
    if clock := measured_clock(config, run, context):
        rate = optimiser.batch_size / clock.step_s
        return Rates(
            mfu=flops * rate / peak, flops_per_image=flops, compute_per_s=rate, loaded_per_s=math.inf, clock=clock
        )
    cores = device.cores or MAX_LOADERS + 1
    loaders = max(1, min(runtime.loader_processes(is_gpu=device.is_gpu, cores=cores), cores))
    return Rates(
        mfu=mfu,
        flops_per_image=flops,
        compute_per_s=num_devices * mfu * peak / flops,
        loaded_per_s=num_devices * loaders * DECODED_PER_S / max(MIN_LOADING_SHARE, file_bytes / PHOTOGRAPH_BYTES),
    )
