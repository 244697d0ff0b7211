"""The cost card of a planned run: what it holds, takes and costs, from closed formulas and stated assumptions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aimscale.aim.cost import executed_flops_per_image, mean_scored_tokens
from aimscale.harness.data.store.card import num_images
from aimscale.harness.device.memory import CHECKPOINT_BYTES_PER_PARAM
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.row import model_of
from aimscale.harness.run.schedule import unchecked_schedule
from aimscale.sweeps.plan.device_fit import DeviceFit, device_fit
from aimscale.sweeps.plan.evaluation_cost import ProbeCost, evaluation_flops, probe_costs, rounds_warning
from aimscale.sweeps.plan.heads import uneven_heads
from aimscale.sweeps.plan.planner import Run, counts_of
from aimscale.sweeps.plan.stopping import save_seconds, stop_seconds, stop_warning
from aimscale.sweeps.plan.sweepfile import CostSection, Sweep, SweepError

WEIGHTS_BYTES_PER_PARAM = 4
"""Final weights of a budget, fp32."""
MAX_EPOCHS = 4
MAX_BATCH_DEVIATION = 0.10


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
    params_preprocessor: int
    params_trunk: int
    params_head: int
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
    warmup_images: int
    schedule: str
    """`wsd` or `cosine`."""
    devices: int
    """Data-parallel ranks."""
    zero_stage: int | None
    """DeepSpeed ZeRO stage, chosen or given; null where nothing fits."""
    micro_batch: int | None
    """Images per forward pass and rank."""
    activation_checkpointing: bool | None
    memory_bytes: int | None
    """Peak of one rank at that stage and micro-batch, activations included."""
    memory_by_stage: dict[int, int]
    """The same at every ZeRO stage."""
    checkpoint_bytes: int
    """Of one, on disk; and in host memory, all ranks together, of the copy from which it is written."""
    save_s: float
    """Time of one save at the stated rate."""
    stop_s: int
    """Time from being told to stop to being killed."""
    disk_bytes: int
    """Of the run directory: the last checkpoint, the trunk's, one under way, and the final weights of all budgets."""
    trunk_bytes: int
    """Of `disk_bytes`, what a finished run keeps of its trunk, from which a longer budget goes on."""
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
    price: float
    warnings: tuple[str, ...]
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
    price: float
    disk_bytes: int
    trunk_bytes: int
    """Of `disk_bytes`, the trunks that finished runs keep for longer budgets."""
    cache_bytes: int
    """Of the different training images, if all are cached locally."""
    longest_wall_s: float
    """Time of the longest run: the sweep's with enough devices."""


def cost_cards(sweep: Sweep, runs: Sequence[Run]) -> list[CostCard]:
    """One card per run, in order."""
    pools: dict[tuple[str, ...], int | None] = {}
    heads = uneven_heads(model_of(run.config.training) for run in runs)
    return [_card(sweep, run, _pool(sweep, run.config, pools), heads) for run in runs]


def totals(sweep: Sweep, runs: Sequence[Run], cards: Sequence[CostCard]) -> Totals:
    """Sum the cards."""
    pools: dict[tuple[str, ...], int | None] = {}
    unique = [r.config.training.data.unique_images or _pool(sweep, r.config, pools) or 0 for r in runs]
    return Totals(
        num_runs=len(cards),
        num_rows=sum(len(card.budgets) for card in cards),
        images_executed=sum(card.images_executed for card in cards),
        flops_executed=sum(card.flops_executed for card in cards),
        flops_evaluation=sum(card.flops_evaluation for card in cards),
        device_hours=sum(card.device_hours for card in cards),
        price=sum(card.price for card in cards),
        disk_bytes=sum(card.disk_bytes for card in cards),
        trunk_bytes=sum(card.trunk_bytes for card in cards),
        cache_bytes=max(unique) * sweep.file.cost.image_bytes,
        longest_wall_s=max(card.wall_s for card in cards),
    )


def to_json(sweep: Sweep, runs: Sequence[Run], cards: Sequence[CostCard]) -> dict[str, Any]:
    """The plan as one JSON value: assumptions, totals, runs with cards."""
    return {
        "sweep": sweep.name,
        "recipe": sweep.file.recipe,
        "assumptions": sweep.file.cost.model_dump(mode="json"),
        "totals": asdict(totals(sweep, runs, cards)),
        "runs": [asdict(card) for card in cards],
    }


def with_bench(sweep: Sweep, path: Path) -> Sweep:
    """Replace the assumed MFU and peak by those of a training benchmark's JSON.

    Raises:
        SweepError: the file has no `mfu` and `peak_flops_per_s`.
    """
    try:
        measured = json.loads(path.read_text())
        peak_tflops = float(measured["peak_flops_per_s"]) / 1e12
        changes: dict[str, Any] = {"mfu": float(measured["mfu"]), "peak_tflops": peak_tflops}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SweepError(
            f"{path} holds no benchmark of training ({error}); make one with `aimscale bench train --json`"
        ) from error
    changes["device"] = str(measured.get("device", sweep.file.cost.device))
    return sweep.with_fields(cost={**sweep.file.cost.model_dump(mode="json"), **changes})


