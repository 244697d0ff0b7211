"""Statistics of features, added up batch by batch and rank by rank."""

from __future__ import annotations

import torch
from torch import Tensor

from aimscale.harness.probe.features.extraction import Moments


def test_statistics_of_any_average_are_those_of_its_vectors_whatever_the_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(4, 90, 6, generator=generator) * 3 + 40

    def moments(*parts: Tensor) -> Moments:
        found = Moments.about(vectors[:, :5].mean(1))
        for part in parts:
            found.add(part)
        return found

    whole = moments(*vectors.split(37, dim=1))
    ranks = moments(vectors[:, ::2]) + moments(*vectors[:, 1::2].split(8, dim=1))
    for blocks in ((2,), (0, 1, 3)):
        mean, variance = whole.of_sets([blocks])
        average = vectors[list(blocks)].mean(0)
        torch.testing.assert_close(mean[0], average.mean(0))
        torch.testing.assert_close(variance[0], average.var(0, correction=0), rtol=1e-4, atol=1e-5)
        assert all(
            torch.equal(one, other) for one, other in zip((mean, variance), ranks.of_sets([blocks]), strict=True)
        )
