"""Measurement of planned runs on this machine's cores, each for a few seconds, before their times are told."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from aimscale.aim.cost import executed_flops_per_image, mean_scored_tokens
from aimscale.harness.data.store.dataset_info import find_info
from aimscale.harness.device.clock import Clock, remember, remembered, shape_digest
from aimscale.harness.device.gpu_specs import CORE_TFLOPS, MFU
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.row import build_model_config
from aimscale.sweeps.planning.cards import plan_context
from aimscale.sweeps.planning.run import Run
from aimscale.sweeps.planning.speed import is_measurable
from aimscale.sweeps.planning.sweepfile import Sweep

MAX_STEP_S, MAX_SHAPES = 2.0, 12
"""Assumed time of a step up to which a shape is measured, and number of shapes; others are scaled from these."""
LIMIT_S = 300
"""Time limit of a measurement."""


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
        if not isinstance(run.config, RunConfig) or not is_measurable(run, context):
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
