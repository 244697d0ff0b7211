"""LoRA: adapt a frozen trunk by low-rank updates of its matrices (Hu et al., arXiv 2106.09685; AIM paper, Table 8).

An adapted layer computes W x + (alpha / rank) B A x with W frozen, A (rank, in) drawn at random and B (out, rank) zero,
so that adaptation starts from the model itself. Released names stay as they are; an adapted layer only adds `lora_a`
and `lora_b` to its own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimscale.aim.model import AIM, generator_for

TARGETS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""Which linears of a block are adapted: all of them (the paper gives the rank alone)."""


class LoRALinear(nn.Linear):
    """A bias-free linear layer that shares its frozen weight with the layer it replaces."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale: float

    def __init__(self, frozen: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        assert frozen.bias is None, "the trunk's linears have no bias"
        super().__init__(frozen.in_features, frozen.out_features, bias=False, device="meta")
        self.weight = frozen.weight
        self.weight.requires_grad_(False)
        self.scale = alpha / rank
        bound = 1 / math.sqrt(frozen.in_features)
        start = torch.empty(rank, frozen.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(start.to(frozen.weight))
        self.lora_b = nn.Parameter(frozen.weight.new_zeros(frozen.out_features, rank))

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        update = F.linear(F.linear(input, self.lora_a), self.lora_b)
        return F.linear(input, self.weight) + self.scale * update

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """An ordinary layer with the update added to its weight; the shared weight itself is not touched."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(self.weight + self.scale * self.lora_b @ self.lora_a)
        return plain


def add_lora(model: AIM, *, rank: int = 8, alpha: float | None = None, seed: int = 0) -> list[nn.Parameter]:
    """Freeze a model in place and adapt every linear of its trunk.

    Args:
        model: any AIM; preprocessor, norms and pixel head are frozen as they are.
        rank: of the updates (paper: 8).
        alpha: strength; the update is multiplied by alpha / rank. None takes `rank`, a factor of 1.
        seed: draws A.

    Returns:
        The new parameters, the only ones that train.
    """
    model.requires_grad_(False)
    added: list[nn.Parameter] = []
    for index, block in enumerate(model.trunk.blocks):
        for target in TARGETS:
            name = f"trunk.blocks.{index}.{target}"
            linear = block.get_submodule(target)
            assert isinstance(linear, nn.Linear)
            adapted = LoRALinear(linear, rank, rank if alpha is None else alpha, generator_for(seed, name))
            block.set_submodule(target, adapted)
            added += [adapted.lora_a, adapted.lora_b]
    return added


def merge_lora(model: AIM) -> None:
    """Add the updates to the weights in place: an ordinary AIM with released names that computes the same."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.merged())


def lora_state(model: AIM) -> dict[str, Tensor]:
    """The update's tensors alone, by name: all that has to be saved next to the frozen weights."""
    return {name: value for name, value in model.state_dict().items() if name.endswith((".lora_a", ".lora_b"))}
