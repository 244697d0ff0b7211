"""The columns of a results row that follow from a run's configuration alone; torch is not imported here.

A run writes them into its rows, and a collected table fills them in where a row is not measured yet: one function, so
that both say the same.
"""

from __future__ import annotations

import functools
from typing import Any

from aimscale.aim.config import ModelConfig, model_config
from aimscale.aim.cost import flops_per_image, param_count
from aimscale.harness.run.config import ResultConfig, RunConfig, fingerprint


def model_of(result: ResultConfig) -> ModelConfig:
    """The model that a run trains.

    Raises:
        ModelConfigError: no such model.
    """
    return cached_model(tuple(result.model.__dict__.items()), result.objective.target)


@functools.cache
def cached_model(fields: tuple[tuple[str, Any], ...], target: Any) -> ModelConfig:
    """The model of a configuration's `model` section, as pairs, and its target; planners ask for few models often."""
    return model_config(**dict(fields), target=target)


def configured_columns(config: RunConfig) -> dict[str, Any]:
    """Columns known before anything runs; `unique_images` is null where a run takes the whole pool."""
    result = config.result
    model = model_of(result)
    params = param_count(model)
    return {
        "run_id": config.run_id,
        "size": result.model.size,
        "seed": result.seed,
        "unique_images": result.data.unique_images,
        "batch_size": result.optimiser.batch_size,
        "lr_peak": result.optimiser.lr_peak,
        "schedule": result.schedule.kind,
        "precision": result.optimiser.precision,
        "patch_order": result.model.patch_order,
        "prefix": result.objective.prefix,
        "target": result.objective.target,
        "head_rule": result.model.head_rule,
        "head_width": None if model.head.is_linear else model.head.width,
        "head_depth": model.head.depth,
        "image_size": result.model.image_size,
        "patch_size": result.model.patch_size,
        "params_preprocessor": params.preprocessor,
        "params_trunk": params.trunk,
        "params_head": params.head,
        "params_total": params.total,
        "flops_per_image": flops_per_image(model).train,
        "config_hash": fingerprint(result),
    }
