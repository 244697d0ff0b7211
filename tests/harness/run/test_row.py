"""A row says the same of a run before and after it is measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aimscale.aim.cost import flops_per_image, param_count
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.row import configured_columns, describe, model_of

Config = Callable[..., RunConfig]


def test_a_measured_row_holds_every_configured_column(tiny_config: Config) -> None:
    config = tiny_config(seed=3)
    configured = configured_columns(config)
    assert describe(config).items() >= configured.items()
    params = param_count(model_of(config.training))
    expected = {
        "run_id": config.run_id,
        "seed": 3,
        "unique_images": None,
        "prefix": "paired",
        "params_total": params.total,
        "flops_per_image": flops_per_image(model_of(config.training)).train,
    }
    assert configured.items() >= expected.items()
    assert config.run_id.endswith(configured["config_hash"])


@pytest.mark.parametrize(
    ("options", "width", "depth"), [({}, 16, 1), ({"head_rule": "none"}, None, 0), ({"head_width": 8}, 8, 1)]
)
def test_the_heads_shape_is_that_of_the_model(
    options: dict, width: int | None, depth: int, tiny_config: Config
) -> None:
    model = {"size": "w16-d2", "image_size": 16, "patch_size": 4, **options}
    row = configured_columns(tiny_config(model=model))
    assert (row["head_width"], row["head_depth"]) == (width, depth)
