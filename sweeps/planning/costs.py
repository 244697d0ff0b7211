"""Cost cards of runs: of aimscale's own, time, memory, disk and FLOPs from closed formulas and stated assumptions."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from aimscale.aim.config import RELEASED_SIZES, ModelConfig, model_config
from aimscale.aim.cost import FlopCount, ParamCount, flops_per_image, param_count
from aimscale.analysis.laws import PLATEAU_STEPS
from aimscale.harness.data.store.dataset_info import DatasetLookup, find_info
from aimscale.harness.device.execution import DoesNotFitError, ExecutionPlan, curve_bytes, execution_plan
from aimscale.harness.device.memory import CHECKPOINT_BYTES_PER_PARAM
from aimscale.harness.device.speed import has_fast_link
from aimscale.harness.probe.features.tasks import probe_cost
from aimscale.harness.run.config import RunConfig, TrainingConfig, build_model_config
from aimscale.harness.run.files import cache_folder
from aimscale.harness.run.schedule import num_points, unchecked_schedule, validation_images
from aimscale.sweeps.planning.recipes import Scale, get_recipe
from aimscale.sweeps.planning.run import BudgetCost, CostCard, Notice, PlanContext, Run, caution
from aimscale.sweeps.planning.speed import expected_rates, plan_context
from aimscale.sweeps.planning.sweepfile import Sweep

WEIGHTS_BYTES_PER_PARAM = 4
"""Size of the final weights of a budget (fp32)."""
MAX_DURING_SHARE = 0.1
"""Share of a run's time, 0..1, above which evaluation during training raises a caution."""
SAME_SIZE = 0.02
"""Relative difference of parameters up to which a size is the published one of its name."""
MAX_EPOCHS, FAR_TOO_MANY_EPOCHS = 4, 40
PLATEAU_RATES = 0.5, 2.0
"""Factors on the rate of the recipe `small` within which the first plateau ends sooner at a higher rate."""
RANK_HOST_BYTES, LOADER_HOST_BYTES, RING_BYTES = 4e9, 0.3e9, 2**31
"""Assumption: host memory of a rank with its libraries, of a loader process, and of the images loaded ahead."""
MIN_VALIDATION_IMAGES = 1_000
"""Number of validation images below which the loss is uncertain by several per cent."""


@functools.cache
def model_counts(config: ModelConfig) -> tuple[ParamCount, FlopCount]:
    """Return the parameters, and the FLOPs per image by the published formula."""
    return param_count(config), flops_per_image(config)


def cost_cards(sweep: Sweep, runs: Sequence[Run], *, takes_measured: bool = True) -> list[CostCard]:
    """Return the cost card of each run, in the order of `runs`; see `PlanContext`."""
    context = plan_context(sweep, runs, takes_measured=takes_measured)
    return [run.card(context) for run in runs]


