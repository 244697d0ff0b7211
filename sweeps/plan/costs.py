"""The cost card of a planned run: what it holds, takes and costs, from closed formulas and stated assumptions."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from aimscale.analysis.fitting.identification import unidentified
from aimscale.analysis.laws.catalogue import CHINCHILLA
from aimscale.harness.bench.expected import Limit, Rates, expected_rates
from aimscale.harness.data.store.card import Look, data_set
from aimscale.harness.device.execution import DoesNotFitError, ExecutionPlan, execution_plan
from aimscale.harness.device.memory import CHECKPOINT_BYTES_PER_PARAM
from aimscale.harness.device.sheets import Device, device_here, nominal_flops_per_s
from aimscale.harness.probe.cost import DuringCost, ProbeCost, bytes_during, during_cost, probe_cost, validation_images
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.row import model_of
from aimscale.harness.run.schedule import unchecked_schedule
from aimscale.sweeps.plan.planner import Run, model_counts
from aimscale.sweeps.plan.sweepfile import Sweep, SweepError

WEIGHTS_BYTES_PER_PARAM = 4
"""Final weights of a budget, fp32."""
MIN_GRACE_S = 120
"""Even a small run ends a step, a validation batch or a probe's epoch first."""
STEP_ALLOWANCE_S = 30
"""For the step that is under way, beside a save."""
SAVE_BYTES_PER_S = 0.5e9
"""Assumption: the rate at which a checkpoint reaches a shared disk."""

MAX_DURING_SHARE = 0.1
"""Points during training that take a larger share of a run's time are named."""
ASSUMED_GPU = "H100"
MAX_EPOCHS, FAR_TOO_MANY_EPOCHS = 4, 40
MIN_VALIDATION_IMAGES = 100
"""Images, of which fewer give a loss that is uncertain by several per cent."""


Finding = tuple[str, str]
"""Key of the sweep file, and what is said of it."""


@dataclass(frozen=True, kw_only=True)
class BudgetCost:
    """One row that a run will give."""

    images_seen: int
    epochs: float | None
    """D / U; null where the pool's size is unknown."""
    flops: float
    """C: training FLOPs to this budget by the published formula."""
    flops_6nd: float
    """6 N D with N backbone, head and preprocessor and D in images x tokens."""


@dataclass(frozen=True, kw_only=True)
class CostCard:
    """What one run costs."""

    run_id: str
    cell: dict[str, Any]
    """Axis -> value."""
    params_total: int
    budgets: tuple[BudgetCost, ...]
    images_executed: int
    """Images trained on: the stable phase, and the decay branch of every budget beside it."""
    flops_executed: float
    """FLOPs the devices execute: fewer per image than the formula (only scored tokens enter the head), more images."""
    steps: int
    batch_size: int
    lr_peak: float
    devices: int
    """Data-parallel ranks."""
    device: Device
    """What each of them is taken to be."""
    precision: str
    rates: Rates
    """How fast all of them train and load."""
    fit: ExecutionPlan | None
    """ZeRO stage, micro-batch and memory of a rank, activations included; null where nothing fits."""
    stop_s: int
    """Time from being told to stop to being killed."""
    disk_bytes: int
    """Of the run directory: the last checkpoint, the stable phase's, one under way, and the weights of all budgets."""
    probes: tuple[ProbeCost, ...]
    """The tasks, each at one budget."""
    flops_evaluation: float
    """Of validation and probes, all budgets and points together, as `harness.probe.cost` counts them."""
    points: int
    """Validations during training."""
    flops_during: float
    """Of `flops_evaluation`, that of points during training."""
    share_during: float
    """Of `wall_s` that points take, 0..1."""
    limit: Limit
    """What takes most of the time of training."""
    training_s: float
    """Time of training, loading included."""
    evaluation_s: float
    """Time of validation and probes of all budgets and points: their FLOPs at the pace of training, or their images
    at the loader's."""
    wall_s: float
    """Both."""
    device_hours: float
    cautions: tuple[Finding, ...]
    """What should be looked at before launching."""


def cost_cards(sweep: Sweep, runs: Sequence[Run]) -> list[CostCard]:
    """One card per run, in order."""
    device, look = planned_device(sweep, runs), functools.cache(data_set)
    return [_card(sweep, run, device, look) for run in runs]


