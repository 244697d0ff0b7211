"""From loss to accuracy: links with a chance floor and an ideal point."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.groups import SIZE_COLUMNS
from aimscale.analysis.fitting.objectives import LSQ, Objective
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.laws.base import Law
from aimscale.analysis.laws.catalogue import LINK_EXPONENTIAL, LINK_LINEAR, LINK_SIGMOID
from aimscale.analysis.table.names import joined, no_column

LINKS: dict[str, Law] = {"sigmoid": LINK_SIGMOID, "exponential": LINK_EXPONENTIAL, "linear": LINK_LINEAR}
IDEAL_POINT = "ideal point"
"""Size and run of the point (ideal, 1)."""


def link(
    df: pd.DataFrame,
    *,
    kind: str = "sigmoid",
    loss: str = "val_loss",
    accuracy: str = "top1",
    chance: float | None = None,
    ideal: float | None = None,
    objective: Objective | str = LSQ,
    resamples: int = 1000,
    seed: int = 0,
) -> Fit:
    """Accuracy as a function of loss.

    Args:
        kind: sigmoid, exponential or linear.
        accuracy: column of the accuracy, 0 to 1.
        chance: accuracy of guessing; holds the floor of the sigmoid and the exponential there. None fits the floor.
        ideal: loss at which the accuracy is 1. The sigmoid takes (ideal, 1) as one more point, as in the OLMo ladder;
            the other kinds, which cannot bend towards it, do not.
        seed: seed of the draws.

    Raises:
        AnalysisError: unknown kind, accuracies that are no fractions or mix percent and fractions, an ideal loss that
            is not below every measured one, or too few points.
    """
    if kind not in LINKS:
        raise AnalysisError(f"There is no link named {kind!r}; choose from {', '.join(LINKS)}.")
    if accuracy not in df.columns:
        raise no_column(df, accuracy)
    values = pd.to_numeric(df[accuracy], errors="coerce")
    if (values > 1).any() or (values < 0).any():
        mixed = " and fractions" if (values[values > 0] <= 1).any() else ""
        raise AnalysisError(
            f"{accuracy} holds percents{mixed} (from {values.min():g} to {values.max():g}); give 0 to 1."
        )
    fixed = {"floor": chance} if chance is not None and kind != "linear" else None
    bounds = None if fixed or kind == "linear" else {"floor": (0.0, 1.0)}
    anchored = ideal is not None and kind == "sigmoid"
    result = fit(
        LINKS[kind],
        _with_ideal(df, loss, accuracy, ideal) if ideal is not None and anchored else df,
        y=accuracy,
        columns={"L": loss},
        objective=objective,
        fixed=fixed,
        bounds=bounds,
        resamples=resamples,
        seed=seed,
        zero_allowed=True,
    )
    return replace(_measured(result) if anchored else result, limits=(chance or 0.0, 1.0))


def _with_ideal(df: pd.DataFrame, loss: str, accuracy: str, ideal: float) -> pd.DataFrame:
    """The table with one more row, of a size and a run of its own."""
    lowest = pd.to_numeric(df[loss], errors="coerce").min() if loss in df.columns else np.inf
    if not 0 <= ideal < lowest:
        raise AnalysisError(
            f"The ideal {loss} of {accuracy} is {ideal:g}; give one from 0 to below the lowest measured, {lowest:g}."
        )
    own = {name: IDEAL_POINT for name in (*SIZE_COLUMNS, "run_id", "seed") if name in df.columns}
    return joined([df, pd.DataFrame([{**own, loss: ideal, accuracy: 1.0}])])


def _measured(result: Fit) -> Fit:
    """The fit without the ideal point, its last: what was measured, and how far that reaches."""
    keep = np.arange(len(result.data)) < len(result.data) - 1
    data = result.data[keep]
    return replace(
        result,
        data=data,
        groups=result.groups.rows(keep),
        num_points=result.num_points - 1,
        num_rows=result.num_rows - 1,
        ranges={"L": (float(data["L"].min()), float(data["L"].max()))},
    )


def chance_level(probed: pd.DataFrame) -> float | None:
    """Accuracy of guessing on one task, by the column `chance` of its rows; None where they do not agree on one."""
    return _agreed(probed, "chance")


def ideal_loss(probed: pd.DataFrame) -> float | None:
    """Loss at which one task's accuracy is 1, by the column `ideal` of its rows; None where they agree on none."""
    return _agreed(probed, "ideal")


def _agreed(probed: pd.DataFrame, column: str) -> float | None:
    values = set(probed[column].dropna()) if column in probed.columns else set()
    return float(values.pop()) if len(values) == 1 else None
