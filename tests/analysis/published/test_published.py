"""The published numbers agree with themselves: means, counts and the exponents on four points."""

import numpy as np
import pytest

from aimscale.analysis.published.published import (
    BASELINES,
    BY_KEY,
    PAPER_EXPONENTS,
    PUBLISHED_SIZES,
    TASKS,
    best_frozen,
    published_frame,
)


def test_every_printed_mean_is_the_mean_of_its_row():
    assert len(BASELINES) == 11
    for row in BASELINES:
        assert len(row.top1) == len(TASKS) == 15
        assert row.mean == pytest.approx(row.printed_mean, abs=0.0006), row.key


def test_sizes_have_the_parameters_of_the_released_files_and_the_flops_of_the_published_runs():
    assert [s.params_trunk for s in PUBLISHED_SIZES] == [679_627_776, 1_208_160_256, 2_718_210_048, 6_442_983_424]
    assert 500_000 * 4096 * PUBLISHED_SIZES[0].flops_per_image == pytest.approx(3.5e21, rel=0.01)
    assert 1_250_000 * 4096 * PUBLISHED_SIZES[3].flops_per_image == pytest.approx(5.4e22, rel=0.01)
    assert all(s.in1k_last6 == BY_KEY[s.key].accuracy("imagenet-1k") for s in PUBLISHED_SIZES)
    assert BY_KEY["aim-7B-best"].accuracy("imagenet-1k") == PUBLISHED_SIZES[3].in1k_best6


@pytest.mark.parametrize("count", ["params_trunk", "params_total"])
def test_the_papers_exponent_is_the_slope_of_its_four_points(count):
    frame = published_frame()
    slope = np.polyfit(np.log(frame[count]), np.log(frame["val_loss"]), 1)[0]
    assert -slope == pytest.approx(PAPER_EXPONENTS[count], abs=5e-5)


def test_best_frozen_model_of_a_task():
    assert best_frozen("imagenet-1k").key == "dinov2-g14"
    assert best_frozen("rxrx1").key == "aim-7B"