def card_of(run: Run, config: RunConfig, context: PlanContext) -> CostCard:
    """Return the cost card of a run of this configuration."""
    sweep, device, lookup = context.sweep, context.device, functools.partial(context.once, find_info)
    training, evaluation = config.training, config.evaluation
    model = build_model_config(training)
    params, flops = model_counts(model)
    executed, batch_size = unchecked_schedule(config).images_planned(), training.optimiser.batch_size
    unique = training.data.unique_images or _pool_size(sweep, config, lookup)
    measuring, fit = curve_bytes(config, lookup), None
    with contextlib.suppress(DoesNotFitError):
        fit = plan_execution(
            config, run.devices, device.memory_bytes, device.is_gpu, measuring, is_linked=has_fast_link(device.name)
        )
    rates = expected_rates(config, run, fit, context, lookup)

    def seconds(flops: float, images: float) -> float:
        return max(flops / (rates.flops_per_image * rates.compute_per_s), images / rates.loaded_per_s)

    lacks_memory = measuring > 0 and fit is not None and not fit.measures
    points = 0 if lacks_memory else num_points(config, lookup)
    num_budgets, validated = len(evaluation.budgets), validation_images(evaluation.validation, lookup)
    flops_during = points * validated * flops.forward
    validation_in_training_s = seconds(flops_during, points * validated / evaluation.validation.num_prefixes)
    ranks = run.evaluation_devices
    probes = tuple(
        probe_cost(section, model, flops, ranks, device.memory_bytes, lookup) for section in evaluation.probes
    )
    probes_flops, probes_images = (sum(getattr(probe, name) for probe in probes) for name in ("flops", "images"))
    flops_at_budgets = num_budgets * (flops.forward * validated + probes_flops)
    training_s, start_s = executed / rates.images_per_s, 0.0
    at_budgets_s = seconds(flops_at_budgets, num_budgets * (validated + probes_images)) * run.devices / ranks
    if clock := rates.clock:
        start_s = clock.start_s + clock.evaluation_start_s
        training_s += num_budgets * clock.budget_s
        validation_in_training_s = points * validated * clock.validation_s
        heads_s = sum(probe.heads_flops for probe in probes) / (rates.flops_per_image * rates.compute_per_s)
        probes_s = heads_s + sum(clock.feature_s * each.images + clock.pair_s * each.pairs for each in probes)
        at_budgets_s = num_budgets * (validated * clock.validation_s + probes_s)
    evaluation_s = at_budgets_s + validation_in_training_s
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
        stop_s=run.grace_s,
        disk_bytes=(3 * CHECKPOINT_BYTES_PER_PARAM + num_budgets * WEIGHTS_BYTES_PER_PARAM) * params.total,
        probes=probes,
        flops_evaluation=flops_at_budgets + flops_during,
        points=points,
        flops_during=flops_during,
        share_during=validation_in_training_s / (training_s + evaluation_s),
        limit=rates.limit,
        start_s=start_s,
        training_s=training_s,
        evaluation_s=evaluation_s,
        wall_s=start_s + training_s + evaluation_s,
        device_hours=((start_s + training_s + validation_in_training_s) * run.devices + at_budgets_s * ranks) / 3600,
    )
    cautions = [*_cautions(card, config, unique, lookup, lacks_memory=lacks_memory), *_scratch_rate(config, sweep)]
    return replace(card, cautions=tuple(each.of(run.run_id) for each in cautions))


def _cautions(
    card: CostCard, config: RunConfig, unique: int | None, lookup: DatasetLookup, *, lacks_memory: bool
) -> Iterator[Notice]:
    """Yield the cautions about a run's data, schedule and evaluation during training."""
    batch_size = config.training.optimiser.batch_size
    run, epochs, on_plateau = card.run, card.budgets[-1].epochs or 0.0, _plateau_end(card, config.training)
    if words := _other_than_released(card, config):
        yield caution("model.head_rule", words)
    if unique and epochs > FAR_TOO_MANY_EPOCHS:
        may_shrink = FAR_TOO_MANY_EPOCHS * unique >= on_plateau
        instead = " or smaller budgets" if may_shrink else ": smaller budgets would lie on the first plateau"
        yield caution(
            "budgets", f"{epochs:,.0f} EPOCHS of {unique:,} images: learnt by heart; take more images{instead}"
        )
    elif epochs > MAX_EPOCHS:
        yield caution("budgets", f"{epochs:.1f} epochs of {unique:,} images, more than {MAX_EPOCHS}")
    if short := [budget for budget in run.budgets if budget < on_plateau]:
        steps = f"{', '.join(f'{each:,}' for each in short)} images are at most {short[-1] // batch_size:,} steps"
        reason = f"{steps}: on the first plateau, where a loss follows no law"
        yield caution("budgets", f"{reason}; at a batch of {batch_size} begin at {float(f'{on_plateau:.2g}'):,.0f}")
    if card.device.is_gpu and card.limit == "loader":
        loaded, wanted = card.rates.loaded_per_s, card.rates.compute_per_s
        words = f"the loader gives {loaded:,.0f} of the {wanted:,.0f} images/s that training could take"
        yield caution("runtime.num_workers", f"{words}; raise it (and slurm.cpus_per_task), or pack smaller files")
    if batch_size < 2 * run.devices:
        words = f"{batch_size} is less than two images for each of {run.devices} devices; some are idle"
        yield caution("optimiser.batch_size", words)
    if config.training.data.is_unindexed:
        words = "wds:// has no index: what a run sees depends on restarts, ranks and workers"
        yield caution("data.sources", f"{words}; epochs are not counted, validation images in it are not found")
    if any("://" in each.path for each in config.training.data.sources) and config.runtime.cache_dir is None:
        words = f"remote shards are copied to {cache_folder()}, up to {config.runtime.cache_gb:g} GB"
        yield caution("runtime.cache_dir", f"{words}; name a disk of the node if that is a home with a quota")
    validation = config.evaluation.validation.path
    if (held_out := lookup(validation)) and held_out.num_samples < MIN_VALIDATION_IMAGES:
        words = f"{held_out.num_samples} images leave the loss uncertain by several per cent"
        yield caution("validation.path", f"{words}; hold out {MIN_VALIDATION_IMAGES:,}")
    if card.share_during > MAX_DURING_SHARE:
        words = f"validation during training takes {100 * card.share_during:.0f} % of the time; raise it"
        yield caution("validation.every_images", words)
    if lacks_memory:
        yield caution(
            "validation.every_images",
            "a device has no memory for a copy of the weights; nothing is measured during training",
        )


