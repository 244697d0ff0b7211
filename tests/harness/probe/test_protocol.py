"""Probing end to end on the real 8x8 digits of scikit-learn."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from aimscale.aim.model import AIM
from aimscale.aim.weights import load_probe
from aimscale.harness.data import DataError
from aimscale.harness.data.store.index import open_dataset
from aimscale.harness.data.store.indexing import index_shards
from aimscale.harness.probe.features.tasks import block_sets


def hits_of(detail: dict[str, Any], num_images: int) -> np.ndarray:
    """Whether a probe of a task's file was right about each test image, (num_images,)."""
    return np.unpackbits(np.frombuffer(base64.b64decode(detail["hits"]), np.uint8), count=num_images).astype(bool)


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
        assert hits_of(detail, 400).sum() == round(entry["top1"] * 400)
        assert "hits" not in entry
        by_loss = entry["kind"] == "linear"
        chosen = max(detail["grid"], key=lambda row: -row["holdout_loss"] if by_loss else row["holdout_top1"])
        assert chosen["holdout_top1"] == entry["holdout_top1"]
        assert not entry["lr_at_edge"]
    sets, _ = block_sets(model.config.depth)
    assert len(document["probes"][1]["grid"]) >= 2 * len(sets)


def test_saved_heads_are_released_probe_files_that_score_the_same(task: Any, model: AIM, tmp_path: Path) -> None:
    (entry,) = task.probe(task.section(kinds=("attentive",)), seed=0, out=tmp_path)
    probe = load_probe(next(tmp_path.glob("digits-*.attentive.safetensors")), model.config).eval()
    _, test = task.open()
    with torch.no_grad():
        logits = probe(model.features(test.images(range(len(test))), entry["blocks"]).mean(0))
    right = (logits.argmax(1) == test.labels).numpy()
    assert right.mean() == pytest.approx(entry["top1"], abs=0.003)
    (detail,) = json.loads(next(tmp_path.glob("digits-*.json")).read_text())["probes"]
    assert (hits_of(detail, 400) == right).mean() > 0.99  # image by image


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
    impossible = ()

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


@pytest.mark.parametrize("kinds", [("linear", "attentive", "knn"), ("lora",)], ids=str)
def test_images_that_rot_after_indexing_are_left_out_as_if_they_had_never_been_there(
    task: Any, tmp_path: Path, spoil: Callable[..., Path], kinds: Sequence[str], caplog: pytest.LogCaptureFixture
) -> None:
    sides = {}
    for name, folder, samples in (("train", "some", [0, 5, 79]), ("test", "test", [2, 399])):
        spoilt = spoil(task.root / folder, tmp_path / name, samples)
        again = shutil.copytree(spoilt, tmp_path / f"{name}-again")
        index_shards(str(again), again)  # which finds them, too
        sides[name] = str(spoilt), str(again)
    found = []
    for number in (0, 1):
        paths = {name: side[number] for name, side in sides.items()}
        wanted = task.section(kinds=kinds, epochs=1, lrs=(1e-2,), **paths)
        found.append(task.probe(wanted, seed=0, out=None, max_bad_fraction=0.1))
    assert [{**entry, "evaluation": ""} for entry in found[0]] == [{**entry, "evaluation": ""} for entry in found[1]]
    assert {(entry["num_fit"] + entry["num_holdout"], entry["n"]) for entry in found[0]} == {(77, 398)}
    assert open_dataset(sides["train"][0]).describe(79) in caplog.text
    rotten = wanted.model_copy(update={name: side[0] for name, side in sides.items()})
    with pytest.raises(DataError, match="3 of 80 images of"):
        task.probe(rotten, seed=0, out=None, max_bad_fraction=0.0025)
    with pytest.raises(DataError, match=r"3 of 80 images cannot be decoded"):
        task.probe(wanted, seed=0, out=None, max_bad_fraction=0.03)


class Interrupted(Exception):
    pass


def test_a_killed_probe_repeats_the_kinds_under_way_and_no_others(
    task: Any, model: AIM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = task.section(epochs=2, kinds=("attentive", "linear", "lora", "knn"), lrs=(1e-2,))
    whole = task.probe(wanted, seed=0, out=tmp_path / "whole")
    (lora,) = (entry for entry in whole if entry["kind"] == "lora")
    d = model.config.width
    updates = 8 * model.config.depth * 3 * (d + d)  # query, value and output projection
    assert (lora["lora_rank"], lora["num_trained"]) == (8, updates + 2 * d * d + d + 10 * d)

    def killed(*_: Any, **__: Any) -> None:
        raise Interrupted

    def kinds() -> list[str]:
        (file,) = (tmp_path / "cut").glob("*.json")
        return [detail["kind"] for detail in json.loads(file.read_text())["probes"]]

    for broken, done in (("predict_test_split", None), ("adapt", ["attentive", "linear", "knn"])):
        with monkeypatch.context() as patch:
            patch.setattr(f"aimscale.harness.probe.protocol.{broken}", killed)
            with pytest.raises(Interrupted):
                task.probe(wanted, seed=0, out=tmp_path / "cut")
        assert done is None or kinds() == done
    monkeypatch.setattr("aimscale.harness.probe.protocol.extract_features", None)
    assert task.probe(wanted, seed=0, out=tmp_path / "cut") == whole
    assert sorted(kinds()) == sorted(wanted.kinds)


def test_a_probe_stops_within_a_step_of_being_asked_to(task: Any, tmp_path: Path) -> None:
    pauses: list[tuple[object, ...]] = []

    def report_progress(*standing: object) -> None:
        pauses.append(standing)
        if len(pauses) == stop:
            raise Interrupted

    wanted = task.section(kinds=("attentive",), iterations=6)
    stop = 0
    task.probe(wanted, seed=0, out=tmp_path, report_progress=report_progress)
    assert len(pauses) > 2 * 6  # of the two splits' features, the steps, the hold-out and the end
    steps = [each[1:] for each in pauses if each[-1:] == ("steps",) and each[0] == "attentive heads"]
    assert (6, 6, "steps") in steps  # what a bar shows
    for stop in (1, len(pauses) // 2):
        pauses.clear()
        with pytest.raises(Interrupted):
            task.probe(wanted, seed=0, out=tmp_path / f"{stop}", report_progress=report_progress)
