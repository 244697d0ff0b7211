"""The stacked heads against written-out ones, torch.optim and heads trained alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aimscale.harness.probe.features.tasks import head_params
from aimscale.harness.probe.heads.stacks import LR_END, STACKS, HeadStack, StackedAdamW, learning_rate

NUM_SETS, BATCH, NUM_TOKENS, WIDTH, NUM_CLASSES, NUM_HEADS = 2, 12, 9, 16, 5, 4
LRS = (1e-2, 3e-3, 0.03)


def make(kind: str, num_sets: int = NUM_SETS, lrs: tuple[float, ...] = LRS) -> HeadStack:
    return STACKS[kind](
        num_sets=num_sets,
        lrs=lrs,
        width=WIDTH,
        num_classes=NUM_CLASSES,
        num_heads=NUM_HEADS,
        generator=torch.Generator().manual_seed(0),
        device=torch.device("cpu"),
    )


@pytest.fixture
def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(WIDTH, generator=generator) * 5 + 0.1
    return torch.randn(NUM_SETS, BATCH, NUM_TOKENS, WIDTH, generator=generator) * scale + 20


@pytest.fixture
def labels() -> Tensor:
    return torch.arange(BATCH) % NUM_CLASSES


def fitted(kind: str, tokens: Tensor, labels: Tensor, num_steps: int, **kwargs: object) -> HeadStack:
    stack = make(kind, **kwargs)  # type: ignore[arg-type]
    vectors = tokens.mean(2, keepdim=True) if kind == "linear" else tokens
    stack.standardise_by(vectors.mean((1, 2))[:, None], vectors.var((1, 2), correction=0)[:, None])
    optimiser = StackedAdamW(stack, num_steps=num_steps)
    for _ in range(num_steps):
        stack.loss(tokens, labels, torch.full((1, BATCH), 1 / BATCH)).backward()
        optimiser.step()
    return stack


@pytest.mark.parametrize("kind", list(STACKS))
def test_stacked_heads_are_the_written_out_probes(kind: str, tokens: Tensor, labels: Tensor, written_out: Any) -> None:
    stack = fitted(kind, tokens, labels, num_steps=5)
    logits = stack(tokens)
    for s in range(NUM_SETS):
        for g in range(len(LRS)):
            torch.testing.assert_close(
                logits[s, :, g], written_out(stack.select(s, g))(tokens[s]), rtol=1e-4, atol=1e-4
            )
            assert sum(p.numel() for p in stack.select(s, g).parameters()) == head_params(kind, WIDTH, NUM_CLASSES)
            torch.testing.assert_close(stack.select(s, g)(tokens[s : s + 1])[0, :, 0], logits[s, :, g])


def test_the_rate_warms_up_over_a_twentieth_of_the_steps_and_falls_along_half_a_cosine() -> None:
    rates = [learning_rate(0.03, step, 40) for step in range(40)]
    assert rates[:2] == [0.015, 0.03]
    assert rates[20] == pytest.approx((0.03 + LR_END) / 2)
    assert rates[-1] == LR_END
    assert learning_rate(1e-6, 39, 40) == 1e-6
