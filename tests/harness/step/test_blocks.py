"""Norms block by block are those of a plain PyTorch loop, at every ZeRO stage and number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from aimscale.aim.config import model_config
from aimscale.aim.errors import UserError
from aimscale.aim.model import AIM
from aimscale.harness.data.stream.batch import Batch
from aimscale.harness.device.distributed import find_placement, start_group, stop_group
from aimscale.harness.run.config import OptimiserSection, RunConfig
from aimscale.harness.step.blocks import BlockWatch
from aimscale.harness.step.deepspeed_setup import EngineOptions
from aimscale.harness.step.engine import Engine

CONFIG = model_config("w32-d2", image_size=16, patch_size=4)
BATCH, LR, CLIP = 8, 3e-3, 0.1
Blocks = dict[str, dict[str, float]]


def images_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 3, 16, 16, generator=generator), torch.arange(1, BATCH + 1)


def plain_blocks(num_steps: int) -> list[Blocks]:
    """Every second step's norms, in a loop that anybody would write."""
    model, optimiser, found = AIM(CONFIG), OptimiserSection(), []
    adamw = torch.optim.AdamW(model.param_groups(0.05), lr=LR, betas=optimiser.betas, eps=optimiser.eps)
    layers = [*model.trunk.blocks, *model.pixel_head.blocks, model.preprocessor.patchifier]
    layers += [model.trunk.post_trunk_norm, model.pixel_head.proj_in, model.pixel_head.norm, model.pixel_head.proj_out]
    names = {id(layer): name for name, layer in model.named_modules()}

    def flat(layer: torch.nn.Module) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in layer.parameters()])

    for step in range(num_steps):
        loss_sum, num_targets = model(*images_of(step))
        (loss_sum / num_targets).backward()
        gradients = [torch.cat([p.grad.flatten() for p in layer.parameters()]).norm().item() for layer in layers]  # type: ignore[union-attr]
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP) > CLIP
        before = [flat(layer) for layer in layers]
        adamw.step()
        adamw.zero_grad()
        ratios = [((flat(layer) - old).norm() / old.norm()).item() for layer, old in zip(layers, before, strict=True)]
        if step % 2:
            found.append(
                {
                    names[id(layer)]: {"grad_norm": gradient, "update_ratio": ratio}
                    for layer, gradient, ratio in zip(layers, gradients, ratios, strict=True)
                }
            )
    return found


def engine_blocks(rank: int, out: Path, cases: list[tuple[str, int, bool]]) -> None:
    """Write every second of four steps' norms for every (precision, stage, offloaded)."""
    torch.set_num_threads(1)
    group = start_group(find_placement(), "cpu")
    results: list[list[Any]] = []
    for precision, stage, offload in cases:
        optimiser = OptimiserSection(batch_size=BATCH, precision=precision, clip_norm=CLIP)  # type: ignore[arg-type]
        engine = Engine(CONFIG, optimiser, EngineOptions(zero_stage=stage, offload_optimiser=offload), group)
        watch = BlockWatch(engine, 2)
        results.append([])
        for step in range(4):
            images, prefix_len = (torch.tensor_split(each, group.world_size)[rank] for each in images_of(step))
            batch = Batch(images=images, prefix_len=prefix_len, positions=torch.arange(len(images)))
            with watch.step(step + 1):
                targets = int((CONFIG.num_tokens - images_of(step)[1]).sum())
                outcome = engine.step([batch], num_targets=targets, lr=LR)
            assert (watch.sums is not None) == (step % 2 == 1)
            if watch.sums:
                results[-1].append(watch.sums.line(group, float(outcome.grad_norm)))
    stop_group()
    if rank == 0:
        out.write_text(json.dumps(results))


@pytest.mark.parametrize("world_size", [1, 2])
def test_norms_of_blocks_equal_a_plain_loop_s(
    world_size: int, tmp_path: Path, in_processes: Callable[..., list[int]]
) -> None:
    stages = (1, 2, 3) if world_size == 2 else (1,)
    cases = [("fp32", 0, False), *product(("fp32", "bf16"), stages, (False,))]
    cases += [("fp32", 2, True), ("bf16", 3, True)] if world_size == 2 else []
    assert in_processes(engine_blocks, tmp_path / "blocks", cases, world_size=world_size) == [0] * world_size
    plain = plain_blocks(4)
    for case, ours in zip(cases, json.loads((tmp_path / "blocks").read_text()), strict=True):
        tolerance = 1e-3 if case[0] == "fp32" else 0.1
        for its, theirs in zip(ours, plain, strict=True):
            assert its.keys() == theirs.keys(), case
            for name, numbers in theirs.items():
                assert its[name] == pytest.approx(numbers, rel=tolerance), (case, name)


def test_steps_without_a_line_are_refused(tiny_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(UserError, match="per_block_every_steps 5 is not a multiple of log_every_steps 3"):
        tiny_config(runtime={"per_block_every_steps": 5})
