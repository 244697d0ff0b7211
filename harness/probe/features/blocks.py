"""Averages of block outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aimscale.harness.probe.features.sizes import BlockSet


def averaging(sets: Sequence[BlockSet], num_blocks: int, device: torch.device) -> Tensor:
    """float32 (S, L): row s times the outputs of all blocks is their mean over set s."""
    weights = torch.zeros(len(sets), num_blocks, device=device)
    for row, members in enumerate(sets):
        weights[row, list(members)] = 1 / len(members)
    return weights


def averages(outputs: Tensor, sets: Sequence[BlockSet]) -> Tensor:
    """Mean over the blocks of each set, summed in fp32 and kept in the type of `outputs`: (L, ...) -> (S, ...).

    One matrix product reads every block once, whatever the number of sets.
    """
    is_member = (averaging(sets, len(outputs), outputs.device) > 0).to(outputs.dtype)
    out = (is_member @ outputs.flatten(1)).view(len(sets), *outputs.shape[1:])
    for row, members in enumerate(sets):
        if len(members) > 1:
            out[row] /= len(members)
    return out
