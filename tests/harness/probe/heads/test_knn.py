"""Votes of nearest neighbours against their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from aimscale.harness.distributed.group import ALONE
from aimscale.harness.probe.heads.knn import neighbour_votes


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
