"""Votes of nearest neighbours against their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from aimscale.harness.probe.features.extraction import ALONE
from aimscale.harness.probe.heads.knn import neighbour_votes


def test_neighbours_vote_with_their_cosine() -> None:
    bank = functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0], [-0.9, 0.1]]))
    query = functional.normalize(torch.tensor([[0.8, 0.02]]))
    ((rows, votes),) = neighbour_votes(bank, torch.tensor([0, 0, 1, 1]), query, (1, 4), 2, ALONE)
    assert rows == slice(0, 1)
    assert votes.argmax(2).tolist() == [[0], [0]]
    assert votes[0, 0].tolist() == [1.0, 0.0]  # the nearest has weight one
    assert votes[1, 0, 0] > votes[1, 0, 1] > 0


@pytest.mark.parametrize("ks", [(5, 20), (1, 3)])
def test_votes_are_those_of_the_definition_whatever_the_blocks(
    monkeypatch: pytest.MonkeyPatch, ks: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = (functional.normalize(torch.randn(n, 8, generator=generator)) for n in (301, 37))
    labels = torch.randint(0, 5, (301,), generator=generator)
    cosine = (queries @ bank.mT).numpy()
    for block in (8192, 64):
        monkeypatch.setattr("aimscale.harness.probe.heads.knn.BANK_BLOCK", block)
        votes = torch.cat([votes for _, votes in neighbour_votes(bank, labels, queries, ks, 5, ALONE)], dim=1)
        for row, values in enumerate(cosine):
            for number, k in enumerate(ks):
                nearest = np.argsort(-values)[:k]
                expected = np.bincount(labels[nearest], np.exp((values[nearest] - values[nearest[0]]) / 0.07), 5)
                assert votes[number, row].numpy() == pytest.approx(expected, rel=1e-4, abs=1e-6)