def planned_device(sweep: Sweep, runs: Sequence[Run]) -> Device:
    """The device that all runs are priced on: the one that `cost.device` names; else an H100, where a `slurm` section
    asks for GPUs; else this machine's GPU; else one core of this machine.

    Raises:
        SweepError: `cost.device` is no known GPU, and its peak is not given.
    """
    cost, slurm = sweep.file.cost, sweep.file.slurm
    on_slurm = "slurm" in sweep.file.model_fields_set
    cores = slurm.cpus_per_task if on_slurm else None
    wants_cpu = all(run.config.runtime.device == "cpu" for run in runs)
    if cost.device is not None:
        if cost.peak_tflops is None and nominal_flops_per_s(cost.device, "bf16") is None:
            raise SweepError(f"{sweep.source}: no data sheet of cost.device '{cost.device}'; give cost.peak_tflops")
        found = Device(name=cost.device, is_gpu="cpu" not in cost.device.lower(), why="cost.device", cores=cores)
    elif on_slurm and slurm.gpus and not wants_cpu:
        kind = str(slurm.gpus).upper()  # as Slurm names its type, such as a100
        name = kind if nominal_flops_per_s(kind, "bf16") else ASSUMED_GPU
        found = Device(name=name, is_gpu=True, why="assumed, since there is a slurm section", cores=cores)
    else:
        found = device_here(wants_cpu=on_slurm or wants_cpu)
    memory_bytes = found.memory_bytes if cost.memory_gb is None else round(cost.memory_gb * 1e9)
    return replace(found, peak_tflops=cost.peak_tflops, memory_bytes=memory_bytes)


def totals(cards: Sequence[CostCard]) -> dict[str, Any]:
    """Sums over the cards, and the time of the longest run: the sweep's with enough devices."""
    added = ("images_executed", "flops_executed", "flops_evaluation", "flops_during", "device_hours", "disk_bytes")
    sums = {name: sum(getattr(card, name) for card in cards) for name in added}
    return {
        "num_runs": len(cards),
        "num_rows": sum(len(card.budgets) for card in cards),
        **sums,
        "share_during": sum(card.share_during * card.device_hours for card in cards) / sums["device_hours"],
        "longest_wall_s": max(card.wall_s for card in cards),
    }


def not_identified(cards: Sequence[CostCard]) -> tuple[str, ...]:
    """Parameters of the joint law of N and D that a grid cannot tell however small the noise, such as the exponent of D
    from two budgets; none for a single point, which asks for no law."""
    rows = {(card.params_total, budget.images_seen) for card in cards for budget in card.budgets}
    if len(rows) < 2:
        return ()
    sizes, budgets = zip(*rows, strict=True)
    lost = unidentified(CHINCHILLA, {"N": np.array(sizes, float), "D": np.array(budgets, float)})
    return tuple(name for name in (*CHINCHILLA.names, *CHINCHILLA.derived) if name in lost)


def to_json(cards: Sequence[CostCard]) -> dict[str, Any]:
    """The plan as one JSON value."""
    return {"totals": totals(cards), "not_identified": not_identified(cards), "runs": [asdict(card) for card in cards]}


def _card(sweep: Sweep, run: Run, device: Device, look: Look) -> CostCard:
    training, evaluation = run.config.training, run.config.evaluation
    model = model_of(training)
    params, flops = model_counts(model)
    executed, batch_size = unchecked_schedule(run.config).images_planned(), training.optimiser.batch_size
    unique = training.data.unique_images or _pool_size(sweep, run.config, look)
    about = model, flops, run.devices, device.memory_bytes, look
    probes = tuple(probe_cost(section, *about) for section in evaluation.probes)
    measuring = bytes_during(run.config, look)
    cost, fit = sweep.file.cost, None
    with contextlib.suppress(DoesNotFitError):
        fit = plan_execution(run.config, run.devices, device, sweep.file.slurm.devices_per_node, measuring)
    rates = expected_rates(run.config, run.devices, device, fit, mfu=cost.mfu, step_ms=cost.step_ms, look=look)
    validated = validation_images(evaluation.validation, look)
    steps, num_budgets = executed // batch_size, len(evaluation.budgets)
    step_s = max(rates.step_s, rates.loading_s) if rates.is_ahead else rates.step_s + rates.loading_s
    lacks_memory = measuring > 0 and fit is not None and not fit.measures
    during = DuringCost(points=0, images=0.0, flops=0.0)
    if not lacks_memory:
        during = during_cost(run.config, *about)
    passed = num_budgets * (validated + sum(probe.images for probe in probes))
    flops_evaluation = num_budgets * (flops.forward * validated + sum(probe.flops for probe in probes))
    flops_per_s = rates.flops_per_image * rates.compute_per_s
    during_s = max(during.flops / flops_per_s, during.images / rates.loaded_per_s)
    evaluation_s = during_s + max(flops_evaluation / flops_per_s, passed / rates.loaded_per_s)
    training_s = steps * step_s
    wall_s = training_s + evaluation_s
    card = CostCard(
        run_id=run.run_id,
        cell=run.cell,
        params_total=params.total,
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
        steps=steps,
        batch_size=batch_size,
        lr_peak=training.optimiser.lr_peak,
        devices=run.devices,
        device=device,
        precision=training.optimiser.precision,
        rates=rates,
        fit=fit,
        stop_s=grace_period_s(sweep, run),
        disk_bytes=(3 * CHECKPOINT_BYTES_PER_PARAM + num_budgets * WEIGHTS_BYTES_PER_PARAM) * params.total,
        probes=probes,
        flops_evaluation=flops_evaluation + during.flops,
        points=during.points,
        flops_during=during.flops,
        share_during=during_s / wall_s,
        limit=rates.limit,
        training_s=training_s,
        evaluation_s=evaluation_s,
        wall_s=wall_s,
        device_hours=wall_s * run.devices / 3600,
        cautions=(),
    )
    return replace(card, cautions=tuple(_cautions(run, card, unique, look, lacks_memory=lacks_memory)))


