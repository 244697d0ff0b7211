"""Columns that follow from a configuration alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from aimscale.aim.config import ModelConfig
from aimscale.harness.run.config import ModelSection, ObjectiveSection, RunConfig
from aimscale.harness.run.row import build_model_config, configured_columns

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
