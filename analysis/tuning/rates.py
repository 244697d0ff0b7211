"""Best learning rate and batch by size and data, their law, what each run lost, and losses as if none had lost any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from aimscale.analysis.display import option, percent, some
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import half_width
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.laws import Array
from aimscale.analysis.table.groups import EXACT, scales_of, spaced
from aimscale.analysis.table.points import KnownErrors, usable_rows, with_known_errors
from aimscale.analysis.table.runs import Runs, Table
from aimscale.analysis.table.schema import FOLLOWS, Exclusion, varies
from aimscale.analysis.tuning.result import (
    BY_LAW,
    EDGE,
    MIN_VALUES,
    NO_MINIMUM,
    NOT_TOLD,
    ONE_RATE,
    OPTIMUM,
    UNKNOWN,
    Rates,
    product,
    scale_of,
)
from aimscale.analysis.tuning.surface import Surface, fit_surface

SAME_VALUE = 1e-9
"""Optima whose logarithms differ by less are one number, through which a power law has no error to tell."""
WIDEST = 1e30
"""Factor that sizes and data span at most."""
UNCERTAIN = np.log(100)
"""Half of an optimum's interval, in logarithms, from which no minimum was seen."""
MOST_CELLS = 200
"""Cells that have an optimum of their own, evenly over all that have rates enough; others are judged by the law."""
WINDOW = 0.01
"""Losses within this fraction of a cell's lowest are taken for a parabola: on Step Law's runs one of 0.03 calls the
best of 100 settings .25 to .5 % worse than the optimum, one of 0.01 .02 to .15 %."""
MIN_ROWS = 8
"""Rows of the lowest losses that count for two settings, whose parabola has six coefficients."""


