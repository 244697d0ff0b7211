"""Views of training images as published: what they depend on, and that probes learn from them."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from aimscale.harness.probe.features.views import ARGUMENTS, PublishedViews


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


def test_views_depend_on_seed_epoch_and_image_alone_so_that_threads_make_them_side_by_side(task: Any) -> None:
    train, _ = task.open()
    train = replace(train, views=PublishedViews(task.geometry, seed=1))
    state = random.getstate(), torch.get_rng_state()
    chunks = [list(range(start, start + 20)) for start in range(0, 200, 20)]
    ahead = torch.cat([images for _, images in train.ahead(chunks, 0)])
    assert ahead.shape == (200, 3, 16, 16)
    assert torch.equal(ahead, train.images(range(200), 0))
    assert torch.equal(ahead[8:9], train.images([8], 0))
    assert not torch.equal(ahead[8:9], train.images([8], 1))
    assert state[0] == random.getstate()  # nobody's generators were touched
    assert torch.equal(state[1], torch.get_rng_state())


def test_augmented_probes_learn_from_views(task: Any) -> None:
    wanted = task.section(augmentation="published", kinds=("linear",), epochs=3)
    (entry,) = task.probe(wanted, seed=0, out=None)
    assert entry["augmentation"] == "published"
    assert entry["top1_lo95"] > entry["chance"]
