"""Steps of DeepSpeed against those of FSDP2 and of a bare loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_engine import ReferenceEngine

from aimscale.aim.config import ModelConfig, model_config
from aimscale.aim.model import AIM
from aimscale.harness.bench.train import random_batches
from aimscale.harness.distributed.group import Group
from aimscale.harness.run.config import ConfigError, OptimiserSection
from aimscale.harness.step.deepspeed_setup import EngineOptions
from aimscale.harness.step.engine import Engine, should_compile
from aimscale.harness.step.feed import count_targets

CONFIG = model_config("w32-d2", image_size=16, patch_size=4)


def losses(group: Group, config: ModelConfig, num_steps: int) -> dict[str, dict[str, list[float]]]:
    """Losses and gradient norms of steps on the same images, by precision and engine."""
    step = random_batches(config, 16, 4)[group.rank :: group.world_size]
    num_targets = group.sum_counts(count_targets(step, config.num_tokens))[0]
    found: dict[str, dict[str, list[float]]] = {}
    for precision in ("fp32", "bf16"):
        optimiser = OptimiserSection(batch_size=16, precision=precision, clip_norm=0.5)  # type: ignore[arg-type]
        options = EngineOptions(zero_stage=2)
        engines: dict[str, Engine | ReferenceEngine] = {"zero2": Engine(config, optimiser, options, group)}
        engines["fsdp2"] = ReferenceEngine(AIM(config), optimiser, options, group, sharded=True)
        if group.world_size == 1:
            engines["bare"] = ReferenceEngine(AIM(config), optimiser, options, group, sharded=False)
        for name, engine in engines.items():
            values = found.setdefault(precision, {})[name] = []
            for _ in range(num_steps):
                outcome = engine.step(step, num_targets=num_targets, lr=3e-3)
                values += [group.sum_tensor(outcome.loss_sum.clone()).item(), float(outcome.grad_norm)]
            engine.close()
    return found


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_engines_take_the_same_steps(world_size: int, in_group: Callable[..., list[Any]]) -> None:
    found, *_ = in_group(losses, CONFIG, 10, world_size=world_size)
    for precision, tolerance in (("fp32", 2e-5), ("bf16", 2e-2)):
        ours, *others = found[precision].values()
        assert ours[-2] < 0.95 * ours[0], "the loss falls"
        assert len(others) == (2 if world_size == 1 else 1)
        for theirs in others:
            assert theirs == pytest.approx(ours, rel=tolerance)


def test_every_matrix_has_its_own_rate_under_mup(in_group: Callable[..., list[Any]]) -> None:
    """Few steps: what starts at zero has gradients of noise, on which engines soon differ."""
    config = dataclasses.replace(CONFIG, parametrisation="mup")
    assert {group["lr_scale"] for group in AIM(config).param_groups(0.05)} != {1.0}
    (found,) = in_group(losses, config, 3)
    ours, *others = found["fp32"].values()
    for theirs in others:
        assert theirs == pytest.approx(ours, rel=1e-4)


def test_compiling_is_for_cards() -> None:
    cpu, card = torch.device("cpu"), torch.device("cuda")
    assert [should_compile(wanted, card, 1) for wanted in ("auto", True, False)] == [True, True, False]
    assert not any((should_compile("auto", card, 3), should_compile("auto", cpu, 0), should_compile(False, cpu, 1)))
    with pytest.raises(ConfigError, match=r"runtime\.compile"):
        should_compile(True, cpu, 1)
