"""Deviation of a run from its forecast: its threshold, how large it is, and whether the run is to end for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from aimscale.harness.run.expected import Expected

PERSISTENT = 3
"""Number of points in a row, up to the last, that make a deviation: a single loss may stand out."""
MAX_SURPRISE = 3.0
"""A point counts as at most so many standard deviations of its own noise from the median of three."""
FALSE_ALARM_RATE = 0.01
"""Share of sound runs that may raise an alarm, at any point of their whole training."""
NUM_SIMULATED = 2000
"""Number of simulated sound runs from which the threshold of the alarm follows."""

F64 = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deviation:
    """Deviation of a run from its forecast at its last point."""

    sd: float
    """Deviation, in standard deviations, of the points since `since`, given the forecast and the points before."""
    since: int
    """Images seen at the first of these points, chosen so that the deviation is largest."""
    is_alarm: bool = False
    """Whether it lies beyond the threshold of the alarm: above, or below, where the forecast is void."""


def error_root(expected: Expected) -> F64:
    """Return the Cholesky factor (n, n) of the covariance of a run's ln losses about the forecast."""
    points = expected.points
    at = np.log([point.images_seen for point in points])
    sd, noise = np.array([[point.sd, point.noise] for point in points]).T
    shared, near = np.sqrt(np.maximum(sd**2 - noise**2, 0.0)), np.exp(-np.abs(at[:, None] - at) / expected.memory)
    return np.linalg.cholesky(np.outer(shared, shared) * near + np.diag(noise**2 + 1e-12))


def scan(expected: Expected, off: F64) -> tuple[F64, npt.NDArray[np.int64]]:
    """Return the largest deviation of runs at each of their points, and the point at which it begins.

    The mean of the points from a first one up to the last is compared with its expectation from those before the
    first (of the forecast alone, where there are none), for every first point that leaves `PERSISTENT` of them, or
    all. A point that stands out from the median of itself and the two before is drawn in.

    Args:
        off: ln loss minus its forecast (n, runs).

    Returns:
        Deviations in standard deviations (n, runs), positive for losses above the forecast, and numbers of the
        points at which they begin.
    """
    median = off.copy()
    if len(off) >= PERSISTENT:
        median[2:] = np.median([off[2:], off[1:-1], off[:-2]], axis=0)
    limit = MAX_SURPRISE * np.array([[point.noise] for point in expected.points])
    root = error_root(expected)
    whitened = np.linalg.solve(root, np.clip(off, median - limit, median + limit))
    weights = np.cumsum(root, axis=0)  # row t: weights of the whitened errors in the sum of the errors up to t
    largest, first = np.zeros(off.shape), np.zeros(off.shape, dtype=np.int64)
    for last in range(len(off)):
        here = weights[last, : last + 1, None]
        sums = np.cumsum((here * whitened[: last + 1])[::-1], axis=0)[::-1]
        sd = np.sqrt(np.cumsum(here[::-1] ** 2, axis=0)[::-1])
        by_begin = (sums / sd)[: max(1, last - PERSISTENT + 2)]
        first[last] = np.abs(by_begin).argmax(axis=0)
        largest[last] = np.take_along_axis(by_begin, first[last][None], axis=0)[0]
    return largest, first


def find_deviation(expected: Expected, losses: Mapping[int, float]) -> Deviation | None:
    """Compare losses, by images seen, with the forecast; returns the deviation at the last of them, or None without
    its forecast."""
    measured = [i for i, point in enumerate(expected.points) if point.images_seen in losses]
    if not measured or max(losses) > expected.points[measured[-1]].images_seen:
        return None
    seen = dataclasses.replace(expected, points=tuple(expected.points[i] for i in measured))
    off = np.log([losses[point.images_seen] / point.loss for point in seen.points])
    sd, first = scan(seen, off[:, None])
    is_beyond = expected.alarm_sd is not None and bool(abs(sd[-1, 0]) > expected.alarm_sd)
    return Deviation(
        sd=float(sd[-1, 0]),
        since=seen.points[first[-1, 0]].images_seen,
        is_alarm=is_beyond and len(measured) >= PERSISTENT,
    )


def reason_to_stop(expected: Expected, deviation: Deviation) -> str | None:
    """Say why a run that deviates so much is to end, if it is."""
    threshold = expected.stop_sd
    if threshold is None or not deviation.is_alarm or deviation.sd < threshold:
        return None
    where = f"{deviation.sd:+.1f} sd above its forecast since D = {deviation.since}"
    return f"the loss is {where} (--stop-off-track {threshold:g}); the run is saved, and `launch --retry` goes on"


def alarm_threshold(expected: Expected, degrees: float) -> float | None:
    """Return the deviation that `FALSE_ALARM_RATE` of simulated sound runs exceed at any of their points; None
    if these are too few for an alarm.

    Args:
        degrees: degrees of freedom of the standard deviations.
    """
    if len(expected.points) < PERSISTENT:
        return None
    rng = np.random.default_rng(0)
    errors = rng.standard_normal((len(expected.points), NUM_SIMULATED))
    errors *= np.sqrt(degrees / rng.chisquare(degrees, NUM_SIMULATED))
    deviations, _ = scan(expected, error_root(expected) @ errors)
    return float(np.quantile(deviations[PERSISTENT - 1 :].max(axis=0), 1 - FALSE_ALARM_RATE))
