"""Rehearsals of planned runs: the step of each, on fake tensors and ranks; runs whose steps are equal share one."""

from __future__ import annotations

from collections.abc import Sequence

from aimscale.harness.data.stream.loader import split_step
from aimscale.harness.log.progress import Bar
from aimscale.harness.rehearsal.step import Rehearsal, rehearse
from aimscale.harness.run.row import model_of
from aimscale.harness.step.deepspeed_setup import EngineOptions
from aimscale.sweeps.plan.costs import CostCard
from aimscale.sweeps.plan.planner import Run


def rehearse_runs(runs: Sequence[tuple[Run, CostCard]]) -> dict[str, Rehearsal]:
    """Map the ids of runs that fit their devices to their rehearsed steps."""
    by_shape: dict[str, Rehearsal] = {}
    by_run: dict[str, Rehearsal] = {}
    with Bar() as bar:
        for number, (run, card) in enumerate(runs):
            if card.fit is not None:
                training, plan = run.config.training, card.fit
                optimiser = training.optimiser
                step = {"micro_batch": plan.micro_batch, "rank": 0, "world_size": run.devices}
                shape = {
                    "options": EngineOptions(
                        zero_stage=plan.zero_stage, activation_checkpointing=plan.activation_checkpointing
                    ),
                    "world_size": run.devices,
                    "micro_batches": [len(part) for part in split_step(0, optimiser.batch_size, **step)],
                    "prefix": training.objective.prefix,
                    "on_gpu": card.device.is_gpu,
                }
                model = model_of(training)
                key = repr((model, optimiser.precision, shape))
                bar(f"rehearsing {model.name}", number, len(runs), "runs")
                if key not in by_shape:
                    by_shape[key] = rehearse(model, optimiser, **shape)
                by_run[run.run_id] = by_shape[key]
    return by_run
