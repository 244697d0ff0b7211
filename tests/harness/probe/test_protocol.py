"""Probing end to end on the real 8x8 digits of scikit-learn."""

from __future__ import annotations

import copy
import errno
import io
import json
import math
import random
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from aimscale.aim.config import model_config
from aimscale.aim.errors import UserError
from aimscale.aim.model import AIM
from aimscale.aim.probes import AttentiveProbe, EfficientProbe, LinearProbe
from aimscale.aim.weights import load_probe
from aimscale.harness.data.store.pack import PackedImage, write_dataset
from aimscale.harness.probe.features.backbones import AimBackbone, PixelBackbone, precision_difference
from aimscale.harness.probe.features.extraction import ALONE, CachedTokens, FeaturePass, StreamedTokens
from aimscale.harness.probe.features.images import LabelledImages, holdout_split, open_task
from aimscale.harness.probe.features.moments import Moments
from aimscale.harness.probe.features.sizes import block_sets
from aimscale.harness.probe.features.views import ARGUMENTS, PublishedViews
from aimscale.harness.probe.heads.fit import GridFit, Split, best
from aimscale.harness.probe.heads.knn import NeighbourBank
from aimscale.harness.probe.heads.lora import _Adaptation
from aimscale.harness.probe.heads.progress import StepSaver
from aimscale.harness.probe.heads.scores import wilson_interval
from aimscale.harness.probe.heads.stacks import CLIP_NORM, STACKS, learning_rate
from aimscale.harness.probe.protocol import Bounds, probe_backbone
from aimscale.harness.run.config import ModelSection, ProbeSection

GEOMETRY = ModelSection(size="rung-32", image_size=16, patch_size=4)
DIGITS = tuple("0123456789")


def probe_model(model: AIM, section: ProbeSection, **options: Any) -> list[dict[str, Any]]:
    """Probe an AIM that is in memory; it is left as it was found."""
    return probe_backbone(AimBackbone(lambda: copy.deepcopy(model).float()), section, **options)


def write_digits(out: Path, rows: slice, classes: tuple[str, ...] | None = DIGITS) -> Path:
    bunch = load_digits()

    def images() -> Any:
        for i in range(*rows.indices(len(bunch.images))):
            buffer = io.BytesIO()
            Image.fromarray((bunch.images[i] * 15).astype(np.uint8)).resize((16, 16)).save(buffer, "png")
            yield PackedImage(f"{i:06d}", "png", buffer.getvalue(), int(bunch.target[i]) if classes else None)

    write_dataset(out, images(), classes=classes)
    return out


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    write_digits(root / "train", slice(0, 600))
    write_digits(root / "test", slice(600, 1000))
    write_digits(root / "unlabelled", slice(0, 20), classes=None)
    write_digits(root / "some", slice(0, 80))
    write_digits(root / "few", slice(0, 12))
    write_digits(root / "renamed", slice(0, 50), classes=tuple("abcdefghij"))
    return root


def section(root: Path, **changes: Any) -> ProbeSection:
    values: dict[str, Any] = {
        "task": "digits",
        "train": str(root / "train"),
        "test": str(root / "test"),
        "kinds": ("linear", "attentive", "knn"),
        "epochs": 10,
        "batch_size": 64,
        "lrs": (3e-3, 3e-2),
        "precision": "fp32",
        "centre_crop": 1.0,
    }
    return ProbeSection.model_validate(values | changes)


@pytest.fixture(scope="module")
def model() -> AIM:
    return AIM(model_config("rung-32", image_size=16, patch_size=4))


def test_probes_read_digits_repeatably_and_say_how(digits: Path, model: AIM, tmp_path: Path) -> None:
    entries = probe_model(model, section(digits), model_section=GEOMETRY, seed=3, out=tmp_path)
    again = probe_model(model, section(digits), model_section=GEOMETRY, seed=3, out=None)
    assert entries == again
    assert [entry["kind"] for entry in entries] == ["linear", "attentive", "knn"]
    for entry in entries:
        assert entry["n"] == 400
        assert entry["top1_lo95"] > 3 * entry["chance"]  # random weights, yet far above chance
        assert entry["top1_lo95"] < entry["top1"] < entry["top1_hi95"] < entry["top5"]
        assert entry["num_fit"] + entry["num_holdout"] == 600
    document = json.loads(next(tmp_path.glob("digits-*.json")).read_text())
    for entry, detail in zip(entries, document["probes"], strict=True):
        assert sum(row["correct"] for row in detail["per_class"]) == round(entry["top1"] * 400)
        assert max(row["holdout_top1"] for row in detail["grid"]) == entry["holdout_top1"]
    sets, _ = block_sets(model.config.depth)
    assert len(document["probes"][1]["grid"]) == 2 * len(sets)