def _card(sweep: Sweep, run: Run, pool: int | None, heads: Mapping[str, str]) -> CostCard:
    cost = sweep.file.cost
    training, budgets = run.config.training, run.config.evaluation.budgets
    model = model_of(training)
    params, flops = counts_of(model)
    unique = training.data.unique_images or pool
    executed = unchecked_schedule(run.config).images_planned()
    scored = mean_scored_tokens(model.num_tokens, training.objective.prefix)
    flops_executed = executed_flops_per_image(model, scored).train * executed
    probes = probe_costs(run.config.evaluation, model, flops, run.devices, cost.memory_gb)
    flops_evaluation = evaluation_flops(run.config.evaluation, flops, probes)
    steps, flops_per_s = executed // training.optimiser.batch_size, run.devices * cost.peak_tflops * 1e12 * cost.mfu
    training_s = flops_executed / flops_per_s + steps * cost.step_ms / 1000
    evaluation_s = flops_evaluation / flops_per_s + len(budgets) * cost.evaluation_s
    wall_s = training_s + evaluation_s
    device_hours = wall_s * run.devices / 3600
    fit = device_fit(model, training.optimiser, run.config.runtime, run.devices, round(cost.memory_gb * 1e9))
    keeps_trunk = run.config.runtime.keep_trunk and training.schedule.kind == "wsd"
    return CostCard(
        run_id=run.run_id,
        cell=run.cell,
        params_preprocessor=params.preprocessor,
        params_trunk=params.trunk,
        params_head=params.head,
        params_total=params.total,
        flops_per_image=flops.train,
        budgets=tuple(
            BudgetCost(
                images_seen=budget,
                epochs=budget / unique if unique else None,
                flops=flops.train * budget,
                flops_6nd=6.0 * params.total * budget * model.num_tokens,
            )
            for budget in budgets
        ),
        images_executed=executed,
        flops_executed=flops_executed,
        probes=probes,
        flops_evaluation=flops_evaluation,
        steps=steps,
        batch_size=training.optimiser.batch_size,
        lr_peak=training.optimiser.lr_peak,
        warmup_images=training.schedule.warmup_images,
        schedule=training.schedule.kind,
        devices=run.devices,
        zero_stage=fit.chosen.zero_stage if fit.chosen else None,
        micro_batch=fit.chosen.micro_batch if fit.chosen else None,
        activation_checkpointing=fit.chosen.activation_checkpointing if fit.chosen else None,
        memory_bytes=fit.chosen.estimate.total if fit.chosen else None,
        memory_by_stage=fit.by_stage,
        checkpoint_bytes=CHECKPOINT_BYTES_PER_PARAM * params.total,
        disk_bytes=(3 * CHECKPOINT_BYTES_PER_PARAM + len(budgets) * WEIGHTS_BYTES_PER_PARAM) * params.total,
        trunk_bytes=CHECKPOINT_BYTES_PER_PARAM * params.total if keeps_trunk else 0,
        training_s=training_s,
        evaluation_s=evaluation_s,
        wall_s=wall_s,
        device_hours=device_hours,
        price=device_hours * cost.price_per_device_hour,
        save_s=save_seconds(sweep, run),
        stop_s=stop_seconds(sweep, run),
        warnings=tuple(
            filter(
                None,
                [
                    *_warnings(run, pool, cost, fit),
                    *map(rounds_warning, probes),
                    stop_warning(sweep, run),
                    heads.get(training.model.size),
                ],
            )
        ),
    )


def _warnings(run: Run, pool: int | None, cost: CostSection, fit: DeviceFit) -> list[str]:
    training, budgets = run.config.training, run.config.evaluation.budgets
    found = []
    if fit.chosen is None:
        least = min(fit.by_stage, key=fit.by_stage.__getitem__)
        found.append(
            f"{training.model.size} does not fit {cost.memory_gb:g} GB on {run.devices} devices: ZeRO stage {least} "
            f"takes {fit.by_stage[least] / 1e9:.0f} GB even with one image at a time"
        )
    batch, target = training.optimiser.batch_size, run.batch_target
    if abs(batch / target - 1) > MAX_BATCH_DEVIATION:
        found.append(f"batch {batch} is {100 * (batch / target - 1):+.0f} % off the recipe's {target}")
    unique = training.data.unique_images or pool
    if unique and budgets[-1] / unique > MAX_EPOCHS:
        found.append(f"{budgets[-1] / unique:.1f} epochs of {unique} images (more than {MAX_EPOCHS})")
    if training.data.unique_images and pool and training.data.unique_images > pool:
        found.append(f"{training.data.unique_images} unique images asked for, and the pool has {pool}")
    smallest, warmup = budgets[0], training.schedule.warmup_images
    limit = (
        smallest - 1 if training.schedule.kind == "cosine" else unchecked_schedule(run.config).branch_point(smallest)
    )
    if warmup > limit:
        found.append(f"warm-up of {warmup} images reaches past image {limit} of budget {smallest}: it will not start")
    if training.data.is_unindexed:
        found.append(
            "a wds:// stream has no index: a resumed run sees other images than an uninterrupted one, epochs are not "
            "counted, the number of ranks and workers changes what is seen, and validation images in it are not found"
        )
    if batch < run.devices:
        found.append(f"batch {batch} is smaller than {run.devices} devices")
    return found


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
