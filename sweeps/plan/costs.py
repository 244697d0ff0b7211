"""The cost card of a planned run: what it holds, takes and costs, from closed formulas and stated assumptions."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from aimscale.aim.config import ModelConfig
from aimscale.aim.cost import executed_flops_per_image, mean_scored_tokens
from aimscale.analysis.fitting.identification import unidentified
from aimscale.analysis.laws.catalogue import CHINCHILLA
from aimscale.harness.data.store.card import num_images
from aimscale.harness.device.memory import CHECKPOINT_BYTES_PER_PARAM, DoesNotFitError, ExecutionPlan, execution_plan
from aimscale.harness.run.config import OptimiserSection, RunConfig, RuntimeConfig
from aimscale.harness.run.row import model_of
from aimscale.harness.run.schedule import unchecked_schedule
from aimscale.sweeps.plan.evaluation_cost import ProbeCost, evaluation_flops, probe_costs
from aimscale.sweeps.plan.planner import Run, counts_of
from aimscale.sweeps.plan.sweepfile import Sweep

WEIGHTS_BYTES_PER_PARAM = 4
"""Final weights of a budget, fp32."""
MIN_STOP_S = 120
"""Even a small run ends a step, a validation batch or a probe's epoch first."""
STEP_S = 30
"""For the step that is under way, beside a save."""
SAVE_BYTES_PER_S = 0.5e9
"""Assumption: the rate at which a checkpoint reaches a shared disk."""

MAX_EPOCHS = 4

CautionKind = Literal["memory", "epochs", "pool", "warm-up", "stream"]


@dataclass(frozen=True, kw_only=True)
class Caution:
    """One thing to look at."""

    kind: CautionKind
    subject: str
    """A size, a number of images or a field: what it is about."""
    found: float = 0.0
    limit: float = 0.0
    """What `found` is held against."""


@dataclass(frozen=True, kw_only=True)
class BudgetCost:
    """One row that a run will give."""

    images_seen: int
    epochs: float | None
    """D / U; null where the pool's size is unknown."""
    flops: float
    """C: training FLOPs to this budget by the published formula."""
    flops_6nd: float
    """6 N D with N trunk, head and preprocessor and D in images x tokens."""


@dataclass(frozen=True, kw_only=True)
class CostCard:
    """What one run costs."""

    run_id: str
    cell: dict[str, Any]
    """Axis -> value."""
    params_trunk: int
    params_total: int
    flops_per_image: float
    """Training FLOPs of one image by the published formula."""
    budgets: tuple[BudgetCost, ...]
    images_executed: int
    """Images trained on: the stable trunk, and the decay branch of every budget beside it."""
    flops_executed: float
    """FLOPs the devices execute: fewer per image than the formula (only scored tokens enter the head), more images."""
    steps: int
    batch_size: int
    lr_peak: float
    devices: int
    """Data-parallel ranks."""
    fit: ExecutionPlan | None
    """ZeRO stage, micro-batch and memory of a rank, activations included; null where nothing fits."""
    checkpoint_bytes: int
    """Of one, on disk; and in host memory, all ranks together, of the copy from which it is written."""
    stop_s: int
    """Time from being told to stop to being killed."""
    disk_bytes: int
    """Of the run directory: the last checkpoint, the trunk's, one under way, and the final weights of all budgets."""
    probes: tuple[ProbeCost, ...]
    """The tasks, each at one budget."""
    flops_evaluation: float
    """Of validation and probes, all budgets together, as `evaluation_cost` counts them."""
    training_s: float
    """Time of training at the stated MFU and peak, and that of a step beside its FLOPs."""
    evaluation_s: float
    """Time of validation and probes of all budgets, likewise."""
    wall_s: float
    """Both."""
    device_hours: float
    cautions: tuple[Caution, ...]
    """What should be looked at before launching."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over a sweep."""

    num_runs: int
    num_rows: int
    images_executed: int
    flops_executed: float
    flops_evaluation: float
    """Of validation and probes."""
    device_hours: float
    disk_bytes: int
    longest_wall_s: float
    """Time of the longest run: the sweep's with enough devices."""


def cost_cards(sweep: Sweep, runs: Sequence[Run]) -> list[CostCard]:
    """One card per run, in order."""
    pools: dict[tuple[str, ...], int | None] = {}
    return [_card(sweep, run, _pool(sweep, run.config, pools)) for run in runs]


def totals(cards: Sequence[CostCard]) -> Totals:
    """Sum the cards."""
    return Totals(
        num_runs=len(cards),
        num_rows=sum(len(card.budgets) for card in cards),
        images_executed=sum(card.images_executed for card in cards),
        flops_executed=sum(card.flops_executed for card in cards),
        flops_evaluation=sum(card.flops_evaluation for card in cards),
        device_hours=sum(card.device_hours for card in cards),
        disk_bytes=sum(card.disk_bytes for card in cards),
        longest_wall_s=max(card.wall_s for card in cards),
    )