def test_another_kind_of_probe_leaves_those_that_are_there_alone(
    digits: Path, model: AIM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"model_section": GEOMETRY, "seed": 0, "out": tmp_path, "since": 0.0}
    (neighbours,) = probe_model(model, section(digits, kinds=("knn",)), **options)
    monkeypatch.setattr("aimscale.harness.probe.protocol.Neighbours", None)
    both = probe_model(model, section(digits, kinds=("linear", "knn")), **options)
    assert [entry["kind"] for entry in both] == ["linear", "knn"]
    assert both[1] == neighbours
    (file,) = tmp_path.glob("*.json")
    assert [detail["kind"] for detail in json.loads(file.read_text())["probes"]] == ["knn", "linear"]


def test_saved_heads_are_released_probe_files_that_score_the_same(digits: Path, model: AIM, tmp_path: Path) -> None:
    (entry,) = probe_model(model, section(digits, kinds=("attentive",)), model_section=GEOMETRY, seed=0, out=tmp_path)
    probe = load_probe(next(tmp_path.glob("digits-*.attentive.safetensors")), model.config).eval()
    _, test = open_task(section(digits), GEOMETRY)
    with torch.no_grad():
        logits = probe(model.features(test.images(range(len(test))), entry["blocks"]).mean(0))
    assert float((logits.argmax(1) == test.labels).float().mean()) == pytest.approx(entry["top1"], abs=0.003)


def test_streamed_and_cached_features_give_the_same_probes(
    digits: Path, model: AIM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted = section(digits, epochs=2, batch_size=100)
    cached = probe_model(model, wanted, model_section=GEOMETRY, seed=0, out=None)
    monkeypatch.setattr("aimscale.harness.probe.features.sizes.HEADS_SHARE", 1e-12)  # one block set in each round
    monkeypatch.setattr("aimscale.harness.probe.heads.fit.WORKING_GB", 1e-4)  # and fewer at a time
    streamed = probe_model(model, wanted, model_section=GEOMETRY, seed=0, out=tmp_path, bounds=Bounds(cache_gb=0.0))
    for one, other in zip(cached, streamed, strict=True):
        assert one["blocks"] == other["blocks"]
        assert one["top1"] == pytest.approx(other["top1"], abs=0.005)
    assert not list(tmp_path.glob("*.features"))  # the disk is given back


def test_shuffled_labels_are_not_learnt(digits: Path, model: AIM, monkeypatch: pytest.MonkeyPatch) -> None:
    # a probe that saw the test split, or labels by another path, would stay above chance
    train, test = open_task(section(digits), GEOMETRY)
    train.labels.copy_(train.labels[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))])
    monkeypatch.setattr("aimscale.harness.probe.protocol.open_task", lambda *_: (train, test))
    for entry in probe_model(model, section(digits), model_section=GEOMETRY, seed=0, out=None):
        assert entry["top1_lo95"] < 0.14


class PlantedBackbone:
    """Digits are readable from block 1 alone; the other blocks hold noise."""

    name = "planted"
    num_blocks = 4
    num_heads = 1

    def use(self, dtype: torch.dtype) -> None:
        assert dtype == torch.float32

    def features(self, images: Tensor, blocks: Sequence[int]) -> Tensor:
        pixels = images.flatten(1)[:, None, :256]  # one of three equal channels
        noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0)) * 4
        return torch.stack([pixels if block == 1 else noise for block in blocks])


def test_the_search_finds_the_block_that_holds_the_answer(digits: Path) -> None:
    for entry in probe_backbone(PlantedBackbone(), section(digits, epochs=5), model_section=GEOMETRY, seed=0, out=None):
        assert entry["blocks"] == [1]
        assert entry["last_blocks"] == [2, 3]
        assert entry["top1"] > 0.75
        assert entry["last_top1"] < 0.2


