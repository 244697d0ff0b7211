"""Losses as if every run had been trained at its best setting, with the errors that tuning leaves."""

from __future__ import annotations

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError, option
from aimscale.analysis.fitting.covariance import KnownErrors, with_known_errors
from aimscale.analysis.laws.base import Array
from aimscale.analysis.table.design import FOLLOWS, tuned_columns, varies
from aimscale.analysis.table.names import Exclusion, left_out_of, our_name, remember, their_name
from aimscale.analysis.tuning.rates import rates
from aimscale.analysis.tuning.result import NOT_TOLD, ONE_RATE, OPTIMUM, Rates, scale_of
from aimscale.analysis.words import percent, some


def tuned(
    df: pd.DataFrame, *, y: str = "val_loss", lr: str = "lr_peak", batch: str | None = None, found: Rates | None = None
) -> pd.DataFrame:
    """Correct the losses of a table to those of runs at their best settings, for laws to be fitted to.

    Of each cell of one N and D the rows at its best setting are kept. A cell with an optimum of its own gets the lowest
    loss of its parabola; others their loss less what they lost by the law of the best settings, whose error stays with
    the rows: intervals of whatever is fitted to them count it.

    Args:
        df: one row per run and budget.
        y: column of the loss.
        lr: column of the learning rate.
        batch: column of the batch, as `rates` takes it.
        found: rates of this table, where they were found before.

    Returns:
        The rows that were kept, with corrected losses.

    Raises:
        AnalysisError: cells whose best setting neither their own rates nor a law tells.

    Example:
        >>> table = read_table("tuned.csv")
        >>> fit(tuned(table), "chinchilla").intervals["alpha"]
    """
    found = found or rates(df, y=y, lr=lr, batch=batch)
    table, data, y = found.table, found.data, our_name(df, y)
    _refuse_unknown(df, found)
    is_best = np.all([data[name] == table[f"{name}_used"].to_numpy()[data["cell"]] for name in found.settings], axis=0)
    kept = data[is_best]
    gain, errors = _gains(found)
    change, cell = -gain, kept["cell"].to_numpy()
    own = found.tuned[(table["found"] == OPTIMUM).to_numpy()[found.tuned]]
    lowest = pd.Series(found.surface.lowest, found.tuned)[own]
    change[own] = lowest - np.log(kept["y"]).groupby(cell).mean().to_numpy()[own]
    out = df.loc[kept.index].assign(**{y: kept["y"] * np.exp(change[cell])})
    degrees = min((law.estimate.covariance.degrees for law in found.laws.values()), default=np.inf)
    names = " and ".join(found.columns[name] for name in found.settings)
    why = f"not the best {names} of their cell; losses are corrected to those of the best one"
    left = Exclusion(kind="best of", subject=names, number=len(data) - len(out), text=why)
    out = remember(out, left_out=[*found.exclusions[len(left_out_of(df)) :], left])
    return with_known_errors(out, y, KnownErrors(loadings=errors[cell], degrees=degrees))


def tuned_where_known(df: pd.DataFrame, y: str = "val_loss") -> tuple[pd.DataFrame, str, Rates | None]:
    """Correct losses where rates allow; return the table, words on how well its largest size is tuned, and rates."""
    found = None
    try:
        found = rates(df, y=y)
        return tuned(df, y=y, found=found), found.verdict(), found
    except AnalysisError as error:
        if found:
            return df, f"{found.verdict()}; losses are not corrected: {error}", found
    others = [] if our_name(df, "lr_peak") in df else [their_name(df, name) for name in tuned_columns(df)]
    unnamed = f"not known: if {some(others)} holds the learning rate, name it: {option('columns', 'lr_peak=THEIRS')}"
    return df, unnamed if others else ONE_RATE, None


def _refuse_unknown(df: pd.DataFrame, found: Rates) -> None:
    """Raise where a cell's loss at its best setting is not known."""
    rows, columns = df.loc[found.data.index], [our_name(df, found.columns[name]) for name in found.settings]
    follow = {*columns, *(other for name in columns for other in FOLLOWS.get(name, ()))}
    cells = rows.groupby(found.data["cell"])
    if others := [name for name in tuned_columns(rows, used=follow) if cells[name].agg(varies).any()]:
        names = some([their_name(df, name) for name in others])
        raise AnalysisError(f"Rows of one size and budget differ in {names}, too; choose one of each first.")
    table, by_law = found.table, found.table["found"] != OPTIMUM
    if (by_law.any() and len(found.laws) < len(found.settings)) or not found.surface.has_minimum.all():
        known = f"The best setting is known of {int((~by_law).sum())} of {len(table)} cells only"
        raise AnalysisError(f"{known}; try more rates, or leave the other sizes out.")
    if not (worst := table.loc[by_law, "regret_hi"].max(skipna=False)) < NOT_TOLD and by_law.any():
        raise AnalysisError(f"The law of the best settings allows losses of up to {percent(worst)}; try more rates.")


def _gains(found: Rates) -> tuple[Array, Array]:
    """Return what ln loss gains at the best settings by their laws (cells,), and its errors (cells, m) by m independent
    causes that all cells share; zero for cells with an optimum of their own."""
    table, surface = found.table, found.surface
    gain, errors, by_law = np.zeros(len(table)), [], (table["found"] != OPTIMUM).to_numpy()
    if not by_law.any():
        return gain, np.zeros((len(table), 0))
    hessian = surface.curvatures(scale_of(table)[by_law, : surface.scale.shape[1]])
    at, settings = table[by_law], found.settings
    away = np.column_stack([np.log(at[f"{name}_used"] / at[f"{name}_best"]) for name in settings])
    pull = np.einsum("nij,nj->ni", hessian, away)
    gain[by_law] = np.sum(pull * away, axis=1) / 2
    for i, name in enumerate(settings):
        law = found.laws[name]
        size, turn = np.linalg.eigh(law.estimate.covariance.matrix)
        moved = law.estimate.gradient(law.estimate.law_at(law.variables(at))) @ (turn * np.sqrt(np.maximum(size, 0.0)))
        gain[by_law] -= hessian[:, i, i] * np.sum(moved**2, axis=1) / 2  # an optimum that errs looks further away
        part = np.zeros((len(table), moved.shape[1]))
        part[by_law] = pull[:, [i]] * moved
        errors.append(part)
    return gain, np.concatenate(errors, axis=1)