def not_identified(cards: Sequence[CostCard]) -> tuple[str, ...]:
    """Parameters of the joint law of N and D that a grid cannot tell however small the noise, such as the exponent of D
    from two budgets; none for a single point, which asks for no law."""
    rows = {(card.params_total, budget.images_seen) for card in cards for budget in card.budgets}
    if len(rows) < 2:
        return ()
    sizes, budgets = zip(*rows, strict=True)
    lost = unidentified(CHINCHILLA, {"N": np.array(sizes, float), "D": np.array(budgets, float)})
    return tuple(name for name in (*CHINCHILLA.names, *CHINCHILLA.derived) if name in lost)


def to_json(sweep: Sweep, cards: Sequence[CostCard]) -> dict[str, Any]:
    """The plan as one JSON value: assumptions, totals, runs with cards."""
    return {
        "sweep": sweep.name,
        "recipe": sweep.file.recipe,
        "assumptions": sweep.file.cost.model_dump(mode="json"),
        "totals": asdict(totals(cards)),
        "not_identified": not_identified(cards),
        "runs": [asdict(card) for card in cards],
    }


def _card(sweep: Sweep, run: Run, pool: int | None) -> CostCard:
    cost = sweep.file.cost
    training, evaluation = run.config.training, run.config.evaluation
    model = model_of(training)
    params, flops = counts_of(model)
    executed = unchecked_schedule(run.config).images_planned()
    scored = mean_scored_tokens(model.num_tokens, training.objective.prefix)
    flops_executed = executed_flops_per_image(model, scored).train * executed
    probes = probe_costs(evaluation, model, flops, run.devices, cost.memory_gb)
    flops_evaluation = evaluation_flops(evaluation, flops, probes)
    steps, flops_per_s = executed // training.optimiser.batch_size, run.devices * cost.peak_tflops * 1e12 * cost.mfu
    training_s, evaluation_s = (
        flops_executed / flops_per_s + steps * cost.step_ms / 1000,
        flops_evaluation / flops_per_s,
    )
    device_hours = (training_s + evaluation_s) * run.devices / 3600
    fit = device_fit(model, training.optimiser, run.config.runtime, run.devices, round(cost.memory_gb * 1e9))
    unique = training.data.unique_images or pool
    return CostCard(
        run_id=run.run_id,
        cell=run.cell,
        params_trunk=params.trunk,
        params_total=params.total,
        flops_per_image=flops.train,
        budgets=tuple(
            BudgetCost(
                images_seen=budget,
                epochs=budget / unique if unique else None,
                flops=flops.train * budget,
                flops_6nd=6.0 * params.total * budget * model.num_tokens,
            )
            for budget in evaluation.budgets
        ),
        images_executed=executed,
        flops_executed=flops_executed,
        steps=steps,
        batch_size=training.optimiser.batch_size,
        lr_peak=training.optimiser.lr_peak,
        devices=run.devices,
        fit=fit,
        checkpoint_bytes=CHECKPOINT_BYTES_PER_PARAM * params.total,
        stop_s=stop_seconds(sweep, run),
        disk_bytes=(3 * CHECKPOINT_BYTES_PER_PARAM + len(evaluation.budgets) * WEIGHTS_BYTES_PER_PARAM) * params.total,
        probes=probes,
        flops_evaluation=flops_evaluation,
        training_s=training_s,
        evaluation_s=evaluation_s,
        wall_s=training_s + evaluation_s,
        device_hours=device_hours,
        cautions=tuple(_cautions(run, pool, fit, cost.memory_gb)),
    )


def _cautions(run: Run, pool: int | None, fit: ExecutionPlan | None, memory_gb: float) -> Iterator[Caution]:
    """What one run's size, data and schedule give.

    Args:
        pool: images of the pool; None where it is unknown.
        memory_gb: of a device.
    """
    training, budgets = run.config.training, run.config.evaluation.budgets
    if fit is None:
        yield Caution(kind="memory", subject=training.model.size, limit=memory_gb)
    unique = training.data.unique_images or pool
    if unique and budgets[-1] / unique > MAX_EPOCHS:
        yield Caution(kind="epochs", subject=str(unique), found=budgets[-1] / unique, limit=MAX_EPOCHS)
    if training.data.unique_images and pool and training.data.unique_images > pool:
        yield Caution(kind="pool", subject="unique_images", found=training.data.unique_images, limit=pool)
    is_cosine, warmup = training.schedule.kind == "cosine", training.schedule.warmup_images
    limit = budgets[0] - 1 if is_cosine else unchecked_schedule(run.config).branch_point(budgets[0])
    if warmup > limit:
        yield Caution(kind="warm-up", subject=str(budgets[0]), found=warmup, limit=limit)
    if training.data.is_unindexed:
        yield Caution(kind="stream", subject="data.sources")


def _pool(sweep: Sweep, config: RunConfig, seen: dict[tuple[str, ...], int | None]) -> int | None:
    """Images of the pool: as stated in the sweep file, else as counted in the data sets' `dataset.json`."""
    if sweep.file.cost.pool_images:
        return sweep.file.cost.pool_images
    paths = tuple(source.path for source in config.training.data.sources)
    if paths not in seen:
        counts = [num_images(path) for path in paths]
        # not made yet, or remote: the card says that epochs are unknown
        seen[paths] = None if None in counts else sum(count or 0 for count in counts)
    return seen[paths]


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
