"""Features in memory, on disk or computed again."""

from __future__ import annotations

import dataclasses
import errno
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from aimscale.aim.model import AIM
from aimscale.harness.distributed.group import Group
from aimscale.harness.probe.features.moments import Moments, averages, owned_averages
from aimscale.harness.probe.features.sources import CachedTokens, StreamedTokens
from aimscale.harness.probe.features.tasks import BlockSet, ProbeError


def test_features_that_memory_does_not_hold_are_computed_again_or_lie_in_a_file_without_a_name(
    task: Any, model: AIM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, _ = task.open()
    num_bytes = 600 * model.config.depth * model.config.num_tokens * model.config.width * 4
    monkeypatch.setattr(Group, "memory_bytes", lambda self: round(10.1 * num_bytes))
    cached = task.feature_pass().split(train)
    assert isinstance(cached.tokens, CachedTokens)
    monkeypatch.setattr(Group, "memory_bytes", lambda self: round(9.9 * num_bytes))
    streamed = task.feature_pass().split(train)
    assert isinstance(streamed.tokens, StreamedTokens)
    monkeypatch.setattr(Group, "host_memory_bytes", lambda self: 0)
    on_disk = task.feature_pass(folder=tmp_path).split(train)
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert [line[-1] for line in mapped] == ["(deleted)"]
    assert not list(tmp_path.iterdir())
    everything = torch.arange(600)
    for split in (streamed, on_disk):
        torch.testing.assert_close(split.pooled.rows(everything), cached.pooled.rows(everything))
    with pytest.raises(ProbeError):
        task.feature_pass().split(train)


def split_on(group: Group, task: Any, folder: Path, free: dict[str, tuple[int, int]]) -> dict[str, tuple[int, bool]]:
    """One of two ranks of a host, which finds so much free there: by case and rank, where do its features go?"""
    train, _ = task.open()
    found = {}
    for case, of_ranks in free.items():
        with unittest.mock.patch(f"{Group.__module__}.free_host_bytes", return_value=of_ranks[group.rank]):
            split = dataclasses.replace(task.feature_pass(folder=folder), group=group).split(train)
        is_mapped = str(folder) in Path("/proc/self/maps").read_text()
        found[case] = 0 if is_mapped else split.pooled.num_bytes, isinstance(split.tokens, CachedTokens)
        del split
    return found


def test_ranks_of_a_host_decide_as_one_and_take_no_more_than_it_has_free(
    task: Any, model: AIM, tmp_path: Path, in_group: Callable[..., list[Any]]
) -> None:
    pooled = 600 * model.config.depth * model.config.width * 4
    free = {
        "roomy": (400 * pooled, 1000 * pooled),
        "tight": (round(2.6 * pooled), round(2.6 * pooled)),  # a half of .4 of that is a little more than a half
        "short": (round(2.4 * pooled), round(2.4 * pooled)),
        "unlike": (10**6 * pooled, 0),
    }
    ranks = in_group(split_on, task, tmp_path, free, world_size=2)
    assert ranks[0] == ranks[1]
    assert ranks[0] == {case: (pooled // 2 * (case in ("roomy", "tight")), case == "roomy") for case in free}


def averages_on(group: Group, sets: list[list[BlockSet]], owners: list[int]) -> tuple[bool, int]:
    """Whether a rank gets the averages over its block sets of all images, and the bytes that it is sent."""
    outputs = torch.randn(4, len(owners), 3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    sent: list[int] = []
    with unittest.mock.patch.object(
        group, "exchange", lambda parts, sizes: sent.extend(sizes) or Group.exchange(group, parts, sizes)
    ):
        own = outputs[:, [owner == group.rank for owner in owners]]
        found = owned_averages(own, np.array(owners), sets, group)
    return torch.equal(found, averages(outputs, sets[group.rank])), sum(sent)


def test_averages_of_a_block_set_go_to_its_owner_alone(in_group: Callable[..., list[Any]]) -> None:
    sets: list[list[BlockSet]] = [[(0,), (1, 2)], [(0, 1, 2, 3)], []]
    found = in_group(averages_on, sets, [1, 0, 0, 1, 2, 1], world_size=3)
    assert found == [(True, len(own) * 6 * 3 * 8 * 2) for own in sets]


def test_a_full_disk_is_one_sentence(task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("aimscale.harness.probe.features.placement.HOST_SHARE", 0.0)
    monkeypatch.setattr("os.posix_fallocate", full)
    train, _ = task.open()
    with pytest.raises(ProbeError, match="No space left on device"):
        task.feature_pass(folder=tmp_path).split(train)
    assert not list(tmp_path.iterdir())


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
