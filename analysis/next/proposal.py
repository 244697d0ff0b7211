"""From a table and an offer to a proposal: the runs to buy next, what error they leave the forecast, and warnings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Result
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.objectives import ROBUST, Objective
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.frontier.optimum import cost_of
from aimscale.analysis.laws.base import Array, Law
from aimscale.analysis.next.backtest import AUTO, choose, with_compute
from aimscale.analysis.next.buying import buy
from aimscale.analysis.table.names import CANONICAL, column_names
from aimscale.analysis.table.select import mixture_flags
from aimscale.analysis.words import Flag

COLLINEAR = 3.0
"""A design whose D/N varies by less than this factor hardly tells the exponents of N and D apart."""
RESAMPLES = 20
"""Bootstrap draws of the fit, over which the worth of runs is averaged."""
FAR = 30.0
"""A target further beyond everything that will be measured than this factor is warned about."""
SAME = 1.03
"""Sizes or budgets that differ by less than this factor count as one."""
WORTHWHILE = 0.9
"""Runs that leave more than this share of the forecast's standard deviation are hardly worth buying."""
MANY_VALUES = 15
"""More sizes or budgets than this are no grid, and are offered as so many in equal factors."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Proposal(Result):
    """Runs to buy next."""

    table: pd.DataFrame
    """One row per run, in the order of choice: the offer's columns (N, D, price...), the law's other variables, D/N."""
    law: Fit
    """The law that the worth of runs is computed with."""
    target: dict[str, float]
    """Variable -> value at the scale to forecast."""
    forecast: float
    """The law's loss there now."""
    budget: float
    """What may be spent, in units of the prices."""
    unit: str
    """Unit of prices and budget."""
    sd_before: float
    """Standard deviation of the log forecast now: law, departure from it, and noise of the runs."""
    sd_after: float
    """The same once the runs are measured."""
    flags: tuple[Flag, ...] = ()
    """What to look at before buying, the law's own flags included."""

    @property
    def price(self) -> float:
        """Of all runs together."""
        return float(self.table["price"].sum())

    def headline(self) -> str:
        """How many runs, what they cost and what they are worth."""
        before, after = (f"{100 * sd:.2g} %" for sd in (self.sd_before, self.sd_after))
        return (
            f"{len(self.table)} runs for {self.price:.3g} of {self.budget:.3g} {self.unit} bring the standard "
            f"deviation of the forecast at {_words(self.target)} from {before} to {after}"
        )

    def summary(self) -> str:
        """Headline, runs in order of choice, law and warnings."""
        shown = self.table.to_string(index=False, float_format=lambda v: f"{v:.4g}")
        law = f"By {self.law.law.formula} on {self.law.num_points} points, which forecasts {self.forecast:.4g} there."
        warnings = [f"Warning: {flag}" for flag in self.flags]
        return "\n".join([f"{self.headline()}.", "", shown, "", law, *warnings])


def propose(
    df: pd.DataFrame,
    target: Mapping[str, float],
    offer: pd.DataFrame,
    *,
    budget: float,
    unit: str = "GPU-hours",
    law: Law | str = AUTO,
    y: str = "val_loss",
    columns: Mapping[str, str] | None = None,
    objective: Objective | str = ROBUST,
) -> Proposal:
    """The runs on offer that leave the forecast at the target the least variance for the budget.

    Args:
        target: N, D (and U where the law has it) of the run to forecast.
        offer: candidates, with N, D, price and whatever names them; U where the law has it, else D.
        budget: what may be spent, in units of the prices.
        unit: its name.
        law: a law, its name, or "auto" (`choose`).
        columns: variable of the law -> column of df.

    Raises:
        AnalysisError: the target lacks a variable or names an unknown one, nothing is affordable, or the law cannot be
            fitted.
    """
    df = with_compute(df, columns)
    options: dict[str, Any] = {"y": y, "columns": columns, "objective": objective, "resamples": RESAMPLES}
    known = choose(law, df, **options).best if law == AUTO else fit(law, df, **options)
    place = place_of(target, known, df)
    offer = with_variables(offer.reset_index(drop=True), known, df)
    basket = buy(known, offer, offer["price"].to_numpy(float), place, budget=budget)
    table = offer.loc[basket.rows].reset_index(drop=True)
    table["D/N"] = table["D"] / table["N"]
    return Proposal(
        table=table,
        law=known,
        target={k: float(v) for k, v in target.items()},
        forecast=float(known.predict(place)["value"].iloc[0]),
        budget=budget,
        unit=unit,
        sd_before=basket.sd_before,
        sd_after=basket.sd_after,
        flags=(
            *([Flag(kind="buys_little")] if basket.sd_after > WORTHWHILE * basket.sd_before else []),
            *_warnings(known, table, target),
            *(Flag(kind="mixed", subject=each) for each in mixture_flags(df, known.law.variables)),
            *known.flags,
        ),
    )


