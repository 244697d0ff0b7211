"""Forecasts of runs while they train, how far a run is from its own, and whether it is to end for that.

A worker writes `expected.json` when it starts a run, from the finished runs of the sweep, and renews those of its runs
whenever one of them finishes. The run knows nothing of it: it writes `curve.jsonl`, and is asked to stop by the signal
that always asks it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from aimscale.analysis.errors import AnalysisError
from aimscale.harness.run.expected import FILE, Expected, ExpectedPoint, read_expected
from aimscale.harness.run.files import read_object, write_json
from aimscale.sweeps.planning.run import Run
from aimscale.sweeps.planning.sweepfile import Sweep
from aimscale.sweeps.state.record import RunRecord

ERROR_CORRELATION_LENGTH = 2.0
"""Distance in ln images at which an error that points share is forgotten (to 1/e): past a plateau, say."""
COLUMNS = ["run_id", "params_total", "is_budget", "images_seen", "val_loss"]
STOP_FILE = "stop-off-track.json"
"""File of the sweep's directory with the deviation from which its runs end, by the last launch."""
PERSISTENT = 3
"""Number of points in a row, up to the last, that make a deviation: a single loss may stand out."""
MAX_SURPRISE = 3.0
"""A point counts as at most so many standard deviations of its own noise from the median of three."""
FALSE_ALARM_RATE = 0.01
"""Share of sound runs that may raise an alarm, at any point of their whole training."""
NUM_SIMULATED = 2000
"""Number of simulated sound runs from which the threshold of the alarm follows."""

F64 = npt.NDArray[np.float64]


def save_stop_threshold(sweep: Sweep, sd: float | None) -> None:
    """Keep the deviation from which runs of the sweep are to end, for workers anywhere; None for never."""
    if sd is None:
        (sweep.directory / STOP_FILE).unlink(missing_ok=True)
    else:
        write_json(sweep.directory / STOP_FILE, {"sd": sd})


def write_forecasts(sweep: Sweep, planned: Sequence[Run], chosen: Sequence[Run]) -> None:
    """Write the forecasts of chosen runs, from those planned runs that have finished; runs without one get no file."""
    finished = [run for run in planned if RunRecord(sweep.run_dir(run.run_id)).read_status().state == "finished"]
    stop_sd = (read_object(sweep.directory / STOP_FILE) or {}).get("sd")
    for run in chosen:
        like = [each for each in finished if each.run_id != run.run_id and each.design() == run.design()]
        seeds = {each.cell["seed"] for each in like}
        if run.num_params is None or not like or (len(seeds) == 1 and run.cell["seed"] not in seeds):
            continue  # runs of one seed share their order of data and do not tell how others scatter
        try:
            expected = expected_losses([row for each in like for row in points(sweep, each)], run.num_params)
        except AnalysisError:  # too few smaller sizes yet
            continue
        write_json(sweep.run_dir(run.run_id) / FILE, dataclasses.asdict(dataclasses.replace(expected, stop_sd=stop_sd)))


def expected_losses(rows: Sequence[dict[str, Any]], num_params: float) -> Expected:
    """Forecast a run of N parameters from the points of finished runs, with the threshold of its alarm.

    Raises:
        AnalysisError: they are too few.
    """
    import pandas as pd  # with scipy a second and a half, which most launches do without

    from aimscale.analysis.forecasts.trajectory import DOF, trajectory

    forecast = trajectory(pd.DataFrame(rows, columns=COLUMNS), num_params)
    names = [field.name for field in dataclasses.fields(ExpectedPoint)]
    by_kind = {
        kind: tuple(ExpectedPoint(**{name: row[name] for name in names}) for row in part.to_dict("records"))
        for kind, part in forecast.table.groupby("is_budget")
    }
    expected = Expected(
        basis=forecast.basis,
        points=by_kind.get(False, ()),
        budgets=by_kind.get(True, ()),
        memory=ERROR_CORRELATION_LENGTH,
    )
    return dataclasses.replace(expected, alarm_sd=alarm_threshold(expected, DOF), false_alarm_rate=FALSE_ALARM_RATE)


def points(sweep: Sweep, run: Run) -> Iterator[dict[str, Any]]:
    """Yield the validation losses of a run, during training and at budgets, measured as the plan measures them."""
    record = RunRecord(sweep.run_dir(run.run_id))
    about = {"run_id": run.run_id, "params_total": run.num_params}
    for is_budget, losses in ((False, curve_losses(record, run)), (True, _losses(record.read_rows(), run))):
        for images_seen, loss in losses.items():
            yield about | {"is_budget": is_budget, "images_seen": images_seen, "val_loss": loss}


def curve_losses(record: RunRecord, run: Run) -> dict[int, float]:
    """Return the losses of a run during training, by images seen, measured as the plan measures them."""
    return _losses(record.read_curve(), run)


def _losses(rows: Iterable[dict[str, Any]], run: Run) -> dict[int, float]:
    return {row["images_seen"]: row["val_loss"] for row in rows if row.get("val_loss") and run.is_measured(row)}


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


class Watch:
    """Comparison of one run with its forecast, made anew when a point or the forecast is new."""

    def __init__(self, run: Run, record: RunRecord) -> None:
        self._run, self._record = run, record
        self._compared: list[int] = []

    def look(self) -> str | None:
        """Write how far the run is from its forecast, if that is new, and return why it is to end, if it is.

        Raises:
            OSError, UserError: files of the run cannot be read now.
        """
        paths = (self._record.curve, self._record.path / FILE)
        times = [os.stat(path).st_mtime_ns for path in paths if path.exists()]
        if len(times) < len(paths) or times == self._compared:
            return None
        if (expected := read_expected(self._record)) is None:
            return None
        deviation = find_deviation(expected, curve_losses(self._record, self._run))
        self._compared = times
        if deviation is None:
            return None
        since = deviation.since if deviation.is_alarm else None
        write_json(self._record.deviation, {"deviation": deviation.sd, "deviates_since": since}, durable=False)
        return reason_to_stop(expected, deviation)
