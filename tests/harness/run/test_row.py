"""Columns that follow from a configuration alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aimscale.harness.run.config import RunConfig
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
