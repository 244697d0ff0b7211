"""Cost cards: time, memory, disk and FLOPs of planned runs, from closed formulas and stated assumptions."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from aimscale.analysis.laws.base import PLATEAU_STEPS
from aimscale.harness.data.store.dataset_info import DatasetLookup, find_info
from aimscale.harness.device.execution import DoesNotFitError, ExecutionPlan, execution_plan
from aimscale.harness.device.gpu_specs import MFU, Device
from aimscale.harness.device.memory import CHECKPOINT_BYTES_PER_PARAM
from aimscale.harness.probe.cost import ProbeCost, curve_bytes, num_points, probe_cost, validation_images
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.row import model_of
from aimscale.harness.run.schedule import unchecked_schedule
from aimscale.sweeps.plan.planner import Run, model_counts
from aimscale.sweeps.plan.recipes import Scale, get_recipe
from aimscale.sweeps.plan.speed import Limit, Rates, expected_rates, planned_device
from aimscale.sweeps.plan.sweepfile import Sweep

WEIGHTS_BYTES_PER_PARAM = 4
"""Size of the final weights of a budget (fp32)."""
MIN_GRACE_S = 120
"""Minimum grace period, s: even a small run must finish a step, a validation batch or a probe epoch."""
STEP_ALLOWANCE_S = 30
"""Time allowed for finishing the current step, s, in addition to saving."""
SAVE_BYTES_PER_S = 0.5e9
"""Assumed rate at which a checkpoint is written to a shared disk."""

MAX_DURING_SHARE = 0.1
"""Share of a run's time, 0..1, above which evaluation during training raises a caution."""
MAX_EPOCHS, FAR_TOO_MANY_EPOCHS = 4, 40
PLATEAU_RATES = 0.5, 2.0
"""Factors on the rate of the recipe `small` within which the first plateau ends sooner at a higher rate."""
MIN_VALIDATION_IMAGES = 100
"""Number of validation images below which the loss is uncertain by several per cent."""

Finding = tuple[str, str]
"""(key of the sweep file, message)."""


@dataclass(frozen=True, kw_only=True)
class BudgetCost:
    """Cost of one budget, which becomes one row of the results."""

    images_seen: int
    epochs: float | None
    """D / U; null if the size of the pool is unknown."""
    flops: float
    """C: training FLOPs up to this budget, by the published formula."""
    flops_6nd: float
    """6 N D, with N the parameters of backbone, head and preprocessor, and D in images x tokens."""


@dataclass(frozen=True, kw_only=True)
class CostCard:
    """Cost of one run."""

    run: Run
    params_total: int
    """Parameters of backbone, head and preprocessor: N."""
    params_trunk: int
    """Parameters of the backbone alone, by which the paper names its sizes."""
    budgets: tuple[BudgetCost, ...]
    images_executed: int
    """Images trained on: those of the stable phase and of the decay branch of every budget."""
    flops_executed: float
    """FLOPs that the devices execute: fewer per image than by the published formula (only scored tokens enter the
    head), for more images (decay branches)."""
    steps: int
    batch_size: int
    lr_peak: float
    device: Device
    """Assumed type of each device."""
    precision: str
    rates: Rates
    """Throughput of training and loading, all devices together."""
    fit: ExecutionPlan | None
    """ZeRO stage, micro-batch and memory of a rank, activations included; null if no choice fits."""
    stop_s: int
    """Grace period between the signal to stop and the kill, s."""
    disk_bytes: int
    """Size of the run directory: the last checkpoint, that of the stable phase, one that is being written, and the
    weights of all budgets."""
    probes: tuple[ProbeCost, ...]
    """Cost of each probe task at one budget."""
    flops_evaluation: float
    """FLOPs of validation and probes at all budgets and points during training, as `harness.probe.cost` counts them."""
    points: int
    """Number of validations during training."""
    flops_during: float
    """Part of `flops_evaluation` that is spent during training."""
    share_during: float
    """Share of `wall_s` that evaluation during training takes, 0..1."""
    limit: Limit
    """Resource that limits the speed of training."""
    training_s: float
    """Time of training, loading included, s."""
    evaluation_s: float
    """Time of validation and probes at all budgets and points during training, s: their FLOPs at the speed of training,
    or their images at the speed of the loader, whichever takes longer."""
    wall_s: float
    """Sum of `training_s` and `evaluation_s`, s."""
    device_hours: float
    cautions: tuple[Finding, ...]
    """Cautions to read before launching."""


def cost_cards(sweep: Sweep, runs: Sequence[Run]) -> list[CostCard]:
    """Return the cost card of each run, in the order of `runs`."""
    device, lookup = planned_device(sweep, runs), functools.cache(find_info)
    return [_card(sweep, run, device, lookup) for run in runs]