def _cautions(run: Run, card: CostCard, unique: int | None, look: Look, *, lacks_memory: bool) -> Iterator[Finding]:
    """What one run's data, schedule and points during training give.

    Args:
        unique: U; None where it is unknown.
        lacks_memory: whether a device has no memory for points during training.
    """
    training, rates = run.config.training, card.rates
    epochs = card.budgets[-1].epochs or 0.0
    if epochs > FAR_TOO_MANY_EPOCHS:
        yield (
            "budgets",
            f"{epochs:,.0f} EPOCHS of {unique:,} images: learnt by heart; take more images or smaller budgets",
        )
    elif epochs > MAX_EPOCHS:
        yield "budgets", f"{epochs:.1f} epochs of {unique:,} images, more than {MAX_EPOCHS}"
    if rates.is_ahead and card.limit == "loader":
        given, wanted = rates.loaded_per_s, card.batch_size / rates.step_s
        words = f"the loader gives {given:,.0f} of the {wanted:,.0f} images/s that training could take"
        yield "runtime.num_workers", f"{words}; raise it (and slurm.cpus_per_task), or pack smaller files"
    if card.fit and card.device.is_gpu and card.batch_size % (card.fit.micro_batch * card.devices):
        words = f"{card.batch_size} images do not divide into {card.devices} devices and passes of"
        yield "optimiser.batch_size", f"{words} {card.fit.micro_batch}; blocks are compiled for every size"
    if card.batch_size < 2 * card.devices:
        words = f"{card.batch_size} is less than two images for each of {card.devices} devices; some are idle"
        yield "optimiser.batch_size", words
    if training.data.is_unindexed:
        words = "wds:// has no index: what a run sees depends on restarts, ranks and workers"
        yield "data.sources", f"{words}; epochs are not counted, validation images in it are not found"
    validation = run.config.evaluation.validation.path
    if (held_out := look(validation)) and held_out.num_samples < MIN_VALIDATION_IMAGES:
        words = f"{held_out.num_samples} images leave the loss uncertain by several per cent; hold out more"
        yield "validation.path", words
    probes = run.config.evaluation.probes
    paths = [*(source.path for source in training.data.sources), validation]
    for path in dict.fromkeys([*paths, *(side for probe in probes for side in (probe.train, probe.test))]):
        info = look(path)
        if info and info.num_samples > max_indexed_images(path):
            yield (
                "data",
                f"{path} has {info.num_samples:,} images; its index was not opened here, the trainers check it",
            )
    if card.share_during > MAX_DURING_SHARE:
        words = f"validation and probes during training take {100 * card.share_during:.0f} % of the time; raise it"
        yield "every_images", words
    if lacks_memory:
        yield "every_images", "a device has no memory for a copy of the weights; nothing is measured during training"


MAX_LOCAL_INDEX, MAX_REMOTE_INDEX = 50_000_000, 1_000_000
"""The index of a larger data set, here or at a URL, is left to the trainers: opening takes 25 bytes per image."""


def max_indexed_images(path: str) -> int:
    """Images of the largest data set at a path whose index a plan opens."""
    return MAX_REMOTE_INDEX if "://" in path else MAX_LOCAL_INDEX


def _pool_size(sweep: Sweep, config: RunConfig, look: Look) -> int | None:
    """Images of the pool: as stated in the sweep file, else as counted in the data sets' `dataset.json`."""
    if sweep.file.cost.pool_images:
        return sweep.file.cost.pool_images
    infos = [look(source.path) for source in config.training.data.sources]
    # not made yet: the card says that epochs are unknown
    return None if None in infos else sum(info.num_samples for info in infos if info)


_cached_plan = functools.cache(execution_plan)
"""Of many runs that differ by their seeds."""


def plan_execution(
    config: RunConfig, devices: int, device: Device, devices_per_node: int, measuring: int
) -> ExecutionPlan:
    """How a run uses its devices.

    Raises:
        DoesNotFitError: it is too large for them.
    """
    return _cached_plan(
        config.training.model_copy(update={"seed": 0}),
        config.runtime,
        pace=device.pace(config, ranks_per_node=devices_per_node),
        world_size=devices,
        device_bytes=device.memory_bytes,
        measuring=measuring,
    )


def grace_period_s(sweep: Sweep, run: Run) -> int:
    """Time from being told to stop to being killed, for Slurm's signal and for torchrun.

    `slurm.signal_delay_s`, or twice a save and a step.
    """
    given = sweep.file.slurm.signal_delay_s
    if given != "auto":
        return given
    num_params = model_counts(model_of(run.config.training))[0].total
    save_s = CHECKPOINT_BYTES_PER_PARAM * num_params / SAVE_BYTES_PER_S
    return max(MIN_GRACE_S, math.ceil(2 * save_s) + STEP_ALLOWANCE_S)
