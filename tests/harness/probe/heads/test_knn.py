"""Votes of nearest neighbours against their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from aimscale.harness.probe.features.extraction import ALONE
from aimscale.harness.probe.heads.knn import NeighbourBank


def test_neighbours_vote_with_their_cosine() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0], [-0.9, 0.1]])
    labels, mean, variance = torch.tensor([0, 0, 1, 1]), bank.mean(0), bank.var(0, unbiased=False)
    neighbours = NeighbourBank(bank, labels, mean, variance, 2, ALONE)
    ((rows, votes),) = neighbours.votes(torch.tensor([[0.8, 0.02]]), (1, 4))
    assert rows == slice(0, 1)
    assert votes.argmax(2).tolist() == [[0], [0]]
    assert votes[0, 0].tolist() == [1.0, 0.0]  # the nearest has weight one
    assert votes[1, 0, 0] > votes[1, 0, 1] > 0


@pytest.mark.parametrize("ks", [(5, 20), (1, 3)])
def test_votes_are_those_of_the_definition_whatever_the_blocks(
    monkeypatch: pytest.MonkeyPatch, ks: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(301, 8, generator=generator), torch.randn(37, 8, generator=generator)
    labels = torch.randint(0, 5, (301,), generator=generator)
    mean, variance = bank.mean(0), bank.var(0, unbiased=False)
    unit = functional.normalize((torch.cat([bank, queries]) - mean) * (variance + 1e-6).rsqrt(), dim=1)
    cosine = (unit[301:] @ unit[:301].mT).numpy()
    for block in (8192, 64):
        monkeypatch.setattr("aimscale.harness.probe.heads.knn.BANK_BLOCK", block)
        neighbours = NeighbourBank(bank, labels, mean, variance, 5, ALONE)
        votes = torch.cat([votes for _, votes in neighbours.votes(queries, ks)], dim=1)
        for row, values in enumerate(cosine):
            for number, k in enumerate(ks):
                nearest = np.argsort(-values)[:k]
                expected = np.bincount(labels[nearest], np.exp((values[nearest] - values[nearest[0]]) / 0.07), 5)
                assert votes[number, row].numpy() == pytest.approx(expected, rel=1e-4, abs=1e-6)
