"""Expected losses of a run, forecast from the finished runs of its sweep, and how far the run is from them.

A worker writes `expected.json` into the run directory (`sweeps.engine.forecasts`) and renews it as more runs finish.
It compares the run with it while that trains, too (`sweeps.engine.watch`). Torch is not imported here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.files import read_as

FILE = "expected.json"
PERSISTENT = 3
"""Number of points in a row, up to the last, that make a deviation: a single loss may stand out."""
MAX_SURPRISE = 3.0
"""A point counts as at most so many standard deviations of its own noise from the median of three."""

F64 = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedPoint:
    """Forecast of a validation loss."""

    images_seen: int
    loss: float
    low: float
    """Low end of the 95 % interval of one run."""
    high: float
    """High end."""
    sd: float
    """Standard deviation of one run's ln loss about the forecast."""
    noise: float
    """Part of `sd` that belongs to this point alone; the rest is shared with the points nearby."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deviation:
    """Deviation of a run from its forecast at its last point."""

    sd: float
    """Deviation, in standard deviations, of the points since `since`, given the forecast and the points before."""
    since: int
    """Images seen at the first of these points, chosen so that the deviation is largest."""
    is_alarm: bool = False
    """Whether it lies beyond the threshold of the alarm: above, or below, where the forecast is void."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """Contents of `expected.json`."""

    basis: str
    """Runs that the forecast follows from, in words."""
    points: tuple[ExpectedPoint, ...]
    """Forecasts at points of the stable phase, ascending; none where no smaller run has come."""
    budgets: tuple[ExpectedPoint, ...] = ()
    """Forecasts at budgets, after their decays."""
    memory: float
    """Distance in ln images at which an error that points share is forgotten (to 1/e)."""
    alarm_sd: float | None = None
    """Deviation to either side beyond which an alarm is raised (null: never) ..."""
    false_alarm_rate: float = 0.0
    """... by this share of sound runs above, and as many below, at any of their points."""
    stop_sd: float | None = None
    """Deviation from which an alarm also stops the run; null for never."""

    @cached_property
    def root(self) -> F64:
        """Cholesky factor (n, n) of the covariance of a run's ln losses about the forecast."""
        at = np.log([point.images_seen for point in self.points])
        sd, noise = np.array([[point.sd, point.noise] for point in self.points]).T
        shared, near = np.sqrt(np.maximum(sd**2 - noise**2, 0.0)), np.exp(-np.abs(at[:, None] - at) / self.memory)
        return np.linalg.cholesky(np.outer(shared, shared) * near + np.diag(noise**2 + 1e-12))

    def scan(self, off: F64) -> tuple[F64, npt.NDArray[np.int64]]:
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
        usual = off.copy()
        if len(off) >= PERSISTENT:
            usual[2:] = np.median([off[2:], off[1:-1], off[:-2]], axis=0)
        reach = MAX_SURPRISE * np.array([[point.noise] for point in self.points])
        surprise = np.linalg.solve(self.root, np.clip(off, usual - reach, usual + reach))
        weights = np.cumsum(self.root, axis=0)  # row t: weights of the surprises in the sum of the errors up to t
        best, first = np.zeros(off.shape), np.zeros(off.shape, dtype=np.int64)
        for last in range(len(off)):
            here = weights[last, : last + 1, None]
            sums = np.cumsum((here * surprise[: last + 1])[::-1], axis=0)[::-1]
            sd = np.sqrt(np.cumsum(here[::-1] ** 2, axis=0)[::-1])
            by_begin = (sums / sd)[: max(1, last - PERSISTENT + 2)]
            first[last] = np.abs(by_begin).argmax(axis=0)
            best[last] = np.take_along_axis(by_begin, first[last][None], axis=0)[0]
        return best, first

    def reason_to_stop(self, deviation: Deviation) -> str | None:
        """Say why a run that deviates so much is to end, if it is."""
        if self.stop_sd is None or not deviation.is_alarm or deviation.sd < self.stop_sd:
            return None
        where = f"{deviation.sd:+.1f} sd above its forecast since D = {deviation.since}"
        return (
            f"the loss is {where} (--stop-off-track {self.stop_sd:g}); the run is saved, and `launch --retry` goes on"
        )

    def deviation(self, losses: Mapping[int, float]) -> Deviation | None:
        """Compare losses, by images seen, with the forecast; returns the deviation at the last of them, or None without
        its forecast."""
        measured = [i for i, point in enumerate(self.points) if point.images_seen in losses]
        if not measured or max(losses) > self.points[measured[-1]].images_seen:
            return None
        seen = dataclasses.replace(self, points=tuple(self.points[i] for i in measured))
        off = np.log([losses[point.images_seen] / point.loss for point in seen.points])
        sd, first = seen.scan(off[:, None])
        return Deviation(
            sd=float(sd[-1, 0]),
            since=seen.points[first[-1, 0]].images_seen,
            is_alarm=self.alarm_sd is not None and len(measured) >= PERSISTENT and bool(abs(sd[-1, 0]) > self.alarm_sd),
        )


_EXPECTED = TypeAdapter(Expected)


def read_expected(run: RunDir) -> Expected | None:
    """Read the forecast of a run; None if there is none."""
    return read_as(run.root / FILE, _EXPECTED)
