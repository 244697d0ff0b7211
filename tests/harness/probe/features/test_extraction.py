"""Features in memory or computed again."""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from aimscale.aim.model import AIM
from aimscale.harness.distributed.group import Group
from aimscale.harness.probe.features.extraction import CachedTokens, StreamedTokens
from aimscale.harness.probe.features.moments import Moments, averages, owned_averages
from aimscale.harness.probe.features.tasks import BlockSet, ProbeError


def test_features_that_memory_does_not_hold_are_computed_again_or_refused(
    task: Any, model: AIM, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, _ = task.open()
    num_bytes = 600 * model.config.depth * model.config.num_tokens * model.config.width * 4
    monkeypatch.setattr(Group, "memory_bytes", lambda self: round(10.1 * num_bytes))
    cached = task.features(train)
    assert isinstance(cached.tokens, CachedTokens)
    monkeypatch.setattr(Group, "memory_bytes", lambda self: round(9.9 * num_bytes))
    streamed = task.features(train)
    assert isinstance(streamed.tokens, StreamedTokens)
    everything = torch.arange(600)
    torch.testing.assert_close(streamed.pooled.rows(everything), cached.pooled.rows(everything))
    for name in ("memory_bytes", "host_memory_bytes"):  # neither the device nor the host has room for pooled features
        monkeypatch.setattr(Group, name, lambda self: 0)
    with pytest.raises(ProbeError, match="use more ranks"):
        task.features(train)


def fits_on(group: Group, task: Any, free: dict[str, tuple[int, int]]) -> dict[str, tuple[int, bool] | None]:
    """One of two ranks of a host, which finds so much free there: by case and rank, bytes kept, if there is room."""
    train, _ = task.open()
    found: dict[str, tuple[int, bool] | None] = {}
    for case, of_ranks in free.items():
        with unittest.mock.patch(f"{Group.__module__}.free_host_bytes", return_value=of_ranks[group.rank]):
            try:
                split = task.features(train, group)
                found[case] = split.pooled._values.nbytes, isinstance(split.tokens, CachedTokens)
            except ProbeError:
                found[case] = None
    return found


def test_ranks_of_a_host_decide_as_one_and_take_no_more_than_it_has_free(
    task: Any, model: AIM, in_group: Callable[..., list[Any]]
) -> None:
    pooled = 600 * model.config.depth * model.config.width * 4
    free = {
        "roomy": (400 * pooled, 1000 * pooled),
        "tight": (round(2.6 * pooled), round(2.6 * pooled)),  # a half of .4 of that is a little more than a half
        "short": (round(2.4 * pooled), round(2.4 * pooled)),
        "unlike": (10**6 * pooled, 0),
    }
    ranks = in_group(fits_on, task, free, world_size=2)
    assert ranks[0] == ranks[1]
    assert ranks[0] == {"roomy": (pooled // 2, True), "tight": (pooled // 2, False), "short": None, "unlike": None}


def averages_on(group: Group, sets: list[list[BlockSet]], owners: list[int]) -> tuple[bool, int]:
    """Whether a rank gets the averages over its block sets of all images, and the bytes that it is sent."""
    outputs = torch.randn(4, len(owners), 3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    sent: list[int] = []
    with unittest.mock.patch.object(
        group, "all_to_all", lambda parts, sizes: sent.extend(sizes) or Group.all_to_all(group, parts, sizes)
    ):
        own = outputs[:, [owner == group.rank for owner in owners]]
        found = owned_averages(own, np.array(owners), sets, group)
    return torch.equal(found, averages(outputs, sets[group.rank])), sum(sent)


def test_averages_of_a_block_set_go_to_its_owner_alone(in_group: Callable[..., list[Any]]) -> None:
    sets: list[list[BlockSet]] = [[(0,), (1, 2)], [(0, 1, 2, 3)], []]
    found = in_group(averages_on, sets, [1, 0, 0, 1, 2, 1], world_size=3)
    assert found == [(True, len(own) * 6 * 3 * 8 * 2) for own in sets]


def test_statistics_of_any_average_are_those_of_its_vectors_whatever_the_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(4, 90, 6, generator=generator) * 3 + 40

    def moments(*parts: Tensor) -> Moments:
        found = Moments.around(vectors[:, :5].mean(1))
        for part in parts:
            found.add(part)
        return found

    whole = moments(*vectors.split(37, dim=1))
    ranks = moments(vectors[:, ::2]) + moments(*vectors[:, 1::2].split(8, dim=1))
    for blocks in ((2,), (0, 1, 3)):
        mean, variance = whole.set_statistics([blocks])
        average = vectors[list(blocks)].mean(0)
        torch.testing.assert_close(mean[0], average.mean(0))
        torch.testing.assert_close(variance[0], average.var(0, correction=0), rtol=1e-4, atol=1e-5)
        assert all(
            torch.equal(one, other) for one, other in zip((mean, variance), ranks.set_statistics([blocks]), strict=True)
        )
