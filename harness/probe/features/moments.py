"""Averages over blocks and their exact statistics, without seeing the images again.

The batch norm of a probe standardises the average of some blocks. Its variance needs the products between blocks, so
these are summed once for all pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aimscale.harness.distributed.group import Group
from aimscale.harness.probe.features.tasks import BlockSet, ProbeError

NOT_FINITE = "the features are not finite: the weights diverged, or are damaged"
CHUNK_VALUES = 25_000_000
"""Values that are held in float64 at a time while their products are summed."""


def averages(outputs: Tensor, sets: Sequence[BlockSet]) -> Tensor:
    """Average over the blocks of each set by one matrix product, in fp32, kept in the type of `outputs`: (L, ...) ->
    (S, ...)."""
    is_member = (_averaging(sets, len(outputs)) > 0).to(outputs)
    out = (is_member @ outputs.flatten(1)).view(len(sets), *outputs.shape[1:])
    for row, members in enumerate(sets):
        if len(members) > 1:
            out[row] /= len(members)
    return out


def owned_averages(outputs: Tensor, rank_of: np.ndarray, owned: Sequence[Sequence[BlockSet]], group: Group) -> Tensor:
    """Average over the block sets that this rank owns, for images of all ranks, (S, B, N, d) in their order.

    Each rank averages its own images and sends every rank the averages over that rank's sets alone.

    Args:
        outputs: (L, b, N, d) of this rank's images.
        rank_of: rank of each image (B,).
        owned: block sets of every rank.
    """
    averaged = averages(outputs, [blocks for sets in owned for blocks in sets])
    if group.world_size == 1:
        return averaged
    # as bytes: not every backend moves bfloat16
    parts = [part.flatten().view(torch.uint8) for part in averaged.split([len(sets) for sets in owned])]
    num_owned, image_bytes = len(owned[group.rank]), averaged.shape[2:].numel() * averaged.element_size()
    counts = np.bincount(rank_of, minlength=group.world_size).tolist()
    received = group.all_to_all(parts, [num_owned * count * image_bytes for count in counts])
    by_rank = [
        part.view(averaged.dtype).view(num_owned, count, *averaged.shape[2:])
        for part, count in zip(received, counts, strict=True)
    ]
    order = torch.from_numpy(np.argsort(np.argsort(rank_of, kind="stable"), kind="stable"))
    return torch.cat(by_rank, dim=1).index_select(1, order.to(averaged.device))


def _averaging(sets: Sequence[BlockSet], num_blocks: int) -> Tensor:
    """Build the float32 matrix (S, L), on the host, whose row s averages the outputs of all blocks over set s."""
    weights = torch.zeros(len(sets), num_blocks)
    for row, members in enumerate(sets):
        weights[row, list(members)] = 1 / len(members)
    return weights


@dataclass(kw_only=True)
class Moments:
    """Sums over vectors of L blocks, per channel, about a fixed centre.

    They are float64: summed in any order, batches and ranks included, they give the same float32 statistics. With sums
    of fp32 products they did not, and nearest neighbours were swapped.
    """

    centre: Tensor
    """Centre, float32 (L, d): any value near the mean, the same on all ranks."""
    count: int
    """Number of vectors."""
    sums: Tensor
    """Sums of the deviations from the centre, float64 (L, d)."""
    products: Tensor
    """Sums of the products of deviations between blocks, float64 (d, L, L)."""

    @classmethod
    def around(cls, centre: Tensor) -> Moments:
        """Start with no vectors, about this centre."""
        num_blocks, width = centre.shape
        return cls(
            centre=centre,
            count=0,
            sums=torch.zeros(num_blocks, width, dtype=torch.float64, device=centre.device),
            products=torch.zeros(width, num_blocks, num_blocks, dtype=torch.float64, device=centre.device),
        )

    @torch.no_grad()
    def add(self, vectors: Tensor) -> None:
        """Add vectors (L, n, d)."""
        step = max(1, CHUNK_VALUES // (vectors.shape[0] * vectors.shape[2]))
        for part in vectors.split(step, dim=1):
            deviation = (part.double() - self.centre[:, None]).permute(2, 0, 1)
            self.sums += deviation.sum(2).mT
            self.products += deviation @ deviation.mT
            self.count += part.shape[1]

    def over_ranks(self, group: Group) -> Moments:
        """Sum over all ranks, in place."""
        group.sum_tensor(self.sums)
        group.sum_tensor(self.products)
        if not self.sums.isfinite().all():
            raise ProbeError(NOT_FINITE)
        (self.count,) = group.sum_counts(self.count)
        return self

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            centre=self.centre,
            count=self.count + other.count,
            sums=self.sums + other.sums,
            products=self.products + other.products,
        )

    def set_statistics(self, sets: Sequence[BlockSet]) -> tuple[Tensor, Tensor]:
        """Compute mean and biased variance, float32 (S, d) each, of the average over each set's blocks."""
        weights = _averaging(sets, len(self.centre)).to(self.centre.device, torch.float64)
        mean = weights @ (self.sums / self.count)
        square = torch.einsum("sl,dlm,sm->sd", weights, self.products / self.count, weights)
        variance = (square - mean.square()).clamp_min(0)
        return (mean + weights @ self.centre.double()).float(), variance.float()