def totals(cards: Sequence[CostCard]) -> dict[str, Any]:
    """Return sums over the cards, and `longest_wall_s`: the sweep's time if each run has its own devices."""
    added = ("images_executed", "flops_executed", "flops_evaluation", "flops_during", "device_hours", "disk_bytes")
    sums = {name: sum(getattr(card, name) for card in cards) for name in added}
    return {
        "num_runs": len(cards),
        "num_rows": sum(len(card.budgets) for card in cards),
        "num_tuning_runs": sum(card.run.is_tuning for card in cards),
        **sums,
        "share_tuning": sum(card.device_hours for card in cards if card.run.is_tuning) / sums["device_hours"],
        "share_during": sum(card.share_during * card.device_hours for card in cards) / sums["device_hours"],
        "longest_wall_s": max(card.wall_s for card in cards),
    }


def not_identified(cards: Sequence[CostCard]) -> tuple[str, ...]:
    """Return the parameters of the joint law of N and D that the grid cannot identify at any noise level; none for a
    single point, to which no law is fitted."""
    rows = {(card.params_total, budget.images_seen) for card in cards for budget in card.budgets}
    if len(rows) < 2:
        return ()
    # The fit imports scipy, which verbs that only look at a sweep do without.
    import numpy as np

    from aimscale.analysis.fitting.identification import unidentified
    from aimscale.analysis.laws.catalogue import CHINCHILLA

    sizes, budgets = zip(*rows, strict=True)
    lost = unidentified(CHINCHILLA, {"N": np.array(sizes, float), "D": np.array(budgets, float)})
    return tuple(name for name in (*CHINCHILLA.names, *CHINCHILLA.derived) if name in lost)


def to_json(cards: Sequence[CostCard]) -> dict[str, Any]:
    """Return the plan as a JSON object."""
    return {"totals": totals(cards), "not_identified": not_identified(cards), "runs": [_fields(card) for card in cards]}


def _fields(card: CostCard) -> dict[str, Any]:
    """Return the fields of a card, and those of its run that a configuration does not hold."""
    of_run = {name: getattr(card.run, name) for name in ("run_id", "cell", "is_tuning", "devices", "probe_devices")}
    return of_run | {name: value for name, value in asdict(card).items() if name != "run"}


def _card(sweep: Sweep, run: Run, device: Device, lookup: DatasetLookup) -> CostCard:
    config, training, evaluation = run.config, run.config.training, run.config.evaluation
    model = model_of(training)
    params, flops = model_counts(model)
    executed, batch_size = unchecked_schedule(config).images_planned(), training.optimiser.batch_size
    unique = training.data.unique_images or _pool_size(sweep, config, lookup)
    measuring, fit = curve_bytes(config, lookup), None
    with contextlib.suppress(DoesNotFitError):
        fit = plan_execution(config, run.devices, device.memory_bytes, device.is_gpu, measuring)
    rates = expected_rates(config, run.devices, device, sweep.file.cost.mfu or MFU, lookup)

    def seconds(flops: float, images: float) -> float:
        return max(flops / (rates.flops_per_image * rates.compute_per_s), images / rates.loaded_per_s)

    lacks_memory = measuring > 0 and fit is not None and not fit.measures
    points = 0 if lacks_memory else num_points(config, lookup)
    num_budgets, validated = len(evaluation.budgets), validation_images(evaluation.validation, lookup)
    flops_during = points * validated * flops.forward
    during_s = seconds(flops_during, points * validated / evaluation.validation.num_prefixes)
    ranks = run.probe_devices
    probes = tuple(
        probe_cost(section, model, flops, ranks, device.memory_bytes, lookup) for section in evaluation.probes
    )
    probes_flops, probes_images = (sum(getattr(probe, name) for probe in probes) for name in ("flops", "images"))
    flops_at_budgets = num_budgets * (flops.forward * validated + probes_flops)
    training_s = executed / rates.images_per_s
    if ranks == run.devices:
        evaluation_s, apart_s = seconds(flops_at_budgets, num_budgets * (validated + probes_images)), 0.0
    else:
        apart_s = seconds(num_budgets * probes_flops, num_budgets * probes_images) * run.devices / ranks
        evaluation_s = seconds(num_budgets * flops.forward * validated, num_budgets * validated) + apart_s
    evaluation_s += during_s
    card = CostCard(
        run=run,
        params_total=params.total,
        params_trunk=params.trunk,
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
        flops_executed=rates.flops_per_image * executed,
        steps=executed // batch_size,
        batch_size=batch_size,
        lr_peak=training.optimiser.lr_peak,
        device=device,
        precision=training.optimiser.precision,
        rates=rates,
        fit=fit,
        stop_s=grace_period_s(run),
        disk_bytes=(3 * CHECKPOINT_BYTES_PER_PARAM + num_budgets * WEIGHTS_BYTES_PER_PARAM) * params.total,
        probes=probes,
        flops_evaluation=flops_at_budgets + flops_during,
        points=points,
        flops_during=flops_during,
        share_during=during_s / (training_s + evaluation_s),
        limit=rates.limit,
        training_s=training_s,
        evaluation_s=evaluation_s,
        wall_s=training_s + evaluation_s,
        device_hours=((training_s + evaluation_s) * run.devices - apart_s * (run.devices - ranks)) / 3600,
        cautions=(),
    )
    return replace(card, cautions=tuple(_cautions(card, unique, lookup, lacks_memory=lacks_memory)))


