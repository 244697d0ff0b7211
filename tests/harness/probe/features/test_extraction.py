"""Features in memory, on disk or computed again."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aimscale.aim.model import AIM
from aimscale.harness.device.distributed import Group
from aimscale.harness.probe.features.extraction import CachedTokens, Moments, StreamedTokens
from aimscale.harness.probe.features.tasks import ProbeError


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


def test_a_full_disk_is_one_sentence(task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("aimscale.harness.probe.features.extraction.CACHE_SHARE", 0.0)
    monkeypatch.setattr("os.posix_fallocate", full)
    train, _ = task.open()
    with pytest.raises(ProbeError, match="No space left on device"):
        task.feature_pass(folder=tmp_path).split(train)
    assert not list(tmp_path.iterdir())


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
