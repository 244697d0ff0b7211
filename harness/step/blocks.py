"""Gradient norm and update-to-weight ratio of every block, looked at where the inner AdamW steps.

Hooks before and after that step read what it reads and writes, on this rank's part, whatever the ZeRO stage. Nothing
waits for the device; a copy of the part's master weights is held for as long as the step takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from aimscale.harness.device.distributed import Group
from aimscale.harness.step.engine import Engine, Fragment, fragment_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSums:
    """What this rank saw of one step."""

    names: list[str]
    """Of the blocks, and of the layers that are in none."""
    squares: Tensor
    """float32 (3, blocks): this rank's share of the squared norms of gradients, updates and weights before the step."""

    def line(self, group: Group, grad_norm: float) -> dict[str, dict[str, float | None]]:
        """`grad_norm` before clipping and `update_ratio` of every block; all ranks call this together.

        Args:
            grad_norm: of the whole model, before clipping: at stages 1 to 3 the gradients that AdamW sees are clipped.
        """
        gradients, updates, weights = group.sum_tensor(self.squares).sqrt().tolist()
        scale = grad_norm / (math.hypot(*gradients) or 1.0)
        return {
            name: {"grad_norm": scale * gradient, "update_ratio": update / weight if weight else None}
            for name, gradient, update, weight in zip(self.names, gradients, updates, weights, strict=True)
        }


class BlockWatch:
    """Looks at every `every_steps`-th step of an engine; None looks at none and costs nothing."""

    def __init__(self, engine: Engine, every_steps: int | None) -> None:
        self._engine, self._every_steps = engine, every_steps
        self.sums: BlockSums | None = None
        """Of the last step, where it was looked at."""

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the run's step of this number."""
        self.sums = None
        if self._every_steps is None or number % self._every_steps:
            yield
            return
        column: dict[str, int] = {}
        parts: dict[int, list[Fragment]] = {}
        for fragment in self._engine.fragments():
            column.setdefault(block_of(fragment.name), len(column))
            parts.setdefault(id(fragment.flat), []).append(fragment)
        squares = torch.zeros(3, len(column), device=self._engine.group.device)
        before: dict[int, Tensor] = {}

        def add(row: int, flat: Tensor, values: Tensor) -> None:
            for fragment in parts[id(flat)]:
                norm = torch.linalg.vector_norm(fragment_of(values, fragment))
                squares[row, column[block_of(fragment.name)]] += norm.to(squares.device).square()

        @torch.no_grad()
        def look(adamw: torch.optim.Optimizer, *_: Any) -> None:
            for flat in stepped(adamw):
                if id(flat) not in before:  # else a step within a step, as stage 0's is
                    before[id(flat)] = flat.clone()
                    add(0, flat, flat.grad)
                    add(2, flat, flat)

        @torch.no_grad()
        def compare(adamw: torch.optim.Optimizer, *_: Any) -> None:
            for flat in stepped(adamw):
                if (old := before.pop(id(flat), None)) is not None:
                    add(1, flat, old.sub_(flat))

        adamw = self._engine.adamw
        handles = adamw.register_step_pre_hook(look), adamw.register_step_post_hook(compare)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self.sums = BlockSums(names=list(column), squares=squares)


def stepped(adamw: torch.optim.Optimizer) -> list[Any]:
    """The tensors that a step changes."""
    return [flat for group in adamw.param_groups for flat in group["params"] if flat.grad is not None]


def block_of(name: str) -> str:
    """The block that a parameter is of, `trunk.blocks.3`, or its layer where it is in none."""
    parts = name.split(".")
    return ".".join(parts[: 3 if parts[1] == "blocks" else 2])
