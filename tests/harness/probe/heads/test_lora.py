"""Low-rank adaptation of a copy."""

from __future__ import annotations

from typing import Any

import torch

from aimscale.aim.model import AIM


def test_lora_adapts_a_copy_of_the_trunk(task: Any, model: AIM) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = task.section(kinds=("lora",), epochs=3, lrs=(1e-2,))
    (lora,) = task.probe(wanted, seed=0, out=None)
    assert (lora["kind"], lora["lora_rank"]) == ("lora", 8)
    assert lora["top1_lo95"] > 2 * lora["chance"]
    d, depth = model.config.width, model.config.depth
    updates = 8 * depth * 3 * (d + d)  # query, value and output projection
    assert lora["num_trained"] == updates + 2 * d * d + d + 10 * d
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
