"""Probing end to end on the real 8x8 digits of scikit-learn."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aimscale.aim.model import AIM
from aimscale.aim.weights import load_probe
from aimscale.harness.probe.features.backbones import AimBackbone
from aimscale.harness.probe.features.sizes import block_sets
from aimscale.harness.probe.protocol import Bounds


def test_probes_read_digits_repeatably_and_say_how(task: Any, model: AIM, tmp_path: Path) -> None:
    entries = task.probe(task.section(), seed=3, out=tmp_path)
    again = task.probe(task.section(), seed=3, out=None)
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
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"seed": 0, "out": tmp_path, "since": 0.0}
    (neighbours,) = task.probe(task.section(kinds=("knn",)), **options)
    monkeypatch.setattr("aimscale.harness.probe.protocol.Neighbours", None)
    both = task.probe(task.section(kinds=("linear", "knn")), **options)
    assert [entry["kind"] for entry in both] == ["linear", "knn"]
    assert both[1] == neighbours
    (file,) = tmp_path.glob("*.json")
    assert [detail["kind"] for detail in json.loads(file.read_text())["probes"]] == ["knn", "linear"]


def test_saved_heads_are_released_probe_files_that_score_the_same(task: Any, model: AIM, tmp_path: Path) -> None:
    (entry,) = task.probe(task.section(kinds=("attentive",)), seed=0, out=tmp_path)
    probe = load_probe(next(tmp_path.glob("digits-*.attentive.safetensors")), model.config).eval()
    _, test = task.open()
    with torch.no_grad():
        logits = probe(model.features(test.images(range(len(test))), entry["blocks"]).mean(0))
    assert float((logits.argmax(1) == test.labels).float().mean()) == pytest.approx(entry["top1"], abs=0.003)


def test_streamed_and_cached_features_give_the_same_probes(
    task: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted = task.section(epochs=2, batch_size=100)
    cached = task.probe(wanted, seed=0, out=None)
    monkeypatch.setattr("aimscale.harness.probe.features.sizes.HEADS_SHARE", 1e-12)  # one block set in each round
    monkeypatch.setattr("aimscale.harness.probe.heads.fit.WORKING_GB", 1e-4)  # and fewer at a time
    streamed = task.probe(wanted, seed=0, out=tmp_path, bounds=Bounds(cache_gb=0.0))
    for one, other in zip(cached, streamed, strict=True):
        assert one["blocks"] == other["blocks"]
        assert one["top1"] == pytest.approx(other["top1"], abs=0.005)
    assert not list(tmp_path.glob("*.features"))  # the disk is given back


def test_shuffled_labels_are_not_learnt(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # a probe that saw the test split, or labels by another path, would stay above chance
    train, test = task.open()
    train.labels.copy_(train.labels[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))])
    monkeypatch.setattr("aimscale.harness.probe.protocol.open_task", lambda *_: (train, test))
    for entry in task.probe(task.section(), seed=0, out=None):
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


def test_the_search_finds_the_block_that_holds_the_answer(task: Any) -> None:
    for entry in task.probe(task.section(epochs=5), PlantedBackbone(), seed=0, out=None):
        assert entry["blocks"] == [1]
        assert entry["last_blocks"] == [2, 3]
        assert entry["top1"] > 0.75
        assert entry["last_top1"] < 0.2


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
    task: Any, model: AIM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = task.section(epochs=4, kinds=("linear", "knn", "attentive"))
    monkeypatch.setattr("aimscale.harness.probe.heads.progress.SAVE_EVERY_S", -1.0)  # after every step
    monkeypatch.setattr("aimscale.harness.probe.heads.progress.SAVE_RATIO", -1.0)

    def run(out: Path, passes: int) -> tuple[Any, int]:
        backbone = InterruptedBackbone(lambda: copy.deepcopy(model))
        backbone.passes_left = passes
        entries = task.probe(wanted, backbone, seed=0, out=out, bounds=Bounds(cache_gb=0.0))
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


def test_two_processes_on_one_task_probe_it_once(task: Any, model: AIM, tmp_path: Path) -> None:
    wanted = task.section(kinds=("linear",), epochs=2)
    passes = []

    class Counted(AimBackbone):
        def features(self, images: Tensor, blocks: Sequence[int]) -> Tensor:
            passes.append(threading.current_thread().name)
            return super().features(images, blocks)

    def probe() -> None:
        found.append(task.probe(wanted, Counted(lambda: copy.deepcopy(model)), seed=0, out=tmp_path, since=0.0))

    found: list[Any] = []
    threads = [threading.Thread(target=probe, name=f"prober-{i}") for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2]
    assert len(set(passes)) == 1
