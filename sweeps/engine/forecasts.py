"""Forecasts of runs while they train: `expected.json` in their directories, from the finished runs of the sweep.

A worker writes it when it starts a run, and renews those of its runs whenever one of them finishes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from aimscale.analysis.errors import AnalysisError
from aimscale.harness.run.expected import FILE, Expected, ExpectedPoint
from aimscale.harness.run.files import read_object, write_json
from aimscale.sweeps.engine.deviation import FALSE_ALARM_RATE, alarm_threshold
from aimscale.sweeps.planning.run import Run
from aimscale.sweeps.planning.sweepfile import Sweep
from aimscale.sweeps.state.record import RunRecord

ERROR_CORRELATION_LENGTH = 2.0
"""Distance in ln images at which an error that points share is forgotten (to 1/e): past a plateau, say."""
COLUMNS = ["run_id", "params_total", "is_budget", "images_seen", "val_loss"]
STOP_FILE = "stop-off-track.json"
"""File of the sweep's directory with the deviation from which its runs end, by the last launch."""


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
