"""Sources of noise in a validation loss: seeds, the images that it is measured on, errors that rows share."""

from __future__ import annotations

import contextlib

import numpy as np
import pandas as pd
from scipy.stats import chi2

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.table.design import held_equal, varies, with_size
from aimscale.analysis.table.points import usable_rows

COMPONENTS = {
    "sizes": "of it, shared by the rows of a size: the law's form or tuning, or a size's own error",
    "runs": "of it, shared by the rows of a run beyond its size",
    "budgets": "of it, shared by the rows of a budget: its schedule, its part of the stream, or the law's form",
}
"""Groups of rows -> what their component of the scatter about the law is; one table cannot tell misfit from error."""


def noise(df: pd.DataFrame, *, y: str = "val_loss", law: Fit | None = None) -> pd.DataFrame:
    """Estimate the variance components of a loss.

    Args:
        df: a results table.
        law: a law fitted to it already, which saves a fit where it is the one that tells the scatter.

    Returns:
        A row per component: kind (seeds, images, law, sizes, runs, budgets), source (in words), value (a standard
        deviation of ln loss, that is a fraction of the loss), low, high (95 %; NaN where not known) and basis.

    Raises:
        AnalysisError: no usable loss, or neither seeds nor standard errors to tell noise from.

    Example:
        >>> noise(read_table("results.parquet"))
    """
    rows = usable_rows(with_size(df), y).rows
    parts = _seeds(rows, y) if "seed" in rows else []
    if y == "val_loss" and "val_loss_se" in rows and rows["val_loss_se"].notna().any():
        errors = (rows["val_loss_se"] / rows[y]).dropna()
        low, value, high = np.percentile(errors, [2.5, 50, 97.5]).tolist()
        basis = f"median and range of {len(errors)} rows' standard errors"
        parts.append(("images", "validation images, which all runs share", value, low, high, basis))
    if len(rows) < 2 or not parts:
        raise AnalysisError(
            f"{len(rows)} complete rows with a positive {y}, no two of which differ in the seed alone, cannot tell "
            "noise from anything; run more seeds."
        )
    name = "repeated" if "unique_images" in rows and varies(rows["unique_images"]) else "chinchilla"
    with contextlib.suppress(AnalysisError):  # too few points for a law
        law = law if law is not None and law.law.name == name else fit(rows, name, y=y, is_tested=False)
        scatter, counts = law.estimate.components, law.estimate.groups.counts
        parts.append(("law", "scatter about the joint law", scatter.total, np.nan, np.nan, f"{law.num_points} points"))
        for kind in filter(scatter.shared.get, counts):
            parts.append((kind, COMPONENTS[kind], scatter.shared[kind], np.nan, np.nan, f"{counts[kind]} {kind}"))
    return pd.DataFrame(parts, columns=["kind", "source", "value", "low", "high", "basis"])


def _seeds(rows: pd.DataFrame, y: str) -> list[tuple[str | float, ...]]:
    """Pool the spread between seeds over cells; budgets of a run share its error, so the interval counts a run once."""
    keys = held_equal(rows, {"seed", y})
    table = rows.assign(log_y=np.log(rows[y])).groupby([*keys, "seed"], dropna=False)["log_y"].mean().reset_index()
    runs = table.groupby([name for name in keys if name != "images_seen"], dropna=False)
    if not (spare := int((runs["seed"].nunique() - 1).clip(0).sum())):
        return []
    cells = table.groupby(keys, dropna=False)["log_y"]
    variance = ((table["log_y"] - cells.transform("mean")) ** 2).sum() / (len(table) - cells.ngroups)
    low, value, high = np.sqrt(variance * spare / np.array([chi2.ppf(0.975, spare), spare, chi2.ppf(0.025, spare)]))
    return [("seeds", "between seeds", value, low, high, f"{spare} degrees of freedom of runs")]
