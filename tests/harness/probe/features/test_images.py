"""The images of a task: their classes, their hold-out, and how they are read ahead."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aimscale.aim.errors import UserError
from aimscale.harness.probe.features.images import holdout_split


@pytest.mark.parametrize(
    ("changes", "subject"),
    [
        ({"train": "unlabelled"}, "unlabelled"),
        ({"test": "renamed"}, "the first has no a, b, c"),
        ({"train": "few"}, "12 training images for 10 classes"),
        ({"train": "nowhere"}, "nowhere"),
    ],
)
def test_bad_tasks_are_refused_in_one_sentence(task: Any, changes: Any, subject: str) -> None:
    wanted = task.section(**{side: str(task.root / name) for side, name in changes.items()})
    with pytest.raises(UserError, match=subject) as caught:
        task.probe(wanted, seed=0, out=None)
    assert "\n" not in str(caught.value)


def test_classes_are_matched_by_name_and_may_lack_test_images(task: Any, tmp_path: Path) -> None:
    wanted = task.section(kinds=("knn",), train=str(task.root / "some"))
    task.probe(wanted, seed=0, out=tmp_path / "all")
    fewer = wanted.model_copy(update={"test": str(task.root / "fewer")})
    task.probe(fewer, seed=0, out=tmp_path / "part")
    per_class = [
        json.loads(next((tmp_path / name).glob("digits-*.json")).read_text())["probes"][0]["per_class"]
        for name in ("all", "part")
    ]
    for whole, part in zip(*per_class, strict=True):
        assert part == (whole if whole["class"] not in ("1", "2") else whole | {"n": 0, "correct": 0})


def test_holdout_is_stratified_disjoint_and_seeded() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 1)
    fit, held = holdout_split(labels, 0.2, seed=1)
    assert sorted([*fit, *held]) == list(range(81))
    assert np.bincount(labels[held], minlength=3).tolist() == [10, 6, 0]
    assert np.array_equal(held, holdout_split(labels, 0.2, seed=1)[1])
    assert not np.array_equal(held, holdout_split(labels, 0.2, seed=2)[1])
    assert len(holdout_split(torch.tensor([0, 0, 1, 1]), 0.01, seed=0)[1]) == 1


def test_images_are_decoded_ahead_in_order_and_errors_come_where_their_images_would(task: Any) -> None:
    train, _ = task.open()
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
