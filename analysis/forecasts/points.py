"""From a table to what a forecast is made from: which laws can be tried, and the measurements they are fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from aimscale.analysis.accuracy.links import task_level
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.groups import groups_of
from aimscale.analysis.forecasts.curves import THROUGH, Curve, Measurements, law_curve, link_curves
from aimscale.analysis.forecasts.stack import ACCURACIES, Fitter, Stack, half_widths, stacked
from aimscale.analysis.optimum.cost import Cost, cost_of
from aimscale.analysis.laws.base import Array, Law
from aimscale.analysis.laws.catalogue import find_law
from aimscale.analysis.table.design import varies
from aimscale.analysis.table.names import Exclusion, no_column, our_name
from aimscale.analysis.table.points import resolve_columns, usable_rows, with_compute

AUTO = "auto"
"""Name that stands for several laws: the joint ones, or with `auto:C` those in one variable."""
JOINT = ("chinchilla", "overtrained", "coupled", "kaplan")
WITH_REPEATS = ("repeated", "overfitting")
"""Further candidates where rows see pools of several sizes more than once: of one pool, repeats and D are alike."""
ONE_VARIABLE = ("power", "power_offset", "saturating")
ERROR = "error rate"
"""Column of 1 - accuracy."""
LEAST_ERROR = 1e-4
"""Error rate that an accuracy of 1 counts as: one image of ten thousand."""
Made = dict[tuple[str, bytes], Curve | str]
"""Fits made so far, or why one could not be: a law's name, and the points that it was fitted to."""
REPEATS_FROM = 1.01
"""Sights of an image on average above which repeats may matter."""


@dataclass(frozen=True, kw_only=True)
class Basis:
    """The points of a table that laws of the loss are fitted to."""

    laws: tuple[Law, ...]
    points: Measurements
    columns: dict[str, str]
    """Variable (and y) -> column of the table."""
    index: pd.Index = field(repr=False)
    """Labels of the table's rows (n,)."""
    exclusions: tuple[Exclusion, ...]
    cost: Cost | None
    """Compute as a function of N and D; None where the table lacks one of them."""

    @property
    def variables(self) -> tuple[str, ...]:
        """Of all laws, each once."""
        return tuple(dict.fromkeys(v for law in self.laws for v in law.variables))

    def place(self, at: Mapping[str, Array | float]) -> dict[str, Array]:
        """Scales (m,) with every variable of the laws: C by the table's own cost of N and D, U = D (new data).

        Raises:
            AnalysisError: a variable is missing and cannot be told, or one is named that no law and no column knows.
        """
        known = {*self.variables, "C", *(("N", "D", "U") if self.cost else ())}
        if unknown := [name for name in at if name not in known]:
            raise AnalysisError(f"The scale names {unknown[0]}, which is no variable; give {', '.join(sorted(known))}.")
        x = {v: np.atleast_1d(np.asarray(value, float)) for v, value in at.items()}
        if self.cost is not None and "C" not in x and {"N", "D"} <= set(x):
            x["C"] = self.cost.flops(x["N"], x["D"])
        if "U" in self.variables and "U" not in x and "D" in x:
            x["U"] = x["D"]
        missing = [v for v in self.variables if v not in x]
        if missing := [v for v in missing if v != "C" or self.cost is None] or missing:  # N and D tell C
            raise AnalysisError(
                f"The scale needs {' and '.join(missing)}, as in {','.join(f'{v}=1e9' for v in missing)}."
            )
        return x


def candidates(laws: Sequence[Law | str] | str, df: pd.DataFrame) -> list[Law]:
    """The laws that a name, several, `auto` (joint laws) or `auto:N` (laws of N alone) stand for on this table.

    Raises:
        AnalysisError: an unknown name.
    """
    if not isinstance(laws, str):
        return [find_law(each) for each in laws]
    base, _, variable = laws.partition(":")
    if base != AUTO:
        return [find_law(name.strip()) for name in laws.split(",")]
    if variable:
        return [find_law(f"{law}:{variable}") for law in ONE_VARIABLE]
    unique, seen = (_column(df, v) for v in ("U", "D"))
    names: tuple[str, ...] = JOINT
    if unique is not None and seen is not None and varies(df[unique]):
        pools, images = (pd.to_numeric(df[name], errors="coerce") for name in (unique, seen))
        names += WITH_REPEATS if (images / pools > REPEATS_FROM).any() else ()
    return [find_law(law) for law in names]


def basis(df: pd.DataFrame, laws: Sequence[Law | str] | str, y: str) -> Basis:
    """The usable rows of a table, for these laws.

    Raises:
        AnalysisError: a column is missing, no row is usable, or the laws are of different variables than the table.
    """
    df = with_compute(df)
    found = tuple(candidates(laws, df))
    if y not in df.columns:
        raise no_column(df, y, " to forecast")
    names: dict[str, str] = {}
    for law in found:
        names |= resolve_columns(law, df)
    extra = {v: name for v in ("N", "D", "C") if (name := _column(df, v)) is not None}
    used = usable_rows(df, {**extra, **names, "y": y}, best_by="y")
    numbers = used.numbers
    if numbers.empty:
        raise AnalysisError(
            f"No row of the table is complete with a positive {y}, so there is nothing to forecast from."
        )
    x = {v: numbers[v].to_numpy() for v in names}
    compute = numbers["C"].to_numpy() if "C" in numbers else np.prod(list(x.values()), axis=0)
    cost = cost_of(numbers) if {"N", "D", "C"} <= set(numbers) else None
    return Basis(
        laws=found,
        points=Measurements(x=x, y=numbers["y"].to_numpy(), compute=compute, groups=groups_of(used.rows, x)),
        columns={**names, "y": y},
        index=numbers.index,
        exclusions=used.exclusions,
        cost=cost,
    )


