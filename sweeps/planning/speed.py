"""Speed of planned runs: the device on which they are priced, the rates of training and of loading there, and their
measurement on this machine's cores, each for a few seconds, before their times are told."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from aimscale.aim.cost import executed_flops_per_image, mean_scored_tokens
from aimscale.harness.data.store.dataset_info import DatasetLookup, find_info
from aimscale.harness.device.execution import ExecutionPlan
from aimscale.harness.device.memory import ELEMENT_BYTES
from aimscale.harness.device.roofline import step_s
from aimscale.harness.device.speed import (
    CORE_MEMORY_BYTES,
    CORE_TFLOPS,
    DECODED_PER_S,
    MFU,
    Clock,
    Device,
    device_here,
    find_gpu,
    gpu_spec,
    remember,
    remembered,
    shape_digest,
)
from aimscale.harness.run.config import MAX_LOADERS, RunConfig
from aimscale.harness.run.row import build_model_config
from aimscale.sweeps.planning.run import PlanContext, Rates, Run, new_once
from aimscale.sweeps.planning.sweepfile import Sweep, SweepError

ASSUMED_GPU = "H100"
PHOTOGRAPH_BYTES, MIN_LOADING_SHARE = 51_000, 1 / 12
"""File size of the images that `DECODED_PER_S` counts, and the share of their time that the smallest image takes.
Assumption: in between, time is proportional to bytes."""
MAX_STEP_S, MAX_SHAPES = 2.0, 12
"""Assumed time of a step up to which a shape is measured, and number of shapes; others are scaled from these."""
LIMIT_S = 300
"""Time limit of a measurement."""


def plan_context(sweep: Sweep, runs: Sequence[Run], *, takes_measured: bool = True) -> PlanContext:
    """Return what the runs of a plan share."""
    device = _planned_device(sweep, runs)
    return PlanContext(sweep=sweep, device=device, once=new_once(), takes_measured=takes_measured)


def _planned_device(sweep: Sweep, runs: Sequence[Run]) -> Device:
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


def _is_measurable(run: Run, context: PlanContext) -> bool:
    """Return whether a run's times can be measured here: one process on this machine's cores, whose speed the sweep
    file leaves open."""
    cost = context.sweep.file.cost
    is_stated = cost.mfu is not None or cost.peak_tflops is not None or cost.device is not None
    return not (context.device.is_gpu or context.sweep.is_for_slurm or is_stated or run.devices > 1)


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
    takes_measured = context.takes_measured and _is_measurable(run, context)
    if takes_measured and (clock := remembered(config)):
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


def measure_here(
    sweep: Sweep, runs: Sequence[Run], num_devices: int, *, again: bool = False, tell: Callable[[str], None] = print
) -> bool:
    """Measure the shapes of runs that were not measured here yet, at once on as many cores as runs will take.

    The times go into the user's cache. Nothing is measured of runs on GPUs, on Slurm or on several ranks, where the
    sweep file states a speed, without torch, or before the data are packed.

    Args:
        again: whether to measure also what was.
        tell: called with a sentence before it begins.

    Returns:
        Whether the times of all runs are known now.
    """
    context = plan_context(sweep, runs)
    shapes: dict[str, RunConfig] = {}
    for run in runs:
        if not isinstance(run.config, RunConfig) or not _is_measurable(run, context):
            return False
        shapes.setdefault(shape_digest(run.config), run.config)
    wanted = sorted(shapes.values(), key=_step_flops)
    if not again:
        wanted = [config for config in wanted if remembered(config) is None]
    chosen = [config for config in wanted if _step_flops(config) <= MAX_STEP_S * MFU * CORE_TFLOPS * 1e12]
    if len(chosen) > MAX_SHAPES:
        chosen = [chosen[round(i * (len(chosen) - 1) / (MAX_SHAPES - 1))] for i in range(MAX_SHAPES)]
    has_torch = importlib.util.find_spec("torch") and importlib.util.find_spec("deepspeed")
    if chosen and has_torch and all(map(_has_data, chosen)):
        tell(f"measuring {len(chosen)} shapes of runs on {num_devices} cores, a second of each")
        _measure(chosen, min(num_devices, len(chosen)))
    measured = [(config, clock) for config in shapes.values() if (clock := remembered(config)) and clock.is_measured]
    for config in wanted if measured else ():
        if config not in chosen:
            like, clock = min(measured, key=lambda each: abs(_step_flops(each[0]) - _step_flops(config)))
            remember(config, _scaled(clock, _step_flops(config) / _step_flops(like)))
    return all(remembered(config) for config in shapes.values())


def _measure(configs: Sequence[RunConfig], num_processes: int) -> None:
    """Measure configurations in so many processes at the same time; one that fails leaves its shapes unmeasured."""
    with tempfile.TemporaryDirectory(prefix="aimscale-shapes-") as folder:
        processes = []
        for first in range(num_processes):
            paths = []
            for number, config in enumerate(configs[first::num_processes]):
                path = Path(folder) / f"{first}-{number}.yaml"
                path.write_text(config.to_yaml())
                paths.append(str(path))
            threads = {"OMP_NUM_THREADS": str(configs[0].runtime.num_threads)}
            words = [sys.executable, "-m", "aimscale.harness.bench.clock", *paths]
            with (Path(folder) / f"{first}.log").open("wb") as log:
                processes.append(subprocess.Popen(words, env=os.environ | threads, stdout=log, stderr=log))
        for process in processes:
            try:
                process.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _has_data(config: RunConfig) -> bool:
    """Return whether all images that the measurement reads are here."""
    sources = [source.path for source in config.training.data.sources]
    sources += [config.evaluation.validation.path, *(probe.train for probe in config.evaluation.probes)]
    return all("://" not in path and find_info(path) is not None for path in sources)


def _step_flops(config: RunConfig) -> float:
    """Return the FLOPs of a step per thread."""
    model = build_model_config(config.training)
    flops = executed_flops_per_image(model, mean_scored_tokens(model, config.training.objective.prefix)).train
    return flops * config.training.optimiser.batch_size / config.runtime.num_threads


def _scaled(clock: Clock, factor: float) -> Clock:
    """Return the times of a shape of so many times the FLOPs."""
    names = ("step_s", "budget_s", "validation_s", "feature_s")
    return replace(clock, **{name: factor * getattr(clock, name) for name in names}, is_measured=False)
