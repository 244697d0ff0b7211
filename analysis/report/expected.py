"""What the laws expect beyond the table: losses by the law that predicts best, accuracies by way of the loss."""

from __future__ import annotations

import pandas as pd

from aimscale.analysis.accuracy.links import forecast
from aimscale.analysis.next.backtest import with_compute
from aimscale.analysis.next.proposal import with_variables
from aimscale.analysis.report.study import Study

FORECAST_SCALES = ((2.0, 2.0), (10.0, 1.0), (1.0, 10.0), (10.0, 10.0))


def forecasts(study: Study) -> pd.DataFrame:
    """What the law expects beyond the table: N and D multiplied from the largest run, data new (U = D).

    Returns:
        Columns: times_n, times_d, N, D and the law's other variables, value, ci_lo, ci_hi, pi_lo, pi_hi,
        beyond_range; empty without a law.
    """
    law = study.forecaster
    if law is None:
        return pd.DataFrame()
    joint = study.fits["ND"]
    scales = pd.DataFrame(FORECAST_SCALES, columns=["times_n", "times_d"])
    grid = scales.assign(N=scales["times_n"] * joint.ranges["N"][1], D=scales["times_d"] * joint.ranges["D"][1])
    places = with_variables(grid, law, with_compute(study.usable, None))
    found = law.predict(places).assign(beyond_range=scales.max(axis=1))  # in N and D; laws may know C, too
    return pd.concat([places, found], axis=1)


def accuracy_forecasts(study: Study) -> pd.DataFrame:
    """What the two-step forecast, scale -> loss -> accuracy, expects beyond the table for the first probe kind.

    Returns:
        Columns: task, kind, times_n, times_d, loss, accuracy, pi_lo, pi_hi, beyond_range; empty without both steps.
    """
    law = study.forecaster
    kind = next((kind for kind, _ in study.links), None)
    if law is None or not law.draws or kind is None:
        return pd.DataFrame()
    places = forecasts(study)
    tables = []
    for (each, task), second in study.links.items():
        if each == kind and second.draws:
            found = forecast(law, second, places[list(law.law.variables)]).table
            keep = found[["loss", "accuracy", "pi_lo", "pi_hi", "beyond_range"]].reset_index(drop=True)
            tables.append(pd.concat([places[["times_n", "times_d"]], keep], axis=1).assign(task=task, kind=kind))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
