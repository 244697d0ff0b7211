"""How a run fits its devices by the memory estimate, and how long it takes to stop."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from aimscale.aim.config import ModelConfig
from aimscale.harness.device.memory import (
    CHECKPOINT_BYTES_PER_PARAM,
    DoesNotFitError,
    ExecutionPlan,
    execution_plan,
    memory_bytes,
)
from aimscale.harness.run.config import OptimiserSection, RuntimeConfig
from aimscale.harness.run.row import model_of
from aimscale.sweeps.plan.planner import Run, counts_of
from aimscale.sweeps.plan.sweepfile import Sweep

MIN_STOP_S = 120
"""Even a small run ends a step, a validation batch or a probe's epoch first."""
STEP_S = 30
"""For the step that is under way, beside a save."""
SAVE_BYTES_PER_S = 0.5e9
"""Assumption: the rate at which a checkpoint reaches a shared disk."""


@dataclass(frozen=True, kw_only=True)
class DeviceFit:
    """How a run fits its devices."""

    chosen: ExecutionPlan | None
    """Stage, micro-batch and recomputation; null where nothing fits."""
    by_stage: dict[int, int]
    """Bytes of a rank at every stage, at that micro-batch (1 where nothing fits)."""


@functools.cache
def device_fit(
    model: ModelConfig, optimiser: OptimiserSection, runtime: RuntimeConfig, devices: int, device_bytes: int
) -> DeviceFit:
    """The execution plan of a run on devices of this memory, and what it would take at every stage."""
    try:
        chosen = execution_plan(model, optimiser, runtime, world_size=devices, device_bytes=device_bytes)
    except DoesNotFitError:
        chosen = None
    precision = optimiser.precision
    by_stage = {
        stage: memory_bytes(
            model,
            zero_stage=stage,
            world_size=devices,
            micro_batch=chosen.micro_batch if chosen else 1,
            precision=precision,
            activation_checkpointing=chosen.activation_checkpointing if chosen else True,
        )
        for stage in ((0, 1, 2, 3) if precision == "fp32" else (1, 2, 3))  # bf16 needs the master weights of 1 and up
    }
    return DeviceFit(chosen=chosen, by_stage=by_stage)


def stop_seconds(sweep: Sweep, run: Run) -> int:
    """Time from being told to stop to being killed, for Slurm's signal and for torchrun.

    `slurm.signal_delay_s`, or twice a save and a step.
    """
    given = sweep.file.slurm.signal_delay_s
    if given != "auto":
        return given
    num_params = counts_of(model_of(run.config.training))[0].total
    save_s = CHECKPOINT_BYTES_PER_PARAM * num_params / SAVE_BYTES_PER_S
    return max(MIN_STOP_S, math.ceil(2 * save_s) + STEP_S)
