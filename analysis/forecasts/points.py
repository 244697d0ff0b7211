"""The points of a table that a forecast is made from, the laws that can be tried on them, and these fitted: laws of a
quantity, and laws of the loss with a link from there to an accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from aimscale.analysis.accuracy.links import task_level
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import KnownErrors, known_errors
from aimscale.analysis.fitting.groups import Groups, groups_of
from aimscale.analysis.fitting.inference import Estimate, estimated
from aimscale.analysis.fitting.problem import LOG_LSQ, LSQ, Objective, make_problem
from aimscale.analysis.laws.base import Array, Columns, Law
from aimscale.analysis.laws.catalogue import LINK_SIGMOID, find_law
from aimscale.analysis.optimum.frontier import Cost, cost_of
from aimscale.analysis.table.design import varies
from aimscale.analysis.table.names import Exclusion, no_column, our_name
from aimscale.analysis.table.points import REPEATS_FROM, resolve_columns, usable_rows, with_compute

AUTO = "auto"
"""Name that stands for several laws: the joint ones, or with `auto:C` those in one variable."""
JOINT = ("chinchilla", "overtrained", "coupled", "kaplan")
WITH_REPEATS = ("repeated", "penalised")
"""Further candidates where rows see pools of several sizes more than once: of one pool, repeats and D are alike."""
ONE_VARIABLE = ("power", "power_offset")
SPARE_POINTS = 2
"""Points that a law needs beyond its parameters, to tell its errors by."""
THROUGH = " through the loss"
"""End of the name of a curve that leads through the loss."""
LEAST, UNKNOWN_ERROR = 1e-6, 1e3
"""Smallest loss or error rate that a curve returns; its error, of its logarithm, where the law itself is nil."""
SLOPE_STEP = 1e-5
"""Difference of ln loss by which the sigmoid's slope is told."""


