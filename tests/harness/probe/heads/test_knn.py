"""Votes of nearest neighbours against their definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from aimscale.harness.distributed.group import ALONE
from aimscale.harness.probe.features.extraction import PooledFeatures
from aimscale.harness.probe.features.images import Task, holdout_split
from aimscale.harness.probe.heads.knn import Neighbours, neighbour_votes
from aimscale.harness.probe.heads.scores import Candidate


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


def test_block_sets_share_a_pass_over_the_features(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = task.open()
    fit, held = holdout_split(train.labels, 0.2, seed=0)
    whole = Task(section=task.section(), train=train, test=train, seed=0, group=ALONE)
    neighbours = Neighbours(task=whole, features=task.features(train, fit=fit))
    sets, read, real = [(0,), (1,), (0, 1), (2,), (1, 2)], [], PooledFeatures.rows

    def rows(self: PooledFeatures, numbers: torch.Tensor) -> torch.Tensor:
        read.append(len(numbers))
        return real(self, numbers)

    monkeypatch.setattr(PooledFeatures, "rows", rows)
    found = []
    for share, num_passes in ((0.2, 1), (0.0, len(sets))):
        monkeypatch.setattr("aimscale.harness.probe.heads.knn.BANKS_SHARE", share)
        read.clear()
        found.append(neighbours.candidates(sets))
        assert sum(read) == num_passes * (len(fit) + len(held))
    assert found[0] == found[1]
    assert [each.blocks for each in found[0][:: len(found[0]) // len(sets)]] == sets


def test_the_test_split_is_compared_with_all_training_images(task: Any) -> None:
    """A bank without the hold-out passed all tests; the nearest neighbour of each of its images is itself."""
    train, _ = task.open()
    fit, held = holdout_split(train.labels, 0.2, seed=0)
    whole = Task(section=task.section(), train=train, test=train, seed=0, group=ALONE)
    features = task.features(train, fit=fit)
    chosen = Candidate(kind="knn", blocks=(0,), value=1, holdout_top1=0.0, holdout_loss=0.0)
    predicted = Neighbours(task=whole, features=features).predict(chosen, features.pooled).predicted
    assert len(held)
    assert torch.equal(predicted, train.labels)