def _cautions(card: CostCard, unique: int | None, lookup: DatasetLookup, *, lacks_memory: bool) -> Iterator[Finding]:
    """Yield the cautions about a run's data, schedule and evaluation during training."""
    run, epochs, on_plateau = card.run, card.budgets[-1].epochs or 0.0, _plateau_end(card)
    if unique and epochs > FAR_TOO_MANY_EPOCHS:
        may_shrink = FAR_TOO_MANY_EPOCHS * unique >= on_plateau
        instead = " or smaller budgets" if may_shrink else ": smaller budgets would lie on the first plateau"
        yield "budgets", f"{epochs:,.0f} EPOCHS of {unique:,} images: learnt by heart; take more images{instead}"
    elif epochs > MAX_EPOCHS:
        yield "budgets", f"{epochs:.1f} epochs of {unique:,} images, more than {MAX_EPOCHS}"
    if short := [budget for budget in run.budgets if budget < on_plateau]:
        steps = f"{', '.join(f'{each:,}' for each in short)} images are at most {short[-1] // card.batch_size:,} steps"
        why = f"{steps}: on the first plateau, where a loss follows no law"
        yield "budgets", f"{why}; at a batch of {card.batch_size} begin at {float(f'{on_plateau:.2g}'):,.0f}"
    if card.device.is_gpu and card.limit == "loader":
        loaded, wanted = card.rates.loaded_per_s, card.rates.compute_per_s
        words = f"the loader gives {loaded:,.0f} of the {wanted:,.0f} images/s that training could take"
        yield "runtime.num_workers", f"{words}; raise it (and slurm.cpus_per_task), or pack smaller files"
    if card.batch_size < 2 * run.devices:
        words = f"{card.batch_size} is less than two images for each of {run.devices} devices; some are idle"
        yield "optimiser.batch_size", words
    if run.config.training.data.is_unindexed:
        words = "wds:// has no index: what a run sees depends on restarts, ranks and workers"
        yield "data.sources", f"{words}; epochs are not counted, validation images in it are not found"
    validation = run.config.evaluation.validation.path
    if (held_out := lookup(validation)) and held_out.num_samples < MIN_VALIDATION_IMAGES:
        words = f"{held_out.num_samples} images leave the loss uncertain by several per cent; hold out more"
        yield "validation.path", words
    if card.share_during > MAX_DURING_SHARE:
        words = f"validation during training takes {100 * card.share_during:.0f} % of the time; raise it"
        yield "validation.every_images", words
    if lacks_memory:
        yield (
            "validation.every_images",
            "a device has no memory for a copy of the weights; nothing is measured during training",
        )


def _plateau_end(card: CostCard) -> float:
    """Return the images before which the loss follows no law yet; 0 where that is not known or does not matter."""
    run = card.run
    if run.is_tuning or run.config.training.model.parametrisation != "standard":
        return 0.0
    scale = Scale(width=model_of(run.config.training).width, params_total=card.params_total, budget=run.budgets[0])
    usual = get_recipe("small").fields(scale)["optimiser"]
    usual_lr = usual["lr_peak"] * math.sqrt(card.batch_size / usual["batch_size"])
    rate = min(max(card.lr_peak / usual_lr, PLATEAU_RATES[0]), PLATEAU_RATES[1])
    return PLATEAU_STEPS * card.batch_size / rate


def _pool_size(sweep: Sweep, config: RunConfig, lookup: DatasetLookup) -> int | None:
    """Return the images of the pool, from the sweep file or else from `dataset.json`; None if unknown."""
    if sweep.file.cost.pool_images:
        return sweep.file.cost.pool_images
    infos = [lookup(source.path) for source in config.training.data.sources]
    # data sets that are not packed yet: the card says that the epochs are unknown
    return None if None in infos else sum(info.num_samples for info in infos if info)


_cached_plan = functools.cache(execution_plan)
"""Execution plans, computed once for runs that differ only in their seed."""


def plan_execution(
    config: RunConfig, devices: int, device_bytes: int, is_gpu: bool, measuring: int = 0
) -> ExecutionPlan:
    """Choose the ZeRO stage and micro-batch of a run on so many devices.

    Args:
        measuring: bytes that evaluation during training needs on each device.

    Raises:
        DoesNotFitError: the run is too large for its devices.
    """
    training = config.training.model_copy(update={"seed": 0})
    return _cached_plan(
        training, config.runtime, world_size=devices, device_bytes=device_bytes, is_gpu=is_gpu, measuring=measuring
    )


def grace_period_s(run: Run) -> int:
    """Return the time a run is given to save, s, between the signal to stop and the kill, by Slurm, torchrun and the
    plan alike: two saves and a step."""
    num_params = model_counts(model_of(run.config.training))[0].total
    save_s = CHECKPOINT_BYTES_PER_PARAM * num_params / SAVE_BYTES_PER_S
    return max(MIN_GRACE_S, math.ceil(2 * save_s) + STEP_ALLOWANCE_S)
