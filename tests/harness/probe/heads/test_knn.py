"""Votes of nearest neighbours against their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from aimscale.harness.probe.features.extraction import ALONE
from aimscale.harness.probe.heads.knn import NeighbourBank


def test_neighbours_vote_with_their_cosine() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0], [-0.9, 0.1]])
    labels, mean, variance = torch.tensor([0, 0, 1, 1]), bank.mean(0), bank.var(0, unbiased=False)
    neighbours = NeighbourBank(bank, labels, torch.arange(4), mean, variance, 2, ALONE)
    ((rows, votes),) = neighbours.votes(torch.tensor([[0.8, 0.02]]), (1, 4))
    assert rows == slice(0, 1)
    assert votes.argmax(2).tolist() == [[0], [0]]
    assert votes[0, 0].tolist() == [1.0, 0.0]  # the nearest has weight one
    assert votes[1, 0, 0] > votes[1, 0, 1] > 0


@pytest.mark.parametrize("ks", [(5, 20), (1, 3)])
def test_blocks_and_ranks_change_no_neighbour(monkeypatch: pytest.MonkeyPatch, ks: tuple[int, ...]) -> None:
    """Where a third of the images stand there several times, with another label each time."""
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(301, 8, generator=generator), torch.randn(37, 8, generator=generator)
    bank[100:200], bank[200:300], queries[:9] = bank[:100], bank[:100], bank[50:59]
    labels = torch.randint(0, 5, (301,), generator=generator)
    mean, variance = bank.mean(0), bank.var(0, unbiased=False)

    def votes(order: Tensor) -> Tensor:
        neighbours = NeighbourBank(bank[order], labels[order], order, mean, variance, 5, ALONE)
        return torch.cat([votes for _, votes in neighbours.votes(queries, ks)], dim=1)

    whole = votes(torch.arange(301))
    unit = functional.normalize((torch.cat([bank, queries]) - mean) * (variance + 1e-6).rsqrt(), dim=1)
    cosine = (unit[301:] @ unit[:301].mT).numpy()
    for row, values in enumerate(cosine):
        nearest = sorted(range(301), key=lambda image: (-values[image], image))[: ks[0]]
        expected = np.bincount(labels[nearest], np.exp((values[nearest] - values[nearest[0]]) / 0.07), 5)
        assert whole[0, row].numpy() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    monkeypatch.setattr("aimscale.harness.probe.heads.knn.BANK_BLOCK", 64)
    assert torch.equal(votes(torch.arange(301)), whole)
    assert torch.equal(votes(torch.cat([torch.arange(0, 301, 2), torch.arange(1, 301, 2)])), whole)