def test_block_sets_hold_the_fixed_one_singles_and_the_published_best() -> None:
    sets, last = block_sets(24)
    assert last == (18, 19, 20, 21, 22, 23)
    assert (12, 13, 14, 15, 16, 17) in sets
    assert {(block,) for block in range(24)} <= set(sets)
    assert block_sets(2) == ([(0,), (1,)], (1,))


def test_holdout_is_stratified_disjoint_and_seeded() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 1)
    fit, held = holdout_split(labels, 0.2, seed=1)
    assert sorted([*fit, *held]) == list(range(81))
    assert np.bincount(labels[held], minlength=3).tolist() == [10, 6, 0]
    assert np.array_equal(held, holdout_split(labels, 0.2, seed=1)[1])
    assert not np.array_equal(held, holdout_split(labels, 0.2, seed=2)[1])
    assert len(holdout_split(torch.tensor([0, 0, 1, 1]), 0.01, seed=0)[1]) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "unlabelled"}, "has no labels"),
        ({"test": "renamed"}, "classes of .* differ"),
        ({"train": "few"}, "12 training images for 10 classes"),
        ({"train": "nowhere"}, "nowhere"),
    ],
)
def test_bad_tasks_are_refused_in_one_sentence(digits: Path, model: AIM, changes: Any, message: str) -> None:
    wanted = section(digits, **{side: str(digits / name) for side, name in changes.items()})
    with pytest.raises(UserError, match=message) as caught:
        probe_model(model, wanted, model_section=GEOMETRY, seed=0, out=None)
    assert "\n" not in str(caught.value)


def test_classes_are_matched_by_name_and_may_lack_test_images(digits: Path, model: AIM, tmp_path: Path) -> None:
    bunch = load_digits()
    names = tuple("98765430")  # in another order; no test image shows a 1 or a 2

    def images() -> Any:
        for i in range(600, 1000):
            if str(bunch.target[i]) in names:
                buffer = io.BytesIO()
                Image.fromarray((bunch.images[i] * 15).astype(np.uint8)).resize((16, 16)).save(buffer, "png")
                yield PackedImage(f"{i:06d}", "png", buffer.getvalue(), names.index(str(bunch.target[i])))

    write_dataset(tmp_path / "fewer", images(), classes=names)
    wanted = section(digits, kinds=("knn",), train=str(digits / "some"))
    probe_model(model, wanted, model_section=GEOMETRY, seed=0, out=tmp_path / "all")
    fewer = wanted.model_copy(update={"test": str(tmp_path / "fewer")})
    probe_model(model, fewer, model_section=GEOMETRY, seed=0, out=tmp_path / "part")
    per_class = [
        json.loads(next((tmp_path / name).glob("digits-*.json")).read_text())["probes"][0]["per_class"]
        for name in ("all", "part")
    ]
    for whole, part in zip(*per_class, strict=True):
        assert part == (whole if whole["class"] in names else whole | {"n": 0, "correct": 0})


def test_raw_pixels_have_no_tokens_to_attend_over(digits: Path) -> None:
    with pytest.raises(UserError, match="leave out kind 'attentive'"):
        probe_backbone(PixelBackbone(), section(digits), model_section=GEOMETRY, seed=0, out=None)
    wanted = section(digits, kinds=("linear", "knn"))
    for entry in probe_backbone(PixelBackbone(), wanted, model_section=GEOMETRY, seed=0, out=None):
        assert entry["top1"] > 0.8


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


def test_wilson_interval_of_published_examples() -> None:
    # Newcombe, Statistics in Medicine 17:857 (1998), table I
    for correct, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson_interval(correct, n) == pytest.approx((low, high), abs=5e-5)


def feature_pass(model: AIM, **options: Any) -> FeaturePass:
    backbone = AimBackbone(lambda: copy.deepcopy(model))
    return FeaturePass(backbone=backbone, group=ALONE, precision="fp32", **options)