def _scratch_rate(config: RunConfig, sweep: Sweep) -> Iterator[Notice]:
    """Yield that a recipe's rate is one for runs from scratch, where none is tried beside it."""
    file = sweep.file
    if config.training.init is None or file.tune or {"lr_multiplier", "optimiser.lr_peak"} & file.axes.keys():
        return
    yield caution(
        "init",
        f"the rate is that of recipe {sweep.recipe.name} for training from scratch; "
        "`tune: {lr_multiplier: [0.25, 0.5, 2], at: ...}` tries others at the cells with `init`",
    )


def _other_than_released(card: CostCard, config: RunConfig) -> str:
    """Say how many parameters a size of a published name has here, where the published model has others."""
    model = config.training.model
    if model.size not in RELEASED_SIZES:
        return ""
    ours, released = (
        param_count(model_config(model.size, head_rule=rule, head_width=width, head_depth=depth)).total
        for rule, width, depth in (
            (model.head_rule, model.head_width, model.head_depth), ("released", None, None),
        )
    )  # fmt: skip
    if abs(ours / released - 1) < SAME_SIZE:
        return ""
    here, theirs = (f"{number / 1e9:.3g}B" for number in (ours, released))
    return (
        f"{model.size} has {here} parameters with head_rule {model.head_rule}, the published model {theirs}; "
        "head_rule: released makes the published one"
    )


def _plateau_end(card: CostCard, training: TrainingConfig) -> float:
    """Return the images before which the loss follows no law yet; 0 where that is not known or does not matter."""
    run, batch_size, model = card.run, training.optimiser.batch_size, build_model_config(training)
    if run.is_tuning or training.init or training.model.parametrisation != "standard":
        return 0.0
    scale = Scale(width=model.width, params_total=model_counts(model)[0].total, budget=run.budgets[0])
    usual = get_recipe("small").fields(scale)["optimiser"]
    usual_lr = usual["lr_peak"] * math.sqrt(batch_size / usual["batch_size"])
    rate = min(max(training.optimiser.lr_peak / usual_lr, PLATEAU_RATES[0]), PLATEAU_RATES[1])
    return PLATEAU_STEPS * batch_size / rate


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
    config: RunConfig, devices: int, device_bytes: int, is_gpu: bool, measuring: int = 0, *, is_linked: bool = True
) -> ExecutionPlan:
    """Choose the ZeRO stage and micro-batch of a run on so many devices.

    Args:
        measuring: bytes that evaluation during training needs on each device.
        is_linked: whether a fast link joins the devices of a node.

    Raises:
        DoesNotFitError: the run is too large for its devices.
    """
    training = config.training.model_copy(update={"seed": 0})
    where = {"world_size": devices, "device_bytes": device_bytes, "is_gpu": is_gpu, "is_linked": is_linked}
    return _cached_plan(training, config.runtime, **where, measuring=measuring)


def node_host_bytes(card: CostCard, devices_per_node: int) -> float:
    """Return the host memory that a run needs on a node: its processes, and a copy of what they save."""
    ranks, loaders = (
        min(card.run.devices, devices_per_node),
        card.run.config.runtime.loader_processes(is_gpu=card.device.is_gpu, cores=card.device.cores or 1),
    )
    saved = CHECKPOINT_BYTES_PER_PARAM * (card.params_total or 0) * ranks / card.run.devices
    return ranks * (RANK_HOST_BYTES + loaders * LOADER_HOST_BYTES + (RING_BYTES if loaders else 0)) + saved
