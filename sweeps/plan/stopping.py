"""How long a run is given to save and end: one number for Slurm's signal, for torchrun and for the plan."""

from __future__ import annotations

import math

from aimscale.harness.device.memory import CHECKPOINT_BYTES_PER_PARAM
from aimscale.harness.run.row import model_of
from aimscale.sweeps.plan.planner import Run, counts_of
from aimscale.sweeps.plan.sweepfile import Sweep

MIN_STOP_S = 120
"""Even a small run ends a step, a validation batch or a probe's epoch first."""
STEP_S = 30
"""For the step that is under way, beside a save."""


def save_seconds(sweep: Sweep, run: Run) -> float:
    """Time of one save at the stated `cost.save_gb_per_s`."""
    num_params = counts_of(model_of(run.config.training))[0].total
    return CHECKPOINT_BYTES_PER_PARAM * num_params / (1e9 * sweep.file.cost.save_gb_per_s)


def stop_seconds(sweep: Sweep, run: Run) -> int:
    """Time from being told to stop to being killed: `slurm.signal_delay_s`, or twice a save and a step."""
    given = sweep.file.slurm.signal_delay_s
    if given != "auto":
        return given
    return max(MIN_STOP_S, math.ceil(2 * save_seconds(sweep, run)) + STEP_S)


def stop_warning(sweep: Sweep, run: Run) -> str | None:
    """One sentence where the time that was given by hand is too short for a save."""
    need, given = save_seconds(sweep, run), stop_seconds(sweep, run)
    if given >= need + STEP_S:
        return None
    return (
        f"a save of {run.run_id} takes about {need:.0f} s and {given} s are given (slurm.signal_delay_s): it would be "
        f"killed before it has saved"
    )
