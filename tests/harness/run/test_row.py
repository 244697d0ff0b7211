"""Columns that follow from a configuration alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import get_args

import pandas as pd
import pytest

from aimscale.aim.config import ModelConfig
from aimscale.analysis.table.runs import Runs
from aimscale.harness.run.config import ModelSection, ObjectiveSection, RunConfig, build_model_config
from aimscale.harness.run.row import configured_columns

Config = Callable[..., RunConfig]


@pytest.mark.parametrize(
    ("options", "width", "depth"), [({}, 16, 1), ({"head_rule": "none"}, None, 0), ({"head_width": 8}, 8, 1)]
)
def test_the_heads_shape_is_that_of_the_model(
    options: dict, width: int | None, depth: int, tiny_config: Config
) -> None:
    model = {"size": "w16-d2", "image_size": 16, "patch_size": 4, **options}
    row = configured_columns(tiny_config(model=model))
    assert (row["head_width"], row["head_depth"]) == (width, depth)


@pytest.mark.parametrize("name", ObjectiveSection.model_fields)
def test_losses_of_every_objective_have_a_unit(name: str) -> None:
    """A field of the objective that `loss_unit` of analysis does not know leaves plots without one."""
    choices = get_args(ObjectiveSection.model_fields[name].annotation)
    for choice in (each for each in choices if isinstance(each, str)) if name != "masked" else (0.5,):
        row = {
            "target": choice if name == "target" else "normalised",
            "setup": json.dumps({f"objective.{name}": choice}),
        }
        assert Runs(pd.DataFrame([row])).loss_unit, f"{name} {choice}: add its unit to `loss_unit`"
    assert choices, f"objective.{name} has no choices: say here which values change the unit"


def test_what_a_run_says_of_its_model_reaches_the_model(tiny_config: Config) -> None:
    sections = ModelSection.model_fields | ObjectiveSection.model_fields
    for field in dataclasses.fields(ModelConfig):
        if field.default is not dataclasses.MISSING:
            assert sections[field.name].default == field.default, field.name
    objective = {"target": "raw", "masked": 0.5}
    config = tiny_config(
        model={"size": "w16-d2", "image_size": 16, "patch_size": 4, "norm_eps": 1e-3}, objective=objective
    )
    model = build_model_config(config.training)
    assert (model.norm_eps, model.target, model.masked) == (1e-3, "raw", 0.5)
