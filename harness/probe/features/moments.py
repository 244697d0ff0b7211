"""Means and variances of every average of blocks, from one pass over the images.

The batch norm of a probe standardises the average of some blocks. Its variance needs the products between blocks, so
these are summed once for all pairs; any average of blocks then has exact statistics without seeing the images again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aimscale.harness.device.distributed import Group
from aimscale.harness.probe.features.blocks import averaging
from aimscale.harness.probe.features.sizes import BlockSet

CHUNK_VALUES = 25_000_000
"""Values that are held in float64 at a time while their products are summed."""


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

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes up."""
        return {"count": self.count, "sums": self.sums.cpu(), "products": self.products.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.count = state["count"]
        self.sums.copy_(state["sums"])
        self.products.copy_(state["products"])

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
        weights = averaging(sets, len(self.centre), self.centre.device).double()
        mean = weights @ (self.sums / self.count)
        square = torch.einsum("sl,dlm,sm->sd", weights, self.products / self.count, weights)
        variance = (square - mean.square()).clamp_min(0)
        return (mean + weights @ self.centre.double()).float(), variance.float()
