"""From loss to accuracy: a sigmoid with a chance floor and an ideal point."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.groups import SIZE_COLUMNS
from aimscale.analysis.fitting.problem import LSQ
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.laws.catalogue import LINK_SIGMOID
from aimscale.analysis.table.names import joined, no_column


def link(
    df: pd.DataFrame,
    *,
    loss: str = "val_loss",
    accuracy: str = "top1",
    chance: float | None = None,
    ideal: float | None = None,
    is_tested: bool = True,
) -> Fit:
    """Fit accuracy as a sigmoid of loss, by least squares.

    Args:
        loss: column of the loss.
        accuracy: column of the accuracy, 0 to 1.
        chance: accuracy of guessing, which holds the floor; None fits it.
        ideal: loss at which the accuracy is 1: (ideal, 1) is one more point, as in the OLMo ladder.
        is_tested: whether the law is tested for lack of fit, as in `fit`.

    Returns:
        The sigmoid as a fit, whose variable is L; its curve and interval stay between chance and 1.

    Raises:
        AnalysisError: accuracies that are no fractions, an ideal loss not below every measured one, too few points.

    Example:
        >>> probes = probe_frame(read_table("results.parquet"))
        >>> photographs = probes[(probes["task"] == "photographs") & (probes["kind"] == "knn")]
        >>> link(photographs).predict({"L": [0.33]})
    """
    if accuracy not in df.columns:
        raise no_column(df, accuracy)
    values = pd.to_numeric(df[accuracy], errors="coerce")
    if not values.dropna().between(0, 1).all():
        raise AnalysisError(f"{accuracy} goes from {values.min():g} to {values.max():g}; give fractions, 0 to 1.")
    rows = df if ideal is None else _with_ideal(df, loss, accuracy, ideal)
    found = fit(
        rows,
        LINK_SIGMOID,
        y=accuracy,
        columns={"L": loss},
        objective=LSQ,
        fixed={} if chance is None else {"floor": chance},
        bounds={"floor": (0.0, 1.0)} if chance is None else {},
        zero_allowed=True,
        is_tested=is_tested,
    )
    found = replace(found, limits=(chance or 0.0, 1.0))
    if ideal is None:
        return found
    data = found.data[:-1]  # the ideal point is no part of what was measured, and of how far that reaches
    ends = float(data["L"].min()), float(data["L"].max())
    return replace(found, data=data, num_points=len(data), num_rows=found.num_rows - 1, ranges={"L": ends})


def _with_ideal(df: pd.DataFrame, loss: str, accuracy: str, ideal: float) -> pd.DataFrame:
    """Add the ideal point as a last row, of a size and a run of its own."""
    lowest = pd.to_numeric(df[loss], errors="coerce").min() if loss in df.columns else np.inf
    if not 0 <= ideal < lowest:
        raise AnalysisError(
            f"The ideal {loss} of {accuracy} is {ideal:g}; give one from 0 to below the lowest measured, {lowest:g}."
        )
    own = {name: "ideal point" for name in (*SIZE_COLUMNS, "run_id", "seed") if name in df.columns}
    return joined([df, pd.DataFrame([{**own, loss: ideal, accuracy: 1.0}])])


def task_level(probed: pd.DataFrame, column: str) -> float | None:
    """Find one task's `chance` (accuracy of guessing) or `ideal` (loss at which it is 1); None where rows disagree."""
    values = set(probed[column].dropna()) if column in probed.columns else set()
    return float(values.pop()) if len(values) == 1 else None
