"""Which blocks a probe reads, and how their outputs are averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BlockSet = tuple[int, ...]
"""Blocks, counted from 0, whose outputs are averaged."""


def block_sets(num_blocks: int) -> tuple[list[BlockSet], BlockSet]:
    """Candidate sets and the protocol's fixed one.

    The fixed one is the last six blocks (the last half of a model of fewer than twelve). Candidates: that, every
    single block, and every window of the same length, among which the published best layers (six contiguous ones in
    all four sizes) were found.
    """
    length = 6 if num_blocks >= 12 else max(1, num_blocks // 2)
    windows = [tuple(range(start, start + length)) for start in range(num_blocks - length + 1)]
    singles: list[BlockSet] = [(block,) for block in range(num_blocks)]
    return list(dict.fromkeys(windows + singles)), windows[-1]


def averaging(sets: Sequence[BlockSet], num_blocks: int, device: torch.device) -> Tensor:
    """float32 (S, L): row s times the outputs of all blocks is their mean over set s."""
    weights = torch.zeros(len(sets), num_blocks, device=device)
    for row, members in enumerate(sets):
        weights[row, list(members)] = 1 / len(members)
    return weights


def averages(outputs: Tensor, sets: Sequence[BlockSet]) -> Tensor:
    """Mean over the blocks of each set, summed in fp32 and kept in the type of `outputs`: (L, ...) -> (S, ...)."""
    weights = averaging(sets, len(outputs), outputs.device)
    out = outputs.new_empty((len(sets), *outputs.shape[1:]))
    for row, members in enumerate(sets):
        if len(members) == 1:
            out[row] = outputs[members[0]]
        else:
            first, last = min(members), max(members) + 1
            part = outputs[first:last].flatten(1).float()
            out[row] = (weights[row, first:last] @ part).view(outputs.shape[1:])
    return out
