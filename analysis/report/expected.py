"""What the laws expect beyond the table: losses by the joint law, accuracies by way of the loss."""

from __future__ import annotations

import pandas as pd

from aimscale.analysis.downstream.links import forecast
from aimscale.analysis.report.study import Study

FORECAST_SCALES = ((2.0, 2.0), (10.0, 1.0), (1.0, 10.0), (10.0, 10.0))


def forecasts(study: Study) -> pd.DataFrame:
    """What the joint law expects beyond the table: N and D multiplied from the largest run.

    Returns:
        Columns: times_n, times_d, N, D, value, ci_lo, ci_hi, pi_lo, pi_hi, beyond_range; empty without the law.
    """
    joint = study.fits.get("ND")
    if joint is None:
        return pd.DataFrame()
    scales = pd.DataFrame(FORECAST_SCALES, columns=["times_n", "times_d"])
    grid = scales.assign(N=scales["times_n"] * joint.ranges["N"][1], D=scales["times_d"] * joint.ranges["D"][1])
    return pd.concat([grid, joint.predict(grid)], axis=1)


def accuracy_forecasts(study: Study) -> pd.DataFrame:
    """What the two-step forecast, scale -> loss -> accuracy, expects beyond the table for the first probe kind.

    Returns:
        Columns: task, kind, times_n, times_d, loss, accuracy, pi_lo, pi_hi, beyond_range; empty without both steps.
    """
    joint = study.fits.get("ND")
    kind = next((kind for kind, _ in study.links), None)
    if joint is None or not joint.draws or kind is None:
        return pd.DataFrame()
    scales = forecasts(study)[["times_n", "times_d", "N", "D"]]
    tables = []
    for (each, task), second in study.links.items():
        if each == kind and second.draws:
            found = forecast(joint, second, scales[["N", "D"]]).table
            keep = found[["loss", "accuracy", "pi_lo", "pi_hi", "beyond_range"]].reset_index(drop=True)
            tables.append(pd.concat([scales[["times_n", "times_d"]], keep], axis=1).assign(task=task, kind=kind))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
