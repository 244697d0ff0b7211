"""How a run fits its devices by the memory estimate, and how long it takes to stop."""

from __future__ import annotations

import contextlib
import functools
import math

from aimscale.aim.config import ModelConfig
from aimscale.harness.device.memory import CHECKPOINT_BYTES_PER_PARAM, DoesNotFitError, ExecutionPlan, execution_plan
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


@functools.cache
def device_fit(
    model: ModelConfig, optimiser: OptimiserSection, runtime: RuntimeConfig, devices: int, device_bytes: int
) -> ExecutionPlan | None:
    """The execution plan of a run on devices of this memory; None where nothing fits."""
    with contextlib.suppress(DoesNotFitError):
        return execution_plan(model, optimiser, runtime, world_size=devices, device_bytes=device_bytes)
    return None


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
