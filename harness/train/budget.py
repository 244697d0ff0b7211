"""A budget's weights, with everything in its results row that training knows; evaluation adds the rest."""

from __future__ import annotations

import json
from typing import Any

from aimscale.harness.distributed.group import write_timeout_s
from aimscale.harness.run.budgets import ABOUT
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.row import ROW_VERSION, budget_columns
from aimscale.harness.step.engine import Engine
from aimscale.harness.step.whole_weights import save_weights


def save_budget(
    run: RunDir, config: RunConfig, engine: Engine, budget: int, *, unique_images: int | None, facts: dict[str, Any]
) -> None:
    """Write a budget's weights, with its row so far in the file's metadata; all ranks call this together.

    Args:
        unique_images: different images of the stream; None if they are not counted.
        facts: columns of the row that were measured.
    """
    row = budget_columns(config, budget) | facts
    row |= {
        "unique_images": unique_images,
        "zero_stage": engine.options.zero_stage,
        "epochs": budget / unique_images if unique_images else None,
        "probes": [],
    }
    about = {
        "version": ROW_VERSION,
        "run_id": config.run_id,
        "model": config.training.model.model_dump(mode="json"),
        "target": config.training.objective.target,
        "row": row,
    }
    metadata = {"format": "pt", ABOUT: json.dumps(about, allow_nan=False)}
    with engine.group.collectives_within(write_timeout_s(4 * row["params_total"])):
        save_weights(run.model_file(budget), engine, engine.group, metadata)