def rates(
    table: Table,
    *,
    y: str = "val_loss",
    lr: str = "lr_peak",
    batch: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Rates:
    """Find the best learning rate (and batch) of every size and amount of data, and what other settings lose.

    Rows of equal N and D that differ in their setting are a cell. Near its minimum ln loss is a parabola in the
    logarithm of the setting; a cell with three rates or more has an optimum of its own, unless that lies beyond the
    rates that were tried by more than its error. The optima follow lr* = c N^a D^b, fitted as every law here: errors
    are clustered by sizes and by budgets. Cells of fewer rates are judged by the law.

    Args:
        table: one row per run and budget.
        y: column of the loss.
        lr: column of the learning rate.
        batch: column of the batch; None takes `batch_size` where cells have three values of it or more.
        columns: our name or a law's letter -> the name in the table, or a formula, as `read_table` takes them.

    Returns:
        Optima, their laws, and the regret of every cell: the share of its loss that its best row lost by its setting.

    Raises:
        AnalysisError: a missing column, or no cell with three values of every setting.

    Example:
        >>> found = rates(read_table("tuned.csv"))
        >>> found.table
        >>> found.laws["lr"].predict(N=1e9, D=1e9)
    """
    runs = Runs(table, columns)
    names = _setting_columns(runs, lr, batch)
    wanted = {"N": runs.column("N"), "D": runs.column("D"), **names, "y": runs.column(y)}
    used = usable_rows(runs, wanted)
    if len(used.rows) and (np.ptp(np.log(used.numbers[["N", "D"]]), axis=0) > np.log(WIDEST)).any():
        raise AnalysisError(f"N or D spans more than a factor of {WIDEST:g}, which no sweep does; correct the table.")
    cells, settings = _cells(used.rows, used.numbers), np.log(used.numbers[[*names]].to_numpy())
    if not len(cells) or not is_tuned(cells, settings).any():
        what = " and ".join(map(runs.called, names.values()))
        raise AnalysisError(
            f"No size has {MIN_VALUES} values of {what} at the same amount of data, so no best one is known; train "
            f"some sizes at {MIN_VALUES} values each."
        )
    log_loss = np.log(used.numbers["y"].to_numpy())
    optima = _table(used.numbers, cells, log_loss, list(names))
    tuned, surface = _surface(log_loss, cells, settings, optima)
    optima = _with_optima(optima, tuned, surface, list(names))
    laws = {name: law for i, name in enumerate(names) if (law := _law(optima, tuned, surface, i, name)) is not None}
    return Rates(
        table=_with_regret(optima, tuned, surface, laws, list(names)),
        laws=laws,
        surface=surface,
        tuned=tuned,
        points=replace(used, numbers=used.numbers.assign(cell=cells)),
    )


def _setting_columns(runs: Runs, lr: str, batch: str | None) -> dict[str, str]:
    """Name the columns of the settings: the rate's, and the batch's where it was tuned."""
    names = {"lr": runs.column(lr)}
    column, scale = runs.column(batch or "batch_size"), [*map(runs.column, "ND")]
    rows = runs.complete().frame
    is_tried = {column, *scale} <= {*rows} and (rows.groupby(scale)[column].nunique() >= MIN_VALUES).any()
    return names | ({"batch": column} if is_tried or batch is not None else {})


def _cells(runs: Runs, numbers: pd.DataFrame) -> Array:
    """Encode cells of equal N and D, and of equal pool and design where a table holds several."""
    data = scales_of(numbers["D"].to_numpy(float))
    others = [name for name in (*runs.design_columns(), "unique_images") if name in runs]
    design = [runs[name].astype(str).to_numpy() for name in others]
    return numbers.groupby([numbers["N"].to_numpy(), data, *design], dropna=False).ngroup().to_numpy()


def _table(numbers: pd.DataFrame, cells: Array, log_loss: Array, settings: list[str]) -> pd.DataFrame:
    """Describe the cells: scale, rows, the range of every setting, and the setting of the lowest loss."""
    grouped = numbers.groupby(cells)
    table = grouped.agg(N=("N", "first"), D=("D", "mean"), num_rows=("y", "size"))
    lowest = numbers.iloc[pd.Series(log_loss).groupby(cells).idxmin()]
    for name in settings:
        table[f"{name}_used"] = lowest[name].to_numpy()
        table[f"{name}_tried"] = grouped[name].nunique()
        table[f"{name}_lowest"], table[f"{name}_highest"] = grouped[name].min(), grouped[name].max()
    return table.assign(loss=lowest["y"].to_numpy())


def _surface(log_loss: Array, cells: Array, settings: Array, table: pd.DataFrame) -> tuple[Array, Surface]:
    """Fit the surface to the rows near the minima of tuned cells; returns the numbers of these cells, too.

    Curvature follows N and D where losses show that and every cell keeps a minimum, else it is one for all.
    """
    keep = is_tuned(cells, settings)[cells]
    keep[keep] = near_minimum(log_loss[keep], np.unique(cells[keep], return_inverse=True)[1], settings[keep])
    tuned = np.flatnonzero(is_tuned(np.where(keep, cells, cells.max() + 1), settings)[: len(table)])
    tuned = tuned[spaced(len(tuned), MOST_CELLS)]
    keep &= np.isin(cells, tuned)
    if not len(tuned):
        raise AnalysisError(
            "Of each cell fewer than three values of every setting come near its lowest loss; try some."
        )
    near = log_loss[keep], np.searchsorted(tuned, cells[keep]), settings[keep]
    scale = scale_of(table)
    surface, varying = fit_surface(*near, scale[tuned, :1]), fit_surface(*near, scale[tuned])
    has_minima = np.linalg.eigvalsh(varying.curvatures(scale)).min() > 0
    return tuned, varying if has_minima and varying.is_better_than(surface) else surface


def _with_optima(table: pd.DataFrame, tuned: Array, surface: Surface, settings: list[str]) -> pd.DataFrame:
    """Add optima with their intervals, and how each cell's was found."""
    errors = np.sqrt(np.maximum(np.diagonal(surface.optima_covariance, axis1=1, axis2=2), 0.0))
    half = half_width(errors, surface.degrees)
    is_known, labels = surface.has_minimum & ~(half > UNCERTAIN).any(axis=1), table.index[tuned]
    table, inside = table.assign(found=UNKNOWN), np.ones(len(tuned), bool)
    for best, reach, name in zip(surface.optima.T, half.T, settings, strict=True):
        low, high = (np.log(table[f"{name}_{end}"].to_numpy()[tuned]) for end in ("lowest", "highest"))
        # to leave out whatever errs to the outside would draw the law to the settings tried
        beyond = np.minimum(np.nan_to_num(reach), high - low)
        inside &= (low - beyond <= best) & (best <= high + beyond)
        columns = [f"{name}_best", f"{name}_lo", f"{name}_hi"]
        table[columns] = np.nan
        with np.errstate(over="ignore"):  # of an optimum that is hardly known
            table.loc[labels, columns] = np.exp(np.column_stack([best, best - reach, best + reach]))
    table.loc[labels, "found"] = np.where(is_known, np.where(inside, OPTIMUM, EDGE), NO_MINIMUM)
    return table


def _law(table: pd.DataFrame, tuned: Array, surface: Surface, number: int, setting: str) -> Fit | None:
    """Fit the law of the optima in the variables that vary; None where there are too few, or all are the same.

    The errors of the optima are given to the fit: scatter does not show what all share, and few optima may agree by
    chance.
    """
    is_inside = (table["found"] == OPTIMUM).to_numpy()[tuned]
    optima, errors = table.iloc[tuned[is_inside]], surface.optima_errors(number)[is_inside]
    variables = [name for name in ("N", "D") if np.ptp(np.log(optima[name])) > EXACT] if len(optima) else []
    if not variables or len(optima) < len(variables) + 2 or np.ptp(np.log(optima[f"{setting}_best"])) < SAME_VALUE:
        return None
    points = optima[variables].assign(setting=optima[f"{setting}_best"])
    if surface.degrees > 0:
        errors_of_optima = KnownErrors(loadings=errors, degrees=surface.degrees)
        points = with_known_errors(Runs(points), "setting", errors_of_optima).frame
    return fit(points, product(*variables), y="setting", objective="log_lsq", is_tested=False)


def _with_regret(
    table: pd.DataFrame, tuned: Array, surface: Surface, laws: dict[str, Fit], settings: list[str]
) -> pd.DataFrame:
    """Add what the best row of each cell lost by its setting: by the cell's own optimum, else by the law's."""
    has_laws, is_tuned_cell = len(laws) == len(settings), np.isin(np.arange(len(table)), tuned)
    used = np.log(table[[f"{name}_used" for name in settings]].to_numpy())
    regret = np.full((len(table), 3), np.nan)
    if surface.has_minimum.all():
        regret[is_tuned_cell] = surface.regret_of_own(used[is_tuned_cell])
        others = (table["found"] != OPTIMUM).to_numpy()
        if has_laws and others.any():
            told = [np.log(laws[name].predict(table[others])[["value", "pi_lo", "pi_hi"]]) for name in settings]
            best, low, high = (np.column_stack([each[end] for each in told]) for end in ("value", "pi_lo", "pi_hi"))
            scale = scale_of(table)[others, : surface.scale.shape[1]]
            regret[others] = surface.regret_about(used[others], best, (high - low) / 2, scale)
            for ends, values in {"best": best, "lo": low, "hi": high}.items():
                table.loc[others, [f"{name}_{ends}" for name in settings]] = np.exp(values)
            table.loc[table["found"] == UNKNOWN, "found"] = BY_LAW
    return table.assign(regret=regret[:, 0], regret_lo=regret[:, 1], regret_hi=regret[:, 2])


def tuned(
    table: Table,
    *,
    y: str = "val_loss",
    lr: str = "lr_peak",
    batch: str | None = None,
    known_rates: Rates | None = None,
    columns: Mapping[str, str] | None = None,
) -> Runs:
    """Correct the losses of a table to those of runs at their best settings, for laws to be fitted to.

    Of each cell of one N and D the rows at its best setting are kept. A cell with an optimum of its own gets the lowest
    loss of its parabola; others their loss less what they lost by the law of the best settings, whose error stays with
    the rows: intervals of whatever is fitted to them count it.

    Args:
        table: one row per run and budget.
        y: column of the loss.
        lr: column of the learning rate.
        batch: column of the batch, as `rates` takes it.
        known_rates: rates of this table, where they were fitted before.
        columns: our name or a law's letter -> the name in the table, or a formula, as `read_table` takes them.

    Returns:
        The rows that were kept, with corrected losses.

    Raises:
        AnalysisError: cells whose best setting neither their own rates nor a law tells.

    Example:
        >>> table = read_table("tuned.csv")
        >>> fit(tuned(table), "chinchilla").intervals["alpha"]
    """
    runs = Runs(table, columns)
    known_rates = known_rates or rates(runs, y=y, lr=lr, batch=batch)
    optima, data, y = known_rates.table, known_rates.points.numbers, runs.column(y)
    _refuse_unknown(runs, known_rates)
    is_best = np.all(
        [data[name] == optima[f"{name}_used"].to_numpy()[data["cell"]] for name in known_rates.settings], axis=0
    )
    kept = data[is_best]
    gain, errors = _gains(known_rates)
    change, cell = -gain, kept["cell"].to_numpy()
    inside = known_rates.tuned[(optima["found"] == OPTIMUM).to_numpy()[known_rates.tuned]]
    lowest = pd.Series(known_rates.surface.lowest, known_rates.tuned)[inside]
    change[inside] = lowest - np.log(kept["y"]).groupby(cell).mean().to_numpy()[inside]
    out = runs.take(kept.index).assign(**{y: kept["y"] * np.exp(change[cell])})
    degrees = min((law.estimate.covariance.degrees for law in known_rates.laws.values()), default=np.inf)
    names = " and ".join(known_rates.columns[name] for name in known_rates.settings)
    reason = f"not the best {names} of their cell; losses are corrected to those of the best one"
    left_out = Exclusion(kind="best of", subject=names, number=len(data) - len(out), text=reason)
    out = out.described(left_out=[*known_rates.exclusions[len(runs.exclusions) :], left_out])
    return with_known_errors(out, y, KnownErrors(loadings=errors[cell], degrees=degrees))


def tuned_where_known(runs: Runs, y: str = "val_loss") -> tuple[Runs, str, Rates | None]:
    """Correct losses where rates allow; return the table, words on how well its largest size is tuned, and rates."""
    result = None
    try:
        result = rates(runs, y=y)
        return tuned(runs, y=y, known_rates=result), result.verdict(), result
    except AnalysisError as error:
        if result:
            return runs, f"{result.verdict()}; losses are not corrected: {error}", result
    others = [] if runs.column("lr_peak") in runs else [*map(runs.called, runs.tuned_columns())]
    unnamed = f"not known: if {some(others)} holds the learning rate, name it: {option('columns', 'lr_peak=THEIRS')}"
    return runs, unnamed if others else ONE_RATE, None


def _refuse_unknown(runs: Runs, result: Rates) -> None:
    """Raise where a cell's loss at its best setting is not known."""
    rows, columns = runs.frame.loc[result.points.index], [runs.column(result.columns[name]) for name in result.settings]
    follow = {*columns, *(other for name in columns for other in FOLLOWS.get(name, ()))}
    cells = rows.groupby(result.points.numbers["cell"])
    if others := [name for name in Runs(rows).tuned_columns(used=follow) if cells[name].agg(varies).any()]:
        names = some([*map(runs.called, others)])
        raise AnalysisError(f"Rows of one size and budget differ in {names}, too; choose one of each first.")
    table, by_law = result.table, result.table["found"] != OPTIMUM
    if (by_law.any() and len(result.laws) < len(result.settings)) or not result.surface.has_minimum.all():
        share_known = f"The best setting is known of {int((~by_law).sum())} of {len(table)} cells only"
        raise AnalysisError(f"{share_known}; try more rates, or leave the other sizes out.")
    if not (worst := table.loc[by_law, "regret_hi"].max(skipna=False)) < NOT_TOLD and by_law.any():
        raise AnalysisError(f"The law of the best settings allows losses of up to {percent(worst)}; try more rates.")


def _gains(result: Rates) -> tuple[Array, Array]:
    """Return what ln loss gains at the best settings by their laws (cells,), and its errors (cells, m) by m independent
    causes that all cells share; zero for cells with an optimum of their own."""
    table, surface = result.table, result.surface
    gain, errors, by_law = np.zeros(len(table)), [], (table["found"] != OPTIMUM).to_numpy()
    if not by_law.any():
        return gain, np.zeros((len(table), 0))
    hessian = surface.curvatures(scale_of(table)[by_law, : surface.scale.shape[1]])
    at, settings = table[by_law], result.settings
    away = np.column_stack([np.log(at[f"{name}_used"] / at[f"{name}_best"]) for name in settings])
    pull = np.einsum("nij,nj->ni", hessian, away)
    gain[by_law] = np.sum(pull * away, axis=1) / 2
    for i, name in enumerate(settings):
        law = result.laws[name]
        size, turn = np.linalg.eigh(law.estimate.covariance.matrix)
        moved = law.estimate.gradient(law.estimate.law_at(law.variables(at))) @ (turn * np.sqrt(np.maximum(size, 0.0)))
        gain[by_law] -= hessian[:, i, i] * np.sum(moved**2, axis=1) / 2  # an optimum that errs looks further away
        part = np.zeros((len(table), moved.shape[1]))
        part[by_law] = pull[:, [i]] * moved
        errors.append(part)
    return gain, np.concatenate(errors, axis=1)


def near_minimum(log_loss: Array, cell: Array, settings: Array) -> Array:
    """Select the rows (mask) near each cell's minimum: within `WINDOW` of its lowest loss, and at least those of the
    lowest `MIN_VALUES` values of a lone setting, or the lowest `MIN_ROWS` rows of several."""
    rows = pd.DataFrame({"cell": cell, "loss": log_loss, "setting": settings[:, 0]})
    ranked = rows.sort_values(["cell", "loss"], kind="stable")
    near = rows["loss"] <= rows.groupby("cell")["loss"].transform("min") + np.log1p(WINDOW)
    if settings.shape[1] > 1:
        return (near | (ranked.groupby("cell").cumcount() < MIN_ROWS).reindex(rows.index)).to_numpy()
    values = ranked.drop_duplicates(["cell", "setting"])
    least = values[values.groupby("cell").cumcount() < MIN_VALUES].set_index(["cell", "setting"]).index
    return near.to_numpy() | rows.set_index(["cell", "setting"]).index.isin(least)


def is_tuned(cell: Array, settings: Array) -> Array:
    """Tell which cells (mask) have `MIN_VALUES` different values of every setting."""
    num_values = pd.DataFrame(settings).groupby(cell).nunique().min(axis=1) >= MIN_VALUES
    return num_values.reindex(range(cell.max() + 1), fill_value=False).to_numpy()
