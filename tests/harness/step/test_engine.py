"""Every ZeRO stage, split and rank count takes the steps of a plain PyTorch loop."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aimscale.aim.config import ModelConfig, model_config
from aimscale.aim.model import AIM
from aimscale.harness.data.stream.stream import Batch
from aimscale.harness.device.execution import EngineOptions, should_compile
from aimscale.harness.distributed.group import Group
from aimscale.harness.run.config import ConfigError, OptimiserSection
from aimscale.harness.step.checkpoint import save_weights
from aimscale.harness.step.engine import DeepSpeedError, Engine

CONFIG = model_config("w32-d2", image_size=16, patch_size=4)
MASKED = model_config("w32-d2", image_size=16, patch_size=4, masked=0.75, head_kind="transformer")
MUP = dataclasses.replace(CONFIG, parametrisation="mup")
BATCH, NUM_STEPS, LR, CLIP = 8, 8, 3e-3, 0.6
Ranks = Callable[..., list[Any]]


def step_batch(step: int, config: ModelConfig = CONFIG) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and prefixes of unequal length, or masks."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, 16, 16, generator=generator)
    if config.masked is not None:
        return images, torch.rand(BATCH, config.num_tokens, generator=generator).argsort(1) >= config.num_masked
    return images, torch.randint(1, CONFIG.num_tokens, (BATCH,), generator=generator)


def plain_losses(config: ModelConfig, optimiser: OptimiserSection) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a loop without DeepSpeed, ranks or micro-batches."""
    model = AIM(config)
    groups = [group | {"lr": LR * group["lr_scale"]} for group in model.param_groups(optimiser.weight_decay)]
    adamw = torch.optim.AdamW(groups, betas=optimiser.betas, eps=optimiser.eps)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        loss_sum, num_targets = model(*step_batch(step, config))
        (loss_sum / num_targets).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), optimiser.clip_norm).item())
        adamw.step()
        model.zero_grad()
        losses.append((loss_sum / num_targets).item())
    return losses, norms


def split(images: torch.Tensor, given: torch.Tensor, rank: int, world_size: int, num_micro: int) -> list[Batch]:
    """This rank's micro-batches, of unequal sizes where the batch does not divide."""
    parts = [torch.tensor_split(each, world_size * num_micro) for each in (images, given, torch.arange(BATCH))]
    mine = slice(rank * num_micro, (rank + 1) * num_micro)
    return [
        Batch(images=image, prefix_lengths=its, positions=position)
        for image, its, position in zip(*(part[mine] for part in parts), strict=True)
    ]


def engine_losses(group: Group, cases: list[tuple[str, int, int, ModelConfig]]) -> list[tuple[list[float], ...]]:
    """Losses and norms of every (precision, stage, micro-batches, model)."""
    results: list[tuple[list[float], ...]] = []
    for precision, stage, num_micro, config in cases:
        optimiser = OptimiserSection(batch_size=BATCH, precision=precision, clip_norm=CLIP)  # type: ignore[arg-type]
        engine = Engine(config, optimiser, EngineOptions(zero_stage=stage), group)
        losses, norms = [], []
        for step in range(NUM_STEPS):
            images, given = step_batch(step, config)
            num_targets = BATCH * config.num_tokens - int(given.sum())
            micro_batches = split(images, given, group.rank, group.world_size, num_micro)
            outcome = engine.step(micro_batches, num_targets=num_targets, lr=LR)
            losses.append(group.sum_tensor(outcome.loss_sum.clone()).item() / num_targets)
            norms.append(float(outcome.grad_norm))
        results.append((losses, norms))
    return results


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_losses_and_norms_equal_a_plain_loop(world_size: int, in_group: Ranks) -> None:
    stages = (0, 1, 2, 3) if world_size == 2 else (0, 1, 2)
    micro = (1, 3)  # 8 images in 3 or 6 parts: unequal sizes
    cases = [("fp32", stage, num_micro, CONFIG) for stage, num_micro in product(stages, micro)]
    cases += [("bf16", stage, 2, CONFIG) for stage in stages if stage]
    cases += [("fp32", stage, 3, config) for stage in (0, 3) for config in (MASKED, MUP)]
    assert {group["lr_scale"] for group in AIM(MUP).param_groups(0.05)} != {1.0}
    found, *_ = in_group(engine_losses, cases, world_size=world_size)
    optimiser = OptimiserSection(batch_size=BATCH, clip_norm=CLIP)
    plain = {each: plain_losses(each, optimiser) for each in (CONFIG, MASKED, MUP)}
    assert min(plain[CONFIG][1]) < CLIP < max(plain[CONFIG][1]), "some steps are clipped and some are not"
    for case, (our_losses, our_norms) in zip(cases, found, strict=True):
        losses, norms = plain[case[3]]
        tolerance = 1e-5 if case[0] == "fp32" else 1e-2
        first = slice(NUM_STEPS)
        if case[3] is MUP:  # what starts at zero has gradients of noise, on which engines soon differ
            first, tolerance = slice(3), 1e-4
        assert our_losses[first] == pytest.approx(losses[first], rel=tolerance), case
        assert our_norms[first] == pytest.approx(norms[first], rel=10 * tolerance), case