@dataclass(frozen=True, kw_only=True)
class Points:
    """Positive measurements at scales, such as losses or error rates, and the laws to fit to them."""

    x: Mapping[str, Array]
    """Variables of the laws -> values (n,)."""
    y: Array
    compute: Array
    """Training FLOPs (n,): what runs count by, and what distance is measured in."""
    is_accuracy: bool = False
    """Whether y are error rates, shown as accuracies."""
    loss: Array | None = None
    """Losses (n,) that a link leads from to an error rate."""
    chance: float | None = None
    """Accuracy of guessing, where the task has one."""
    ideal: float | None = None
    """Loss at which the accuracy is 1, where the task has one."""
    groups: Groups = field(default_factory=Groups)
    """Points that share errors."""
    known: KnownErrors | None = None
    """Errors of y that were found before, such as those of tuning."""
    laws: tuple[Law, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    """Variable (and y) -> column of the table."""
    exclusions: tuple[Exclusion, ...] = ()
    cost: Cost | None = None
    """Compute as a function of N and D; None where the table lacks one of them."""

    def rows(self, keep: Array) -> Points:
        """Select some of the points (mask)."""
        x, loss = {v: values[keep] for v, values in self.x.items()}, None if self.loss is None else self.loss[keep]
        known = self.known and replace(self.known, loadings=self.known.loadings[keep])
        groups, compute = self.groups.rows(keep), self.compute[keep]
        return replace(self, x=x, y=self.y[keep], compute=compute, loss=loss, groups=groups, known=known)

    def distance(self, places: Mapping[str, Array]) -> Array:
        """Return how many times beyond places lie (m,), in compute or a variable, whichever is most; 1 inside."""
        known = {v: values for v, values in {**self.x, "C": self.compute}.items() if v in places and v != "U"}
        return np.max([np.asarray(places[v], float) / values.max() for v, values in known.items()], axis=0, initial=1.0)

    def place(self, at: Mapping[str, Array | float]) -> dict[str, Array]:
        """Give scales (m,) every variable of the laws: C by the table's own cost of N and D, U = D (new data)."""
        known = {*self.x, "C", *(("N", "D", "U") if self.cost else ())}
        if unknown := [name for name in at if name not in known]:
            raise AnalysisError(f"The scale names {unknown[0]}, which is no variable; give {', '.join(sorted(known))}.")
        x = {v: np.atleast_1d(np.asarray(value, float)) for v, value in at.items()}
        if self.cost is not None and {"N", "D"} <= set(x):
            x = {"C": self.cost.flops(x["N"], x["D"]), **x}
        if "U" in self.x and "D" in x:
            x = {"U": x["D"], **x}
        missing = [v for v in self.x if v not in x]
        if missing := [v for v in missing if v != "C" or self.cost is None] or missing:  # N and D tell C
            example = ",".join(f"{v}=1e9" for v in missing)
            raise AnalysisError(f"The scale needs {' and '.join(missing)}, as in {example}.")
        return x


def candidates(laws: Sequence[Law | str] | str, df: pd.DataFrame) -> tuple[Law, ...]:
    """Find the laws that names stand for: several with commas, `auto` (joint laws) or `auto:N` (laws of N alone)."""
    if not isinstance(laws, str):
        return tuple(map(find_law, laws))
    base, _, variable = laws.partition(":")
    names = [f"{law}:{variable}" for law in ONE_VARIABLE] if variable else [*JOINT]
    pool, seen = (our_name(df, v) for v in ("U", "D"))
    if not variable and {pool, seen} <= {*df} and varies(df[pool]):
        numbers = df[[seen, pool]].apply(pd.to_numeric, errors="coerce")
        if (numbers[seen] / numbers[pool]).max() > REPEATS_FROM:
            names += WITH_REPEATS
    return tuple(find_law(name.strip()) for name in (names if base == AUTO else laws.split(",")))


def table_points(df: pd.DataFrame, laws: Sequence[Law | str] | str, y: str, loss: str = "") -> Points:
    """Collect the points of a table for these laws; of error rates y with the column of the loss."""
    df, y = with_compute(df), our_name(df, y)
    found = candidates(laws, df)
    if y not in df.columns:
        raise no_column(df, y, " to forecast")
    columns = {v: name for law in found for v, name in resolve_columns(law, df).items()}
    scales = {v: name for v in ("N", "D", "C") if (name := our_name(df, v)) in df}
    used = usable_rows(df, {**scales, **columns, "y": y}, best_by="y")
    numbers, rows = used.numbers, used.rows
    if numbers.empty:
        raise AnalysisError(f"No row of the table is complete with a positive {y}: there is nothing to forecast from.")
    x = {v: numbers[v].to_numpy() for v in columns}
    losses = pd.to_numeric(rows[loss], errors="coerce").to_numpy(float) if loss in rows else np.zeros(len(rows))
    return Points(
        x=x,
        y=numbers["y"].to_numpy(),
        compute=numbers["C"].to_numpy() if "C" in numbers else np.prod(list(x.values()), axis=0),
        is_accuracy=bool(loss),
        loss=losses if np.all(losses > 0) else None,
        chance=task_level(rows, "chance") if loss else None,
        ideal=task_level(rows, "ideal") if loss else None,
        groups=groups_of(rows, x),
        known=known_errors(rows, y),
        laws=found,
        columns={**columns, "y": y},
        exclusions=used.exclusions,
        cost=cost_of(numbers) if {"N", "D", "C"} <= {*numbers} else None,
    )


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A fitted law, or a law of the loss with a link to the accuracy."""

    law: Estimate
    link: Estimate | None = None
    """Sigmoid from the loss to the accuracy."""

    @property
    def num_params(self) -> int:
        """Number of parameters, of the link those that are free."""
        return len(self.law.problem.law.parameters) + (self.link.problem.num_free if self.link else 0)

    def predict(self, x: Mapping[str, Array]) -> tuple[Array, Array, Array]:
        """Return ln y (m,) at variables (m,), the standard error (m,) that the parameters leave, and the standard
        deviation (m,) of one measurement about the curve: of an accuracy by way of the loss, that of the loss too."""
        log_y, errors = self.law.modelled(x)
        noise = np.full(len(log_y), self.law.components.total)
        log_y, errors = np.maximum(log_y, np.log(LEAST)), np.nan_to_num(errors, nan=UNKNOWN_ERROR, posinf=UNKNOWN_ERROR)
        if self.link is None:
            return log_y, errors, noise
        accuracy, of_link = self.link.modelled({"L": np.exp(log_y)})
        slope = (self.link.value_of(self.link.law_at({"L": np.exp(log_y + SLOPE_STEP)})) - accuracy) / SLOPE_STEP
        rate = np.maximum(1 - accuracy, LEAST)
        both = (errors, of_link), (noise, self.link.components.total)
        return np.log(rate), *(np.hypot(slope * of_loss, own) / rate for of_loss, own in both)


Curves = dict[str, Curve | str]
"""Name -> the curve, or why it could not be fitted."""
Cache = dict[tuple[str, bytes], Curve | str]
"""Fits made so far, by the law's name and the points: accuracies need those of the loss again."""


def fit_curves(points: Points, cache: Cache) -> Curves:
    """Fit every law to y and, where there are losses, to these with a link from there; each once to the same points."""
    found = _fit_laws(points, cache)
    if points.loss is not None:
        of_loss = _fit_laws(replace(points, y=points.loss), cache)
        try:
            link = _link(points, points.loss)
            linked: Curves = {k: replace(c, link=link) for k, c in of_loss.items() if isinstance(c, Curve)}
        except AnalysisError as error:
            linked = dict.fromkeys(of_loss, str(error))
        found |= {f"{name}{THROUGH}": curve for name, curve in linked.items()}
    return found


def _fit_laws(points: Points, cache: Cache) -> Curves:
    """Fit every law by least squares of ln y."""
    key = np.concatenate([points.y, points.compute, *points.x.values(), *points.groups.values()]).tobytes()
    for law in points.laws:
        if (law.name, key) not in cache:
            try:
                cache[law.name, key] = Curve(law=_estimate(law, points, LOG_LSQ))
            except AnalysisError as error:
                cache[law.name, key] = str(error)
    return {law.name: cache[law.name, key] for law in points.laws}


def _link(points: Points, loss: Array) -> Estimate:
    """Fit a sigmoid from loss to accuracy, from chance and through one more point (ideal, 1) where these are known."""
    accuracy, compute, groups = 1 - points.y, points.compute, points.groups
    if points.ideal is not None and points.ideal < loss.min():
        loss, accuracy = np.append(loss, points.ideal), np.append(accuracy, 1.0)
        compute, groups = np.append(compute, compute.mean()), groups.with_one_more()
    points = replace(points, x={"L": loss}, y=accuracy, compute=compute, groups=groups, known=None)
    return _estimate(LINK_SIGMOID, points, LSQ, {} if points.chance is None else {"floor": points.chance})


def _estimate(law: Law, points: Points, objective: Objective, fixed: dict[str, float] | None = None) -> Estimate:
    """Fit a law, weighted by compute."""
    x, weights = Columns({v: points.x[v] for v in law.variables}), points.compute / points.compute.mean()
    problem = make_problem(law.centred(x), dict(x), points.y, objective, weights=weights, fixed=fixed)
    if problem.num_points < problem.num_free + SPARE_POINTS:
        raise AnalysisError(f"{problem.num_points} points are too few for its {problem.num_free} parameters.")
    return estimated(problem, points.groups, points.known)
