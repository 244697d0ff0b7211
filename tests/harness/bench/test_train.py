from __future__ import annotations

import pytest

from aimscale.aim.config import model_config
from aimscale.harness.bench.train import random_batches


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_every_image_of_a_random_step_has_a_prefix(batch_size: int) -> None:
    config = model_config("w32-d2", image_size=16, patch_size=4)
    (batch,) = random_batches(config, batch_size, 4)
    assert len(batch.images) == len(batch.prefix_lengths) == len(batch.positions) == batch_size
    assert ((batch.prefix_lengths > 0) & (batch.prefix_lengths < config.num_tokens)).all()
