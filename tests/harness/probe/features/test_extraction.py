"""Features in memory, on disk or computed again: bounds, interruptions and damage."""

from __future__ import annotations

import copy
import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from aimscale.aim.errors import UserError
from aimscale.aim.model import AIM
from aimscale.harness.probe.features.backbones import AimBackbone
from aimscale.harness.probe.features.extraction import ALONE, CachedTokens, FeaturePass, StreamedTokens


class Interrupted(Exception):
    pass


def test_features_are_kept_only_within_the_stated_memory_and_disk(task: Any, model: AIM, tmp_path: Path) -> None:
    train, _ = task.open()
    num_bytes = 600 * model.config.depth * model.config.num_tokens * model.config.width * 4
    cached = task.feature_pass(cache_gb=1.01 * num_bytes / 1e9).split(train, "train", "")
    assert isinstance(cached.tokens, CachedTokens)
    streamed = task.feature_pass(cache_gb=0.99 * num_bytes / 1e9).split(train, "train", "")
    assert isinstance(streamed.tokens, StreamedTokens)
    assert not streamed.pooled.is_on_disk
    on_disk = task.feature_pass(cache_gb=0.0, folder=tmp_path).split(train, "train", "key")
    (file,) = tmp_path.glob("*.features")
    assert file.stat().st_size == on_disk.pooled.num_bytes == num_bytes // model.config.num_tokens
    everything = torch.arange(600)
    torch.testing.assert_close(on_disk.pooled.rows(everything), cached.pooled.rows(everything))
    on_disk.pooled.remove()
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"more than --cache-gb 0 of memory and --disk-gb 1e-06 of disk"):
        task.feature_pass(cache_gb=0.0, disk_gb=1e-6, folder=tmp_path).split(train, "train", "")


def test_tokens_that_nobody_reads_are_neither_kept_nor_summed(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = task.open()
    fit = np.arange(0, 600, 2)
    with_tokens, without = (task.feature_pass(for_tokens=each).split(train, "", "", fit) for each in (True, False))
    assert isinstance(with_tokens.tokens, CachedTokens)
    assert isinstance(without.tokens, StreamedTokens)
    assert [each.count for each in without.of_tokens] == [0, 0]
    everything = slice(None)
    assert torch.equal(without.pooled.rows(everything), with_tokens.pooled.rows(everything))
    for part, whole in zip(without.of_pooled, with_tokens.of_pooled, strict=True):
        assert torch.equal(part.sums, whole.sums)
        assert torch.equal(part.products, whole.products)
    asked: list[bool] = []
    split = FeaturePass.split

    def watched(work: FeaturePass, *args: Any) -> Any:
        asked.append(work.for_tokens)
        return split(work, *args)

    monkeypatch.setattr(FeaturePass, "split", watched)
    for kinds, reads in ((("linear", "knn"), False), (("knn", "attentive"), True)):
        asked.clear()
        task.probe(task.section(kinds=kinds), seed=0, out=None)
        assert set(asked) == {reads}


def test_a_full_disk_is_one_sentence(task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    train, _ = task.open()
    with pytest.raises(UserError, match=r"cannot have them .No space left on device"):
        task.feature_pass(cache_gb=0.0, folder=tmp_path).split(train, "train", "")
    assert not list(tmp_path.glob("*.features"))


def test_pooled_features_on_disk_are_gone_on_with_and_a_damaged_file_is_computed_again(
    task: Any, model: AIM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("aimscale.harness.probe.features.extraction.STRETCH_ROWS", 100)
    monkeypatch.setattr("aimscale.harness.probe.features.pooled.STRETCH_ROWS", 100)
    train, _ = task.open()
    fit = np.arange(0, 600, 2)
    whole = task.feature_pass().split(train, "train", "key", fit)
    passes: list[int] = []

    class Counted(AimBackbone):
        def features(self, images: Tensor, blocks: Sequence[int]) -> Tensor:
            passes.append(len(images))
            return super().features(images, blocks)

    def go(key: str, stretches: int = 10**9) -> Any:
        left = [stretches]

        def pause() -> None:
            left[0] -= 1
            if not left[0]:
                raise Interrupted

        passes.clear()
        backbone = Counted(lambda: copy.deepcopy(model))
        work = FeaturePass(backbone=backbone, group=ALONE, precision="fp32", cache_gb=0.0, folder=tmp_path, pause=pause)
        return work.split(train, "train", key, fit)

    def same(one: Any, other: Any) -> None:
        rows = torch.arange(600)
        torch.testing.assert_close(one.pooled.rows(rows), other.pooled.rows(rows))
        for name in ("of_tokens", "of_pooled"):
            for mine, theirs in zip(getattr(one, name), getattr(other, name), strict=True):
                torch.testing.assert_close(mine.of_sets([(0, 1)]), theirs.of_sets([(0, 1)]))

    with pytest.raises(Interrupted):
        go("key", stretches=4)
    same(go("key"), whole)
    assert sum(passes) < 200 + 2 * 20  # two stretches were left, and the few images that set shape and centre
    same(go("key"), whole)
    assert sum(passes) < 2 * 20
    (file,) = tmp_path.glob("*.features")
    with file.open("r+b") as opened:
        opened.seek(1000)
        opened.write(b"scribble")
    same(go("key"), whole)
    assert "is damaged; its features are computed again" in capsys.readouterr().err
    assert sum(passes) >= 600
    go("another key")  # another model's or another seed's
    assert sum(passes) >= 600