def test_features_are_kept_only_within_the_stated_memory_and_disk(digits: Path, model: AIM, tmp_path: Path) -> None:
    train, _ = open_task(section(digits), GEOMETRY)
    num_bytes = 600 * model.config.depth * model.config.num_tokens * model.config.width * 4
    cached = feature_pass(model, cache_gb=1.01 * num_bytes / 1e9).split(train, "train", "")
    assert isinstance(cached.tokens, CachedTokens)
    streamed = feature_pass(model, cache_gb=0.99 * num_bytes / 1e9).split(train, "train", "")
    assert isinstance(streamed.tokens, StreamedTokens)
    assert not streamed.pooled.is_on_disk
    on_disk = feature_pass(model, cache_gb=0.0, folder=tmp_path).split(train, "train", "key")
    (file,) = tmp_path.glob("*.features")
    assert file.stat().st_size == on_disk.pooled.num_bytes == num_bytes // model.config.num_tokens
    everything = torch.arange(600)
    torch.testing.assert_close(on_disk.pooled.rows(everything), cached.pooled.rows(everything))
    on_disk.pooled.remove()
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"more than --cache-gb 0 of memory and --disk-gb 1e-06 of disk"):
        feature_pass(model, cache_gb=0.0, disk_gb=1e-6, folder=tmp_path).split(train, "train", "")


