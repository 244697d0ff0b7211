"""Averages of block outputs, and means and variances of every such average from one pass over the images.

The batch norm of a probe standardises the average of some blocks. Its variance needs the products between blocks, so
these are summed once for all pairs; any average of blocks then has exact statistics without seeing the images again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aimscale.harness.device.distributed import Group
from aimscale.harness.probe.features.sizes import BlockSet

CHUNK_VALUES = 25_000_000
"""Values that are held in float64 at a time while their products are summed."""


def averages(outputs: Tensor, sets: Sequence[BlockSet]) -> Tensor:
    """Mean over the blocks of each set, summed in fp32 and kept in the type of `outputs`: (L, ...) -> (S, ...).

    One matrix product reads every block once, whatever the number of sets.
    """
    is_member = (_averaging(sets, len(outputs)) > 0).to(outputs)
    out = (is_member @ outputs.flatten(1)).view(len(sets), *outputs.shape[1:])
    for row, members in enumerate(sets):
        if len(members) > 1:
            out[row] /= len(members)
    return out


def _averaging(sets: Sequence[BlockSet], num_blocks: int) -> Tensor:
    """float32 (S, L) on the host: row s times the outputs of all blocks is their mean over set s."""
    weights = torch.zeros(len(sets), num_blocks)
    for row, members in enumerate(sets):
        weights[row, list(members)] = 1 / len(members)
    return weights


@dataclass(kw_only=True)
class Moments:
    """Sums over vectors of L blocks, per channel, about a fixed centre.

    All in float64: summed in any order, batches and ranks included, they give the same float32 statistics. Sums of fp32
    products did not, and nearest neighbours changed places.
    """

    centre: Tensor
    """float32 (L, d): any value near the mean, the same on all ranks."""
    count: int
    """Vectors seen."""
    sums: Tensor
    """float64 (L, d): of the deviations from the centre."""
    products: Tensor
    """float64 (d, L, L): of their products between blocks."""

    @classmethod
    def about(cls, centre: Tensor) -> Moments:
        """Nothing seen yet."""
        num_blocks, width = centre.shape
        return cls(
            centre=centre,
            count=0,
            sums=torch.zeros(num_blocks, width, dtype=torch.float64, device=centre.device),
            products=torch.zeros(width, num_blocks, num_blocks, dtype=torch.float64, device=centre.device),
        )

    @torch.no_grad()
    def add(self, vectors: Tensor) -> None:
        """See vectors (L, n, d)."""
        step = max(1, CHUNK_VALUES // (vectors.shape[0] * vectors.shape[2]))
        for part in vectors.split(step, dim=1):
            deviation = (part.double() - self.centre[:, None]).permute(2, 0, 1)
            self.sums += deviation.sum(2).mT
            self.products += deviation @ deviation.mT
            self.count += part.shape[1]

    def over_ranks(self, group: Group) -> Moments:
        """The sums of all ranks."""
        group.sum_tensor(self.sums)
        group.sum_tensor(self.products)
        (self.count,) = group.sum_counts(self.count)
        return self

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            centre=self.centre,
            count=self.count + other.count,
            sums=self.sums + other.sums,
            products=self.products + other.products,
        )

    def of_sets(self, sets: Sequence[BlockSet]) -> tuple[Tensor, Tensor]:
        """Mean and biased variance, float32 (S, d) each, of the average over each set's blocks."""
        weights = _averaging(sets, len(self.centre)).to(self.centre.device, torch.float64)
        mean = weights @ (self.sums / self.count)
        square = torch.einsum("sl,dlm,sm->sd", weights, self.products / self.count, weights)
        variance = (square - mean.square()).clamp_min(0)
        return (mean + weights @ self.centre.double()).float(), variance.float()
