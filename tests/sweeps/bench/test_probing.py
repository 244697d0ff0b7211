"""A tenth of the scale model: `aimscale bench probe` runs the whole."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from aimscale.sweeps.bench.probing import crops, run, table


def test_crops_are_the_same_every_time_and_other_ones_for_the_test_split() -> None:
    train, again, test = (list(crops(split, 30, 10)) for split in ("train", "train", "test"))
    assert train == again
    assert [image.label for image in train] == [number % 10 for number in range(30)]
    assert not {image.data for image in train} & {image.data for image in test}
    assert len({image.data for image in itertools.chain(train, test)}) == 60


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_budget_costs_what_the_card_says_and_gives_equal_numbers_by_any_way(tmp_path: Path) -> None:
    result = run(num_images=20_000, num_classes=100, size="rung-32", iterations=40, batch_size=512, folder=tmp_path)
    alone, two_ranks, killed = result["ways"]
    assert killed["largest_difference"] == 0.0
    assert two_ranks["largest_difference"] <= 0.005, "ranks add up in another order: 5 of 1,000 images"
    assert two_ranks["entries"][2] == alone["entries"][2], "neighbours are the same to the digit"
    assert killed["same_choices"]
    assert {entry["kind"] for entry in alone["entries"]} == {"linear", "attentive", "knn"}
    assert all(entry["top1"] > 5 * entry["chance"] for entry in alone["entries"])
    assert result["measured"]["backbone_images"] == pytest.approx(result["forecast"]["backbone_images"], rel=0.03)
    kept = alone["feature_bytes"]
    assert kept == {"memory": pytest.approx(1000 * 4 * 32 * 4), "disk": 20_000 * 4 * 32 * 4}
    assert sum(kept.values()) == result["forecast"]["feature_bytes"]
    assert max(way["peak_process_bytes"] for way in result["ways"]) < 1.5e9
    assert "images through the backbone: forecast" in table(result)
    assert not list(tmp_path.glob("*/probes/*/*.features"))  # the disk is given back