def test_tokens_that_nobody_reads_are_neither_kept_nor_summed(
    digits: Path, model: AIM, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, _ = open_task(section(digits), GEOMETRY)
    fit = np.arange(0, 600, 2)
    with_tokens, without = (feature_pass(model, for_tokens=each).split(train, "", "", fit) for each in (True, False))
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
        probe_model(model, section(digits, kinds=kinds), model_section=GEOMETRY, seed=0, out=None)
        assert set(asked) == {reads}


def test_a_full_disk_is_one_sentence(digits: Path, model: AIM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    train, _ = open_task(section(digits), GEOMETRY)
    with pytest.raises(UserError, match=r"cannot have them .No space left on device"):
        feature_pass(model, cache_gb=0.0, folder=tmp_path).split(train, "train", "")
    assert not list(tmp_path.glob("*.features"))


def test_pooled_features_on_disk_are_gone_on_with_and_a_damaged_file_is_computed_again(
    digits: Path, model: AIM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("aimscale.harness.probe.features.extraction.STRETCH_ROWS", 100)
    monkeypatch.setattr("aimscale.harness.probe.features.pooled.STRETCH_ROWS", 100)
    train, _ = open_task(section(digits), GEOMETRY)
    fit = np.arange(0, 600, 2)
    whole = feature_pass(model).split(train, "train", "key", fit)
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


def test_bf16_features_are_near_those_of_fp32_and_the_difference_is_said(
    digits: Path, model: AIM, capsys: pytest.CaptureFixture[str]
) -> None:
    train, _ = open_task(section(digits), GEOMETRY)
    backbone = AimBackbone(lambda: copy.deepcopy(model))
    difference = precision_difference(backbone, train.images(range(16)), torch.bfloat16)
    assert backbone.dtype == torch.bfloat16
    assert 1e-4 < difference < 0.03
    backbone.use(torch.float32)  # from the weights themselves, not from rounded ones
    images = train.images([3])
    assert torch.equal(backbone.features(images, [1]), model.features(images, [1]))
    wanted = section(digits, epochs=4)
    exact = probe_model(model, wanted, model_section=GEOMETRY, seed=0, out=None)
    assert capsys.readouterr().err == ""
    wanted = wanted.model_copy(update={"precision": "bf16"})
    rounded = probe_model(model, wanted, model_section=GEOMETRY, seed=0, out=None)
    assert "features in bf16 differ from fp32 by" in capsys.readouterr().err
    for one, other in zip(exact, rounded, strict=True):
        assert one["precision_difference"] == 0 < other["precision_difference"] < 0.03
        assert one["top1"] == pytest.approx(other["top1"], abs=0.03)


def test_heads_of_a_whole_grid_train_on_one_backbone_pass_per_batch(
    digits: Path, model: AIM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    images: list[int] = []

    class Counted(AimBackbone):
        def features(self, batch: Tensor, blocks: Sequence[int]) -> Tensor:
            images.append(len(batch))
            return super().features(batch, blocks)

    def passes(out: str, **changes: Any) -> int:
        images.clear()
        wanted = section(digits, **changes)
        backbone = Counted(lambda: copy.deepcopy(model))
        probe_backbone(
            backbone, wanted, model_section=GEOMETRY, seed=0, out=tmp_path / out, bounds=Bounds(cache_gb=0.0)
        )
        return sum(images)

    few = 100  # images that set shapes and centres, and on which precisions are compared
    # linear and k-NN: once over both splits, whatever the epochs and the grid
    assert 0 <= passes("pooled", kinds=("linear", "knn"), epochs=30) - (600 + 400) < few
    # attentive: that once, a training of 7 batches, the hold-out, the test split
    found = passes("attentive", kinds=("attentive",), iterations=7, batch_size=50)
    assert 0 <= found - (600 + 400 + 7 * 50 + 120 + 400) < few


class Interrupted(Exception):
    pass


class InterruptedBackbone(AimBackbone):
    """Dies at its n-th pass."""

    passes_left = 10**9  # beyond those before the first batch

    def features(self, images: Tensor, blocks: Sequence[int]) -> Tensor:
        self.passes_left -= 1
        if self.passes_left < 0:
            raise Interrupted
        return super().features(images, blocks)


def test_a_killed_streamed_probe_goes_on_to_the_same_numbers(
    digits: Path, model: AIM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = section(digits, epochs=4, kinds=("linear", "knn", "attentive"))
    monkeypatch.setattr("aimscale.harness.probe.heads.progress.SAVE_EVERY_S", -1.0)  # after every step
    monkeypatch.setattr("aimscale.harness.probe.heads.progress.SAVE_RATIO", -1.0)

    def run(out: Path, passes: int) -> tuple[Any, int]:
        backbone = InterruptedBackbone(lambda: copy.deepcopy(model))
        backbone.passes_left = passes
        entries = probe_backbone(backbone, wanted, model_section=GEOMETRY, seed=0, out=out, bounds=Bounds(cache_gb=0.0))
        return entries, passes - backbone.passes_left

    whole, num_passes = run(tmp_path / "whole", 10**9)
    for _ in range(2):
        with pytest.raises(Interrupted):
            run(tmp_path / "cut", num_passes * 2 // 5)
        assert not list((tmp_path / "cut").glob("*.json"))
    resumed, num_left = run(tmp_path / "cut", 10**9)
    assert resumed == whole
    assert num_left < num_passes * 2 // 5
    assert not list((tmp_path / "cut").glob("*.partial*"))


def test_published_views_depend_on_seed_epoch_and_image_alone(digits: Path) -> None:
    train, _ = open_task(section(digits), GEOMETRY)
    views = PublishedViews(GEOMETRY, seed=1)
    both = views.images(train.dataset, np.array([3, 8]), epoch=0)
    assert both.shape == (2, 3, 16, 16)
    torch.rand(3)  # somebody else draws
    assert torch.equal(views.images(train.dataset, np.array([8]), epoch=0)[0], both[1])
    assert not torch.equal(views.images(train.dataset, np.array([8]), epoch=1)[0], both[1])


def test_views_are_changed_by_the_operations_and_magnitudes_of_timm() -> None:
    from timm.data import auto_augment

    assert list(ARGUMENTS) == auto_augment._RAND_INCREASING_TRANSFORMS
    for name, arguments in ARGUMENTS.items():
        level_of = auto_augment.LEVEL_TO_ARG[name]
        for level in (0.0, 3.7, 9.0, 10.0):
            ours = [arguments(level / 10, sign) for sign in (1.0, -1.0)]
            theirs = [level_of(level, {}) if level_of else () for _ in range(30)]  # either sign, by chance
            if name == "PosterizeIncreasing":  # timm may ask for no bit, which Pillow refuses
                theirs = [(max(1, bits),) for (bits,) in theirs]
            for values in theirs:
                assert any(values == pytest.approx(mine) for mine in ours), (name, level)


def test_threads_make_views_side_by_side(digits: Path) -> None:
    train, _ = open_task(section(digits), GEOMETRY)
    train = replace(train, views=PublishedViews(GEOMETRY, seed=1))
    state = random.getstate(), torch.get_rng_state()
    chunks = [list(range(start, start + 20)) for start in range(0, 200, 20)]
    ahead = torch.cat([images for _, images in train.ahead(chunks, 0)])
    assert torch.equal(ahead, train.images(range(200), 0))
    assert state[0] == random.getstate()  # nobody's generators were touched
    assert torch.equal(state[1], torch.get_rng_state())


def test_augmented_probes_learn_from_views(digits: Path, model: AIM) -> None:
    wanted = section(digits, augmentation="published", kinds=("linear",), epochs=3)
    (entry,) = probe_model(model, wanted, model_section=GEOMETRY, seed=0, out=None)
    assert entry["augmentation"] == "published"
    assert entry["top1_lo95"] > entry["chance"]


def test_lora_adapts_a_copy_of_the_trunk(digits: Path, model: AIM) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = section(digits, kinds=("lora",), epochs=3, lrs=(1e-2,))
    (lora,) = probe_model(model, wanted, model_section=GEOMETRY, seed=0, out=None)
    assert (lora["kind"], lora["lora_rank"]) == ("lora", 8)
    assert lora["top1_lo95"] > 2 * lora["chance"]
    d, depth = model.config.width, model.config.depth
    updates = 8 * depth * 3 * (d + d)  # query, value and output projection
    assert lora["num_trained"] == updates + 2 * d * d + d + 10 * d
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match="leave out kind 'lora'"):
        probe_backbone(PixelBackbone(), section(digits, kinds=("lora",)), model_section=GEOMETRY, seed=0, out=None)


@pytest.mark.parametrize("kind", list(STACKS))
def test_a_head_is_judged_without_the_holdout_and_kept_as_trained_alone_on_everything(
    digits: Path, model: AIM, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aimscale.harness.probe.heads.fit.MICRO_BATCH", 7)
    monkeypatch.setattr("aimscale.harness.probe.heads.fit.WORKING_GB", 1e-4)
    wanted = section(digits, train=str(digits / "some"), epochs=3, batch_size=30, lrs=(3e-3, 1e-2))
    train, _ = open_task(wanted, GEOMETRY)
    fit, held = holdout_split(train.labels, 0.2, seed=5)
    split = Split(train.labels, fit, held, 10)
    features = feature_pass(model).split(train, "train", "", fit)
    source = features.pooled if kind == "linear" else features.tokens
    fitting = GridFit(
        split=split,
        section=wanted,
        num_heads=model.config.num_heads,
        seed=5,
        features=features,
        device=torch.device("cpu"),
        group=ALONE,
    )
    found = fitting.candidates(source, [kind], [(0,), (1,), (0, 1)], (1,))
    chosen = best(found, kind)
    assert chosen.head is not None
    assert chosen.setting is not None
    (outputs,) = source.parts([list(range(len(train)))])
    tokens = outputs[list(chosen.blocks)].mean(0)

    def alone(images: np.ndarray) -> nn.Module:
        """An ordinary module, trained by torch's optimiser on those images of every batch."""
        start = fitting._heads(source, [kind], [chosen.blocks]).turns[0][kind].select(0, 0).state_of_one()
        probe = {
            "attentive": lambda: AttentiveProbe(model.config.width, model.config.num_heads, 10),
            "efficient": lambda: EfficientProbe(model.config.width, 10),
            "linear": lambda: LinearProbe(model.config.width, 10),
        }[kind]()
        probe.load_state_dict(start | {"bn.num_batches_tracked": torch.tensor(0)})
        probe.bn.running_mean.copy_(tokens[images].mean((0, 1)))
        probe.bn.running_var.copy_(tokens[images].var((0, 1), correction=0))
        groups = [
            {"params": [p for p in probe.parameters() if (p.dim() > 1) == decays], "weight_decay": 0.05 * decays}
            for decays in (True, False)
        ]
        optimiser, step, num_steps = torch.optim.AdamW(groups), 0, 3 * math.ceil(len(train) / 30)
        for epoch in range(3):
            order = np.random.default_rng([5, 1, epoch]).permutation(len(train))
            for start_at in range(0, len(train), 30):
                batch = [index for index in order[start_at : start_at + 30] if index in images]
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate(chosen.setting.lr, step, num_steps)
                optimiser.zero_grad()
                functional.cross_entropy(probe.eval()(tokens[batch]), train.labels[batch]).backward()
                nn.utils.clip_grad_norm_(probe.parameters(), CLIP_NORM)
                optimiser.step()
                step += 1
        return probe

    kept, judged = alone(split.everything), alone(fit)
    with torch.no_grad():
        torch.testing.assert_close(chosen.head(tokens[None])[0, :, 0], kept(tokens), rtol=1e-3, atol=1e-3)
        answers, held_labels = judged(tokens[held]), train.labels[held]
    assert chosen.holdout_loss == pytest.approx(float(functional.cross_entropy(answers, held_labels)), rel=1e-3)
    assert chosen.holdout_top1 == pytest.approx(float((answers.argmax(1) == held_labels).float().mean()))


def test_a_killed_lora_goes_on_to_the_same_numbers(
    digits: Path, model: AIM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = section(
        digits, kinds=("knn", "lora"), epochs=2, batch_size=40, lrs=(3e-3, 1e-2), train=str(digits / "some")
    )

    def run(out: Path, pauses: int) -> tuple[Any, int]:
        """Probe until the n-th save; counts the batches trained."""
        left, batches = [pauses], [0]
        batches_of = _Adaptation._batches

        def counted(self: _Adaptation, order: np.ndarray, epoch: int) -> Any:
            for each in batches_of(self, order, epoch):
                batches[0] += 1
                yield each

        def pause() -> None:
            left[0] -= 1
            if not left[0]:
                raise Interrupted

        with monkeypatch.context() as patch:
            patch.setattr(_Adaptation, "_batches", counted)
            try:
                return probe_model(model, wanted, model_section=GEOMETRY, seed=0, out=out, pause=pause), batches[0]
            except Interrupted:
                return None, batches[0]

    monkeypatch.setattr(StepSaver, "is_due", lambda self: True)
    whole, num_batches = run(tmp_path / "whole", 10**9)
    # saves: the frozen probes, then every step and the end of each point of the grid
    for pauses in (1, 3, num_batches // 2):
        out = tmp_path / f"cut-{pauses}"
        cut, before = run(out, pauses)
        assert cut is None
        assert not list(out.glob("*.json"))
        resumed, after = run(out, 10**9)
        assert resumed == whole, pauses
        assert before + after == num_batches  # no step was trained twice
        assert not list(out.glob("*.partial*"))


def test_images_are_decoded_ahead_in_order_and_errors_come_where_their_images_would(digits: Path) -> None:
    train, _ = open_task(section(digits), GEOMETRY)
    chunks = [[5, 3], [], [9], list(range(30)), [7]]
    ahead = list(train.ahead(chunks))
    assert [list(chunk) for chunk, _ in ahead] == chunks
    for chunk, images in ahead:
        assert torch.equal(images, train.images(chunk))
    with pytest.raises(IndexError):
        list(train.ahead([[0], [10**6]]))
    first = next(iter(train.ahead([[0]] * 50)))  # a reader that stops early leaves no thread waiting
    assert torch.equal(first[1], train.images([0]))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode") and thread.is_alive()]


def test_the_next_images_are_decoded_while_the_backbone_works(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = open_task(section(digits), GEOMETRY)
    under_way = {chunk: threading.Event() for chunk in range(3)}
    images_of = LabelledImages.images

    def images(self: LabelledImages, indices: Sequence[int], epoch: int | None = None) -> Tensor:
        under_way[indices[0] // 64].set()
        return images_of(self, indices, epoch)

    class Patient:
        """Does not answer for a chunk before the next one is being decoded: without reading ahead it never would."""

        name, num_blocks, num_heads, passes = "patient", 1, 1, 0

        def use(self, dtype: torch.dtype) -> None:
            pass

        def features(self, images: Tensor, blocks: Sequence[int]) -> Tensor:
            self.passes += 1
            if self.passes in (2, 3):  # the first pass is one image, for the shape
                assert under_way[self.passes - 1].wait(timeout=60)
            return torch.zeros(len(blocks), len(images), 1, 4)

    source = StreamedTokens(Patient(), train, ALONE)
    monkeypatch.setattr(LabelledImages, "images", images)
    outputs = list(source.parts([list(range(start, start + 64)) for start in (0, 64, 128)]))
    assert [part.shape[1] for part in outputs] == [64, 64, 64]


def test_two_processes_on_one_task_probe_it_once(digits: Path, model: AIM, tmp_path: Path) -> None:
    wanted = section(digits, kinds=("linear",), epochs=2)
    passes = []

    class Counted(AimBackbone):
        def features(self, images: Tensor, blocks: Sequence[int]) -> Tensor:
            passes.append(threading.current_thread().name)
            return super().features(images, blocks)

    def probe() -> None:
        found.append(
            probe_backbone(
                Counted(lambda: copy.deepcopy(model)), wanted, model_section=GEOMETRY, seed=0, out=tmp_path, since=0.0
            )
        )

    found: list[Any] = []
    threads = [threading.Thread(target=probe, name=f"prober-{i}") for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2]
    assert len(set(passes)) == 1