def place_of(target: Mapping[str, float], law: Fit, df: pd.DataFrame) -> pd.DataFrame:
    """One row: a scale with every variable of the law (`with_variables`).

    Raises:
        AnalysisError: a variable is missing, or the scale names what is neither a variable nor a column.
    """
    for name in target:
        if not {name, CANONICAL.get(name, name)} & {*law.law.variables, *df.columns}:
            raise AnalysisError(
                f"The scale names {name}, which is neither a variable of {law.law.formula} nor a column of the table "
                f"({column_names(df)})."
            )
    return with_variables(pd.DataFrame([dict(target)]), law, df)


def with_variables(points: pd.DataFrame, law: Fit, df: pd.DataFrame) -> pd.DataFrame:
    """Points with every variable of the law: C by the table's own cost of N and D, U = D (fresh data).

    Raises:
        AnalysisError: N or D is missing, or another variable that nothing tells.
    """
    needed = law.law.variables
    for v in ("N", "D"):
        if v in needed and v not in points:
            raise AnalysisError(f"{law.law.formula} needs {v} of the target; give it as in --target N=1e9,D=1e10.")
    if "C" in needed and "C" not in points:
        data = law.variables(df.loc[law.data.index])
        cost = cost_of(*(data[v] for v in ("N", "D", "C")))
        points = points.assign(C=cost.kappa * points["N"] ** (1 + cost.s) * points["D"])
    if "U" in needed and "U" not in points:
        points = points.assign(U=points["D"])
    missing = [v for v in needed if v not in points]
    if missing:
        raise AnalysisError(f"{law.law.formula} needs {', '.join(missing)} of the target and of every run on offer.")
    return points


def _warnings(law: Fit, bought: pd.DataFrame, target: Mapping[str, float]) -> list[Flag]:
    """Fixed D/N, and a target far beyond everything that will be measured."""
    out = []
    if {"N", "D"} <= set(law.law.variables):
        ratio = np.concatenate([(law.data["D"] / law.data["N"]).to_numpy(), bought["D/N"].to_numpy()])
        if ratio.max() / ratio.min() < COLLINEAR:
            out.append(Flag(kind="one_ratio", subject="D/N", number=ratio.min(), more=(float(ratio.max()),)))
    for v in ("N", "D"):
        if v in target and v in law.data:
            largest = max(float(law.data[v].max()), float(bought[v].max()))
            if target[v] > FAR * largest:
                out.append(Flag(kind="far_target", subject=v, number=target[v] / largest))
    return out


def grid_offer(df: pd.DataFrame, target: Mapping[str, float], *, steps: int = 4) -> pd.DataFrame:
    """What a bare table suggests: its own N and D and steps from the largest towards the target, below it.

    Args:
        steps: values between the table's largest and the target's, in equal factors.

    Returns:
        N and D of every combination that is smaller than the target in N D and not in the table.

    Raises:
        AnalysisError: there is none.
    """
    axes = []
    for v in ("N", "D"):
        values = _distinct(df[v].to_numpy(float))
        if len(values) > MANY_VALUES:
            values = np.geomspace(values[0], values[-1], MANY_VALUES)
        if target[v] > values[-1]:
            values = np.append(values, np.geomspace(values[-1], target[v], steps + 2)[1:-1])
        axes.append(values)
    n, d = (a.ravel() for a in np.meshgrid(*axes, indexing="ij"))
    offer = pd.DataFrame({"N": n, "D": d})
    offer = offer[offer["N"] * offer["D"] < 0.999 * target["N"] * target["D"]]

    def cells(points: pd.DataFrame) -> list[tuple[int, int]]:
        places = (np.searchsorted(axis, points[v].to_numpy(float), "right") for v, axis in zip("ND", axes, strict=True))
        return list(zip(*places, strict=True))

    measured = set(cells(df))
    new = offer[np.array([cell not in measured for cell in cells(offer)], bool)].reset_index(drop=True)
    if new.empty:
        raise AnalysisError(
            f"No run smaller than {_words(target)} is left to buy: all that the table's sizes and budgets make are "
            "measured."
        )
    return new


def _distinct(values: Array) -> Array:
    """Sorted values without those that nearly repeat the one before, as rounded budgets do."""
    kept: list[float] = []
    for value in np.unique(values):
        if not kept or value > SAME * kept[-1]:
            kept.append(float(value))
    return np.array(kept)


def _words(target: Mapping[str, float]) -> str:
    return ", ".join(f"{k} = {v:.3g}" for k, v in target.items())
