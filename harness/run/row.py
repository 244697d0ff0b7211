"""The columns of a results row that follow from a run's configuration alone; torch is not imported here.

A run writes them into its rows, and a collected table fills them in where a row is not measured yet.
"""

from __future__ import annotations

from typing import Any

from aimscale.aim.cost import flops_per_image, param_count
from aimscale.harness.run.config import RunConfig, TrainingConfig, build_model_config
from aimscale.harness.run.provenance import git_commit
from aimscale.harness.run.section import flatten

ROW_VERSION = 1


def configured_columns(config: RunConfig) -> dict[str, Any]:
    """Return the columns known before anything runs; `unique_images` is null if a run takes the whole pool."""
    training = config.training
    model = build_model_config(training)
    params, init = param_count(model), training.init
    return {
        "run_id": config.run_id,
        "size": training.model.size,
        "seed": training.seed,
        "unique_images": training.data.unique_images,
        "batch_size": training.optimiser.batch_size,
        "lr_peak": training.optimiser.lr_peak,
        "schedule": training.schedule.kind,
        "precision": training.optimiser.precision,
        "patch_order": training.model.patch_order,
        "prefix": training.objective.prefix if training.objective.masked is None else None,
        "target": training.objective.target,
        "head_rule": training.model.head_rule,
        "head_width": None if model.head.is_linear else model.head.width,
        "head_depth": model.head.depth,
        "image_size": training.model.image_size,
        "patch_size": training.model.patch_size,
        "params_preprocessor": params.preprocessor,
        "params_trunk": params.trunk,
        "params_head": params.head,
        "params_total": params.total,
        "flops_per_image": flops_per_image(model).train,
        "config_hash": config.training_hash,
        **({"init": init.label, "init_images_seen": init.images_seen, "flops_init": init.flops} if init else {}),
    }


def budget_columns(config: RunConfig, budget: int) -> dict[str, Any]:
    """Return the columns of a budget's row that follow from the configuration and the code alone."""
    commit, is_dirty = git_commit()
    columns = configured_columns(config)
    return {
        "schema_version": ROW_VERSION,
        **columns,
        "git_commit": f"{commit}{'+dirty' if is_dirty else ''}" if commit else None,
        "images_seen": budget,
        "flops_train": columns["flops_per_image"] * budget,
        "flops_6nd": 6 * columns["params_total"] * build_model_config(config.training).num_tokens * budget,
    }


SCALE_FIELDS = {
    "model.size",
    "data.sources",
    "data.unique_images",
    "optimiser.batch_size",
    "optimiser.lr_peak",
    "schedule.warmup_images",
    "seed",
}
"""Fields that a recipe derives from scale, or that have a column of their own: not part of a row's `setup`."""


def setup_of(training: TrainingConfig) -> dict[str, Any]:
    """Return the dotted training fields that differ from their defaults, except `SCALE_FIELDS` and `init`, which has a
    column; analysis pairs runs by it, so that nothing which a sweep varied is mistaken for noise."""
    fields = flatten(training.model_dump(mode="json", exclude_defaults=True, exclude={"init"}))
    return {name: value for name, value in fields.items() if name not in SCALE_FIELDS}


def planned_columns(config: RunConfig) -> dict[str, Any]:
    """Return all columns of a run's rows that are known before training: `configured_columns` and the set-up."""
    return configured_columns(config) | {"setup": setup_of(config.training)}
