"""What training does at a budget: save the weights, and with them what it knows of the row of results."""

from __future__ import annotations

import json
from typing import Any

from aimscale.harness.device.distributed import Group
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.provenance import git_commit
from aimscale.harness.run.row import configured_columns, model_of
from aimscale.harness.run.trunk import ABOUT
from aimscale.harness.step.engine import Engine
from aimscale.harness.step.saving import save_weights

ROW_VERSION = 1


def save_budget(run: RunDir, engine: Engine, group: Group, *, config: RunConfig, row: dict[str, Any]) -> None:
    """Write a budget's weights, and in their file's metadata its row so far; all ranks call this together."""
    about = {
        "version": ROW_VERSION,
        "run_id": config.run_id,
        "model": config.training.model.model_dump(mode="json"),
        "target": config.training.objective.target,
        "row": row,
    }
    metadata = {"format": "pt", ABOUT: json.dumps(about, allow_nan=False)}
    save_weights(run.model_file(row["images_seen"]), engine, group, metadata)


def training_columns(config: RunConfig, images_seen: int, facts: dict[str, Any]) -> dict[str, Any]:
    """What a budget's row says when its weights are saved; evaluation adds the rest.

    Args:
        facts: columns that training knows: losses, times, counts, device.
    """
    row = describe(config) | facts
    num_tokens = model_of(config.training).num_tokens
    return row | {
        "images_seen": images_seen,
        "epochs": images_seen / row["unique_images"] if row["unique_images"] else None,
        "flops_train": row["flops_per_image"] * images_seen,
        "flops_6nd": 6 * row["params_total"] * num_tokens * images_seen,
        "probes": [],
    }


def describe(config: RunConfig) -> dict[str, Any]:
    """Columns of a row that follow from the configuration and the code alone."""
    commit, is_dirty = git_commit()
    return {
        "schema_version": ROW_VERSION,
        **configured_columns(config),
        "git_commit": f"{commit}{'+dirty' if is_dirty else ''}" if commit else None,
    }
