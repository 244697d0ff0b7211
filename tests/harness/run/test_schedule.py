"""Rates and segments, keyed to images seen."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from aimscale.harness.run.config import ConfigError, RunConfig
from aimscale.harness.run.schedule import Schedule, Segment, Walk, plan_walk, schedule_of

Config = Callable[..., RunConfig]


def make(tiny_config: Config, kind: str = "wsd", budgets: tuple[int, ...] = (400, 800), **section: object) -> Schedule:
    optimiser = {"batch_size": 8, "lr_peak": 0.5, "precision": "fp32"}
    schedule = {"kind": kind, "warmup_images": 80, "lr_start": 0.1, "lr_end": 0.05, **section}
    return schedule_of(tiny_config(optimiser=optimiser, schedule=schedule, budgets=list(budgets)))


def test_the_walk_goes_up_the_trunk_and_down_every_branch(tiny_config: Config) -> None:
    schedule = make(tiny_config)
    assert plan_walk(schedule).segments == [
        Segment(start=0, stop=320, branch=None),
        Segment(start=320, stop=400, branch=400),
        Segment(start=320, stop=640, branch=None),
        Segment(start=640, stop=800, branch=800),
    ]
    assert schedule.images_planned() == 640 + 80 + 160


@pytest.mark.parametrize(
    ("steps", "fraction", "decay"), [(8, 0.2, 2), (8, 0.3, 2), (9, 0.2, 2), (3, 0.1, 1), (3, 1.0, 3)]
)
def test_a_decay_has_the_nearest_number_of_steps_and_one_at_least(
    tiny_config: Config, steps: int, fraction: float, decay: int
) -> None:
    schedule = make(tiny_config, budgets=(8 * steps,), warmup_images=0, decay_fraction=fraction)
    assert schedule.branch_point(8 * steps) == 8 * (steps - decay)


TRUNK, FIRST, REST, SECOND = (
    Segment(start=0, stop=320, branch=None),
    Segment(start=320, stop=400, branch=400),
    Segment(start=320, stop=640, branch=None),
    Segment(start=640, stop=800, branch=800),
)


@pytest.mark.parametrize(
    ("saved", "checkpoint", "segments", "images_done"),
    [
        ((), (0, None), [TRUNK, FIRST, REST, SECOND], 0),
        ((), (24, None), [Segment(start=24, stop=320, branch=None, resumes=True), FIRST, REST, SECOND], 24),
        ((), (320, None), [FIRST, REST, SECOND], 320),
        ((), (320, 400), [FIRST, REST, SECOND], 320),
        ((), (328, 400), [Segment(start=328, stop=400, branch=400, resumes=True), REST, SECOND], 328),
        ((400,), (320, None), [REST, SECOND], 400),
        ((400,), (648, 800), [Segment(start=648, stop=800, branch=800, resumes=True)], 728),
        ((400, 800), (640, None), [], 880),
    ],
)
def test_a_walk_goes_on_from_what_is_saved(
    tiny_config: Config,
    saved: tuple[int, ...],
    checkpoint: tuple[int, int | None],
    segments: list[Segment],
    images_done: int,
) -> None:
    walk = plan_walk(make(tiny_config), saved, checkpoint)
    assert walk == Walk(segments=segments, images_done=images_done)


def test_wsd_rates_by_hand(tiny_config: Config) -> None:
    schedule = make(tiny_config)
    assert schedule.lr(0, None) == 0.1
    assert schedule.lr(40, None) == pytest.approx(0.3)
    assert schedule.lr(80, None) == schedule.lr(10**9, None) == 0.5
    assert schedule.lr(320, 400) == 0.5
    assert schedule.lr(360, 400) == pytest.approx(0.275)
    assert schedule.lr(400, 400) == 0.05
    assert schedule.lr(720, 800) == pytest.approx(0.275)


def test_cosine_falls_from_the_peak_to_the_end(tiny_config: Config) -> None:
    schedule = make(tiny_config, "cosine", budgets=(480,))
    assert plan_walk(schedule).segments == [Segment(start=0, stop=480, branch=480)]
    rates = [schedule.lr(images, 480) for images in range(80, 481, 8)]
    assert rates[0] == 0.5
    assert rates[25] == pytest.approx(0.275)
    assert rates[-1] == pytest.approx(0.05)
    assert all(before > after for before, after in itertools.pairwise(rates))


@pytest.mark.parametrize(("kind", "warmup"), [("wsd", 328), ("cosine", 400)])
def test_a_warm_up_that_reaches_into_the_decay_is_refused(tiny_config: Config, kind: str, warmup: int) -> None:
    with pytest.raises(ConfigError, match=f"warmup_images {warmup} "):
        make(tiny_config, kind, budgets=(400,), warmup_images=warmup)