@dataclass(frozen=True, kw_only=True)
class Forecaster:
    """What forecasts one quantity of a table."""

    basis: Basis
    stack: Stack
    is_accuracy: bool = False
    """Whether error rates are forecast, and shown as accuracies."""
    made: Made = field(default_factory=dict, repr=False)
    """Its laws' fits, which accuracies of the same runs need again."""

    def predict(self, at: Mapping[str, Array | float]) -> pd.DataFrame:
        """The forecast at scales (see `Stack.predict`), accuracies between 0 and 1.

        Raises:
            AnalysisError: a variable is missing or unknown (`Basis.place`).
        """
        rows = self.stack.predict(self.basis.place(at))
        return as_accuracy(rows, self.basis.points.chance or 0.0) if self.is_accuracy else rows

    @property
    def is_usual(self) -> bool:
        """Whether the laws are those that the record on public tables is of."""
        return set(JOINT) <= {law.name for law in self.basis.laws}

    @property
    def law(self) -> Law:
        """The law that predicts the table's own larger runs better than the first one in every backtest, else that."""
        best = next(law for law in self.basis.laws if law.name == self.stack.best.removesuffix(THROUGH))
        fitted = [law for law in self.basis.laws if law.name in self.stack.curves]
        return best if not fitted or self.stack.is_better(best.name, fitted[0].name) else fitted[0]


def forecaster(df: pd.DataFrame, *, law: Sequence[Law | str] | str = AUTO, y: str = "val_loss") -> Forecaster:
    """Laws of a loss, weighted by how well each predicts a table's own larger runs from its smaller ones.

    Args:
        law: laws to try: "auto", "auto:C" for those of C alone, names with commas, or laws.
        y: column to forecast, a loss or another positive quantity that falls with scale.

    Returns:
        The laws with their weights; `forecast` takes it in the place of `law`.

    Raises:
        AnalysisError: a column is missing, or no law can be fitted.

    Example:
        >>> table = read_table("results.parquet")
        >>> forecaster(table, law="chinchilla,coupled").predict({"N": 1e6, "D": 1e6})
    """
    found, made = basis(df, law, y), Made()
    return Forecaster(basis=found, stack=stacked(found.points, fitter(found.laws, made)), made=made)


def accuracy_forecaster(
    probed: pd.DataFrame, *, law: Sequence[Law | str] | str = AUTO, loss: str = "val_loss", made: Made | None = None
) -> Forecaster:
    """Laws of an accuracy's error rate, and links to it from the loss, weighted alike.

    Args:
        probed: rows of one probe on one task, as `probe_frame` gives them.
        made: fits of the loss, and of other probes of the same runs; this one leaves its own there.

    Raises:
        AnalysisError: as `forecaster`.
    """
    errors = (1 - pd.to_numeric(probed["top1"], errors="coerce")).clip(lower=LEAST_ERROR)
    found = basis(probed.assign(**{ERROR: errors}), law, ERROR)
    rows = probed.loc[found.index]
    losses = pd.to_numeric(rows[loss], errors="coerce").to_numpy(float) if loss in rows else None
    usable = losses is not None and bool(np.all(losses > 0))
    chance, ideal = (task_level(rows, name) for name in ("chance", "ideal"))
    points = replace(found.points, loss=losses if usable else None, chance=chance, ideal=ideal)
    made = Made() if made is None else made
    stack = stacked(points, fitter(found.laws, made), ACCURACIES)
    return Forecaster(basis=replace(found, points=points), stack=stack, is_accuracy=True, made=made)


def as_accuracy(rows: pd.DataFrame, chance: float) -> pd.DataFrame:
    """Turn forecasts of an error rate into those of the accuracy, between chance and 1.

    Ends lie as far from the accuracy on both sides: an error rate's logarithm has no end at 1.
    """
    rate, halves = rows["value"], half_widths(rows)
    ends = {
        f"{name}_{end}": (1 - rate + sign * rate * half).clip(chance, 1)
        for name, half in halves.items()
        for end, sign in (("lo", -1), ("hi", 1))
    }
    rivals = {"rival_lo": (1 - rows["rival_hi"]).clip(chance, 1), "rival_hi": (1 - rows["rival_lo"]).clip(chance, 1)}
    return rows.assign(value=(1 - rate).clip(chance, 1), **ends, **rivals)


def fitter(laws: Sequence[Law], made: Made) -> Fitter:
    """Fits laws to y, and where there are losses to these, with a link from there; each law once to the same points."""

    def fitted(points: Measurements) -> dict[str, Curve | str]:
        key = np.concatenate([points.y, points.compute, *points.x.values(), *points.groups.named.values()]).tobytes()
        for law in laws:
            if (law.name, key) not in made:
                try:
                    made[law.name, key] = law_curve(law, points)
                except AnalysisError as error:
                    made[law.name, key] = str(error)
        return {law.name: made[law.name, key] for law in laws}

    def curves(points: Measurements) -> dict[str, Curve | str]:
        found = fitted(points)
        if points.loss is not None:
            first = fitted(replace(points, y=points.loss, loss=None))
            known = {name: curve for name, curve in first.items() if isinstance(curve, Curve)}
            try:
                found |= link_curves(known, points)
            except AnalysisError as error:
                found |= {f"{name}{THROUGH}": str(error) for name in first}
        return found

    return curves


def _column(df: pd.DataFrame, variable: str) -> str | None:
    """The table's column of a variable, if it has one."""
    name = our_name(df, variable)
    return name if name in df.columns else None
