"""Deviation of a run from its forecast: conditional on its own points, robust against single ones."""

from __future__ import annotations

import numpy as np
import pytest

from aimscale.harness.run.expected import Expected, ExpectedPoint
from aimscale.sweeps.engine.forecasts import PERSISTENT, error_root, find_deviation, reason_to_stop, scan

AT = np.arange(1, 29) * 2048


def expected(sd: float = 0.02, noise: float = 0.004, alarm_sd: float = 4.0, memory: float = 30.0) -> Expected:
    points = tuple(ExpectedPoint(images_seen=int(n), loss=0.6, low=0.5, high=0.7, sd=sd, noise=noise) for n in AT)
    return Expected(basis="", points=points, memory=memory, alarm_sd=alarm_sd)


def losses(off: np.ndarray) -> dict[int, float]:
    return {int(n): float(0.6 * np.exp(each)) for n, each in zip(AT, off, strict=False)}


def test_scan_is_the_deviation_of_a_mean_from_its_conditional_expectation() -> None:
    root, rng = error_root(expected()), np.random.default_rng(0)
    covariance, off = root @ root.T, np.cumsum(rng.standard_normal((len(AT), 3)), axis=0) * 0.001
    found, first = scan(expected(), off)  # no point stands out from its neighbours
    last = 11
    by_begin = []
    for begin in range(last - PERSISTENT + 2):
        old, new = slice(0, begin), slice(begin, last + 1)
        gain = covariance[new, old] @ np.linalg.pinv(covariance[old, old])
        rest = covariance[new, new] - gain @ covariance[old, new]
        by_begin.append((off[new] - gain @ off[old]).sum(axis=0) / np.sqrt(rest.sum()))
    best = np.abs(by_begin).argmax(axis=0)
    np.testing.assert_array_equal(first[last], best)
    np.testing.assert_allclose(found[last], np.take_along_axis(np.array(by_begin), best[None], 0)[0], rtol=1e-6)


def test_a_shift_within_the_band_is_seen_where_it_begins() -> None:
    off = np.where(np.arange(28) < 14, 0.008, 0.008 + 0.02)
    assert np.exp(off.max()) < np.exp(1.96 * 0.02), "the band of one run still holds it"
    early, late = find_deviation(expected(), losses(off[:14])), find_deviation(expected(), losses(off))
    assert early is not None
    assert not early.is_alarm
    assert late is not None
    assert late.is_alarm
    assert late.sd > 4
    assert late.since == AT[14]


def test_a_run_off_from_the_start_is_seen_by_the_forecast_alone() -> None:
    found = find_deviation(expected(sd=0.01), losses(np.full(6, 0.06)))
    assert found is not None
    assert found.is_alarm
    assert found.since == AT[0]


def test_one_point_raises_no_alarm_and_a_run_far_below_its_forecast_does_but_never_stops() -> None:
    """A run 11 sd below its forecast was "on track"."""
    off = np.zeros(20)
    off[-1] = 1.0
    found = find_deviation(expected(), losses(off))
    assert found is not None
    assert not found.is_alarm
    asked = Expected(**{**vars(expected(sd=0.01)), "stop_sd": 2.0})
    better = find_deviation(asked, losses(np.full(9, -0.06)))
    assert better is not None
    assert better.sd < -4
    assert better.is_alarm
    assert reason_to_stop(asked, better) is None


def test_points_beyond_the_forecast_have_no_deviation() -> None:
    seen = losses(np.zeros(5))
    assert find_deviation(expected(), seen) is not None
    assert find_deviation(expected(), seen | {10**6: 0.6}) is None
    assert find_deviation(expected(), {1: 0.6}) is None


@pytest.mark.parametrize(("stop_sd", "stops"), [(None, False), (3.0, True), (50.0, False)])
def test_a_run_is_stopped_by_an_alarm_of_the_size_asked_for(stop_sd: float | None, stops: bool) -> None:
    asked = Expected(**{**vars(expected(sd=0.01)), "stop_sd": stop_sd})
    found = find_deviation(asked, losses(np.full(6, 0.06)))
    assert found is not None
    assert bool(reason_to_stop(asked, found)) == stops