def bad_steps(group: Group, stages: list[tuple[str, int]]) -> list[tuple[list[bool], list[tuple[float, ...]]]]:
    """Take one good step, one with an infinite pixel, one good; give weights and what was applied."""
    results = []
    for precision, stage in stages:
        optimiser = OptimiserSection(batch_size=BATCH, precision=precision)  # type: ignore[arg-type]
        engine = Engine(CONFIG, optimiser, EngineOptions(zero_stage=stage), group)
        applied, weights = [], []
        for step, poison in enumerate([False, True, False]):
            images, prefix_len = step_batch(step)
            images[0, 0, 8, 8] = float("inf") if poison else images[0, 0, 8, 8]
            num_targets = int((CONFIG.num_tokens - prefix_len).sum())
            batches = split(images, prefix_len, 0, 1, 2)
            applied.append(engine.step(batches, num_targets=num_targets, lr=LR).was_applied)
            flat = engine.optimiser_tensors()[0]
            state = engine.adam_state(flat)
            weights.append((float(flat.detach().double().sum()), float(state["step"]), float(state["exp_avg"].sum())))
        results.append((applied, weights))
    return results


def test_a_step_that_is_not_finite_changes_nothing(in_group: Ranks) -> None:
    stages = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3)]
    (found,) = in_group(bad_steps, stages)
    for stage, (applied, weights) in zip(stages, found, strict=True):
        assert applied == [True, False, True], stage
        assert weights[1] == weights[0], stage
        assert weights[2] != weights[1], stage


def start_all(group: Group, folder: Path, cases: list[tuple[int, str]]) -> None:
    """Write the first masters of every (stage, precision), and compare the weights in use."""
    exact = dict(drawn_as_ever(seed=3))
    for stage, precision in cases:
        optimiser = OptimiserSection(precision=precision)  # type: ignore[arg-type]
        engine = Engine(CONFIG, optimiser, EngineOptions(zero_stage=stage), group, seed=3)
        save_weights(folder / f"{stage}-{precision}.safetensors", engine, group)
        for name, parameter in engine.module.named_parameters() if stage < 3 else ():
            assert torch.equal(parameter, exact[name].to(parameter.dtype)), (stage, precision, name)


def drawn_as_ever(seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The values that runs of all versions start from: whole matrices, each from the generator of its module's name."""
    with torch.device("meta"):
        model = AIM(CONFIG)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            yield from (
                (f"{name}.weight", torch.ones(module.weight.shape)),
                (f"{name}.bias", torch.zeros(module.bias.shape)),
            )
        elif isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            bound = math.sqrt(6 / (module.weight[0].numel() + len(module.weight)))
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            yield f"{name}.weight", torch.empty(module.weight.shape).uniform_(-bound, bound, generator=generator)
            if module.bias is not None:
                yield f"{name}.bias", torch.zeros(module.bias.shape)


def test_weights_start_with_the_same_bits_at_every_stage(tmp_path: Path, in_group: Ranks) -> None:
    cases = [(0, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
    in_group(start_all, tmp_path, cases, world_size=2)
    exact = dict(drawn_as_ever(seed=3))
    for path in tmp_path.iterdir():
        started = load_file(path)
        assert started.keys() == exact.keys()
        assert all(torch.equal(started[name], exact[name]) for name in exact), path.name


def test_compiling_is_for_cards() -> None:
    cpu, card = torch.device("cpu"), torch.device("cuda")
    assert [should_compile(wanted, card, 1) for wanted in ("auto", True, False)] == [True, True, False]
    assert not any((should_compile("auto", card, 3), should_compile("auto", cpu, 0), should_compile(False, cpu, 1)))
    with pytest.raises(ConfigError, match=r"runtime\.compile"):
        should_compile(True, cpu, 1)


def lack(group: Group) -> None:
    with pytest.raises(ConfigError, match="zero_stage"):
        Engine(CONFIG, OptimiserSection(precision="bf16"), EngineOptions(zero_stage=0), group)
    import deepspeed.runtime.zero.stage_1_and_2 as theirs

    del theirs.DeepSpeedZeroOptimizer.update_lp_params
    with pytest.raises(DeepSpeedError, match="update_lp_params"):
        Engine(CONFIG, OptimiserSection(precision="fp32"), EngineOptions(zero_stage=2), group)


def test_what_deepspeed_gets_wrong_or_lacks_is_refused(in_group: Ranks) -> None:
    in_group(lack)
