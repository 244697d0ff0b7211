"""The forecast: laws weighted by how they predict the table's own larger runs, and errors that grow with distance.

Runs count in proportion to their compute, as in `fit(table, law, weights="compute", objective="log_lsq")`. Each law is
fitted to the runs below a half, a quarter ... of the table's compute and predicts the others; the mean of the laws is
weighted by how well. Its error is a sum of variances: of the noise of one run, of the parameters, of the laws about
their mean, and of a misfit that all of them share, which grows with ln distance at the rate at which the backtests
missed. Inside the table there is no misfit; beyond it all four overlap. The constants are those that public tables
speak for most, each family alike, narrowed until 95 % of the runs are inside (`tests/experiments/board.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from aimscale.analysis.display import Result, human, option, percent
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import half_width
from aimscale.analysis.fitting.estimate import held_out
from aimscale.analysis.fitting.held_out import HeldOut
from aimscale.analysis.fitting.inference import Estimate
from aimscale.analysis.fitting.result import Fit, times_beyond
from aimscale.analysis.forecasts.candidates import (
    AUTO,
    THROUGH,
    Cache,
    Fits,
    candidate_points,
    expect,
    fit_laws,
    link_of,
)
from aimscale.analysis.laws import Array, Law
from aimscale.analysis.table.points import Points
from aimscale.analysis.table.runs import Runs, Table
from aimscale.analysis.table.select import task_level

ERROR_RATE = "error rate"
"""Column that is forecast in the place of an accuracy, 1 - top1."""
CUTS = (2.0, 4.0, 8.0, 16.0, 32.0)
"""Backtests are fitted below the largest compute over these, and predict the rest."""
MIN_POINTS, MIN_VALUES, MIN_RANGE = 8, 3, 4.0
"""Points, values of each variable and factor in compute that a backtest needs to be fitted to."""
SHARPNESS, FLOOR = 4.0, 0.5
"""Weights fall with this power of a law's error in backtests, to which this share of the best one's is added."""
MARGIN, LEAST_CUTS = 0.9, 3
"""A law predicts better than another where its error is below this share of the other's in every backtest, of so
many at least."""
DOF = 6.0
"""Degrees of freedom of the errors: tables differ in more than their backtests show."""
UNTESTED = 2.0
"""Rate of misfit of a table that is too small for backtests, in units of the noise."""
OVERLAP = 4.0
"""Power of the distance with which noise, parameters and laws pass into the misfit: the best of 1, 2, 3 and 4."""
TERMS = ("noise", "parameters", "laws", "misfit")
"""Parts of the error."""
LEAST_ERROR = 1e-4
"""Error rate that an accuracy of 1 counts as: one image of ten thousand."""


class Calibration(NamedTuple):
    """Constants of a forecast's error, found on public tables (docs/forecasts.md)."""

    known: float
    """Share of the standard deviations of noise, parameters and laws, far beyond the table; 1 inside it."""
    misfit: float
    """Share of the rate at which backtests missed."""
    least: float
    """Rate of misfit per unit of ln distance where backtests missed nothing."""

    def share(self, distance: Array) -> Array:
        """Return the share of the standard deviations of noise, parameters and laws that counts at distances (m,)."""
        return np.sqrt(self.known**2 + (1 - self.known**2) / distance**OVERLAP)


LOSSES = Calibration(known=0.53, misfit=0.55, least=0.0005)
"""On 108 cuts of 36 tables in 14 families; with a family left out .49 to .60 and .47 to .59. The least rate is chosen:
the smallest at which 95 % are inside 100 to 1000 times beyond, too."""
ACCURACIES = Calibration(known=0.53, misfit=0.2, least=0.01)
"""Calibration of error rates, on 41 cuts in 4 families, too few to leave any out; intervals say that they hold 99 %."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Forecaster(Result):
    """Laws of one quantity of a table with their weights, and the errors of their mean."""

    points: Points = field(repr=False)
    """Losses or error rates at scales."""
    laws: tuple[Law, ...] = field(repr=False)
    """Candidates."""
    fits: Mapping[str, Fit] = field(repr=False)
    """Laws fitted to all points, of y or of the loss, in the order of the candidates."""
    link: Estimate | None = field(default=None, repr=False)
    """Sigmoid from the loss to the accuracy."""
    table: pd.DataFrame
    """One row a fit, the heaviest first: curve, num_params, weight, backtest_error, noise, reason why it is none."""
    backtests: pd.DataFrame
    """Root mean square of ln prediction - ln measurement: a row a cut of the table's compute, a column a fit."""
    misfit: float
    """Rate per ln distance at which the mean of the laws missed, the median of backtests; else `UNTESTED` noises."""

    @property
    def is_accuracy(self) -> bool:
        """Whether y are error rates, shown as accuracies."""
        return self.points.columns["y"] == ERROR_RATE

    @property
    def calibration(self) -> Calibration:
        """Constants of the error."""
        return ACCURACIES if self.is_accuracy else LOSSES

    @property
    def weights(self) -> pd.Series:
        """Weight of each curve, the largest first."""
        return self.table[self.table["reason"] == ""].set_index("curve")["weight"]

    @property
    def law(self) -> Law:
        """Law that predicts the table's own larger runs better than the first one in every backtest, else that."""
        best = next(law for law in self.laws if law.name == self.weights.index[0].removesuffix(THROUGH))
        return best if self.is_better(best.name, self.first.name) else self.first

    @property
    def first(self) -> Law:
        """Law that is taken unless another one is better."""
        return next(law for law in self.laws if {law.name, f"{law.name}{THROUGH}"} & {*self.fits})

    def is_better(self, name: str, than: str) -> bool:
        """Tell whether a law predicted better than another in every backtest, `LEAST_CUTS` at least, by `MARGIN`."""
        errors = self.backtests
        is_tested = len(errors) >= LEAST_CUTS and {name, than} <= {*errors}
        return is_tested and bool((errors[name] < MARGIN * errors[than]).all())

    def held_out(self, result: Fit, table: Table, *, by: str, num_values: int = 1) -> HeldOut:
        """Test a fit of the `law` on its largest scales, as `held_out` does; and say so where the runs that are left
        would not have chosen it."""
        test = held_out(result, table, by=by, num_values=num_values)
        if result.law.name == self.first.name:
            return test
        others = Runs(table).take(result.data.index.difference(test.predictions.index))
        chosen = forecaster(others, law=self.laws, y=result.columns["y"]).law
        return replace(test, is_chosen_here=chosen.name != result.law.name)

    @property
    def is_tested(self) -> bool:
        """Whether the table is large enough for a backtest."""
        return len(self.backtests) > 0

    def predict(self, at: Mapping[str, Array | float]) -> pd.DataFrame:
        """Forecast at scales (m,), accuracies between chance and 1.

        Returns:
            One row a scale: value; ci_lo, ci_hi of the curve and pi_lo, pi_hi of one measurement; distance;
            rival_lo, rival_hi, the lowest and highest law; and the standard deviations of ln y of each of `TERMS`.
        """
        x, weights = self.place(at), self.weights[list(self.fits)].to_numpy()
        expected = [expect(fit, x, link_of(name, self.link)) for name, fit in self.fits.items()]
        logs, spreads, noises = (np.array(each) for each in zip(*expected, strict=True))
        centre, distance, by = weights @ logs, distance_of(self.points, x), self.calibration
        share = by.share(distance)
        parts = {
            "noise": share * np.sqrt(weights @ noises**2),
            "parameters": share * (weights @ spreads),  # one table's laws err together
            "laws": share * np.sqrt(weights @ (logs - centre) ** 2),
            "misfit": (by.misfit * self.misfit + by.least) * np.log(distance),
        }
        variances = np.square([parts[name] for name in TERMS])
        ci, pi = (half_width(np.sqrt(each.sum(axis=0)), DOF) for each in (variances[1:], variances))
        moves = {"ci_lo": -ci, "ci_hi": ci, "pi_lo": -pi, "pi_hi": pi}
        with np.errstate(over="ignore"):
            value, lowest, highest = np.exp([centre, logs.min(axis=0), logs.max(axis=0)])
            out = {"value": value, "rival_lo": lowest, "rival_hi": highest}
            out |= {name: np.exp(centre + move) for name, move in moves.items()}
        if self.is_accuracy:  # ends as far on both sides: an error rate's logarithm has no end at 1
            out = {"value": 1 - value, "rival_lo": 1 - highest, "rival_hi": 1 - lowest}
            out |= {name: 1 - value + value * move for name, move in moves.items()}
            chance = task_level(self.points.rows.frame, "chance") or 0.0
            out = {name: np.clip(each, chance, 1) for name, each in out.items()}
        return pd.DataFrame({**out, "distance": distance, **parts})

    def place(self, at: Mapping[str, Array | float]) -> dict[str, Array]:
        """Give scales (m,) every variable of the laws: C by the table's own cost of N and D, U = D (new data)."""
        variables, cost = self.points.x, self.points.cost
        names = {*variables, "C", *(("N", "D", "U") if cost else ())}
        if unknown := [name for name in at if name not in names]:
            raise AnalysisError(f"The scale names {unknown[0]}, which is no variable; give {', '.join(sorted(names))}.")
        x = {v: np.atleast_1d(np.asarray(value, float)) for v, value in at.items()}
        if cost is not None and {"N", "D"} <= set(x):
            x = {"C": cost.flops(x["N"], x["D"]), **x}
        if "U" in variables and "D" in x:
            x = {"U": x["D"], **x}
        missing = [v for v in variables if v not in x]
        if missing := [v for v in missing if v != "C" or cost is None] or missing:  # N and D tell C
            example = ",".join(f"{v}=1e9" for v in missing)
            raise AnalysisError(f"The scale needs {' and '.join(missing)}, as in {example}.")
        return x

    def facts(self) -> list[tuple[str, str]]:
        """List which laws there are, and what they missed by in backtests."""
        off = "none: the table is too small to test laws on its own larger runs"
        if self.is_tested:
            num = len(self.backtests)
            off = f"typical error {percent(self.misfit)} per 2.7 times of extrapolation ({num} cut{'s' * (num > 1)})"
        num_runs = human(next(iter(self.fits.values())).estimate.num_runs)
        return [
            ("laws", ", ".join(f"{name} {percent(share)}" for name, share in self.weights.items() if share > 0.005)),
            ("runs", f"effective number {num_runs}: they are weighted by their compute"),
            ("backtests", off),
        ]

    def cells(self) -> list[dict[str, str]]:
        """Write a row a law: its weight and what it missed by, or why it takes no part."""
        return [
            {
                "law": row["curve"],
                "weight": percent(row["weight"]),
                "off in backtests": "" if np.isnan(row["backtest_error"]) else percent(row["backtest_error"], 3),
                "left out because": row["reason"],
            }
            for row in self.table.to_dict("records")
        ]


def forecaster(
    table: Table,
    *,
    law: Sequence[Law | str] | str = AUTO,
    y: str = "val_loss",
    cache: Cache | None = None,
    columns: Mapping[str, str] | None = None,
) -> Forecaster:
    """Weigh laws of a loss by how well each predicts a table's own larger runs from its smaller ones.

    Args:
        law: laws to try: "auto", "auto:C" for those of C alone, names with commas, or laws.
        y: column to forecast, a loss or another positive quantity that falls with scale.
        cache: where fits are left for accuracies of the same runs.
        columns: our name or a law's letter -> the name in the table, or a formula, as `read_table` takes them.

    Returns:
        The laws with their weights; `forecast` takes it in the place of `law`.

    Raises:
        AnalysisError: a column is missing, or no law can be fitted.

    Example:
        >>> table = read_table("results.parquet")
        >>> forecaster(table, law="chinchilla,coupled").predict({"N": 1e6, "D": 1e6})
    """
    points, laws = candidate_points(Runs(table, columns), law, y)
    return weigh(points, laws, partial(fit_laws, laws=laws, cache={} if cache is None else cache))


def accuracy_forecaster(
    probed: Runs, cache: Cache, *, law: Sequence[Law | str] | str = AUTO, loss: str = "val_loss"
) -> Forecaster:
    """Weigh laws of an accuracy's error rate, and links to it from the loss, of one probe on one task (`probe_frame`);
    fits of the same runs are taken from the cache, or left there."""
    errors = (1 - pd.to_numeric(probed["top1"], errors="coerce")).clip(lower=LEAST_ERROR)
    points, laws = candidate_points(probed.assign(**{ERROR_RATE: errors}), law, ERROR_RATE)
    losses = pd.to_numeric(points.rows[loss], errors="coerce") if loss in points.rows else pd.Series([0.0])
    return weigh(points, laws, partial(fit_laws, laws=laws, cache=cache, loss=loss if (losses > 0).all() else ""))


def distance_of(points: Points, places: Mapping[str, Array]) -> Array:
    """Return how many times beyond points places lie (m,), in compute or a variable, whichever is most; 1 inside."""
    values = {v: each for v, each in {**points.x, "C": points.compute}.items() if v in places and v != "U"}
    return times_beyond(places, {v: (each.min(), each.max()) for v, each in values.items()})


def weigh(points: Points, laws: tuple[Law, ...], fit: Callable[[Points], tuple[Fits, Estimate | None]]) -> Forecaster:
    """Weigh the laws that `fit` fits to points by backtests on the points themselves."""
    all_fits, link = fit(points)
    missing = {name: reason for name, reason in all_fits.items() if isinstance(reason, str)}
    fits = {name: each for name, each in all_fits.items() if not isinstance(each, str)}
    if not fits:
        name, reason = next(iter(missing.items()))
        few = f" Few rungs are forecast by their compute alone: {option('law', 'auto:C')}." * ("C" in points.numbers)
        raise AnalysisError(f"No law can be fitted to forecast with; {name}: {reason}{few}")
    misses = dict[float, tuple[pd.DataFrame, Array]]()
    for times in CUTS:
        below = points.compute <= points.compute.max() / times
        if _is_enough(points, below):
            part = points.take(below)
            x, log_y = {v: values[~below] for v, values in points.x.items()}, np.log(points.y[~below])
            tried, to_accuracy = fit(part)
            off = pd.DataFrame(
                {
                    name: expect(each, x, link_of(name, to_accuracy))[0] - log_y
                    for name in fits
                    if not isinstance(each := tried.get(name, ""), str)
                }
            )
            off = off[[name for name in off.columns if np.isfinite(off[name]).all()]]
            far = np.log(distance_of(part, {**x, "C": points.compute[~below]}))
            misses |= {times: (off, far)} if len(off.T) else {}
    backtests = pd.DataFrame({times: _rms(off) for times, (off, _) in misses.items()}, index=[*fits], dtype=float).T
    weights = _weights(backtests)
    rates = [_rms(off @ weights[off.columns] / weights[off.columns].sum()) / _rms(far) for off, far in misses.values()]
    largest = {v: values[[np.argmax(points.compute)]] for v, values in points.x.items()}
    links = {name: link_of(name, link) for name in fits}
    noises = {name: float(expect(each, largest, links[name])[2][0]) for name, each in fits.items()}
    more = {name: each.problem.num_free if each else 0 for name, each in links.items()}
    columns: dict[str, Mapping[str, Any] | pd.Series] = {
        "num_params": {name: len(each.law.parameters) + more[name] for name, each in fits.items()},
        "weight": weights,
        "backtest_error": backtests.median(),
        "noise": noises,
        "reason": dict.fromkeys(fits, "") | missing,
    }
    names = [*weights.sort_values(ascending=False, kind="stable").index, *missing]
    table = pd.DataFrame(columns, index=pd.Index(names, name="curve")).fillna({"weight": 0.0}).reset_index()
    misfit = float(np.median(rates) if rates else UNTESTED * _rms([*noises.values()]))
    return Forecaster(points=points, laws=laws, fits=fits, link=link, table=table, backtests=backtests, misfit=misfit)


def _is_enough(points: Points, below: Array) -> bool:
    """Tell whether points below a cut can be fitted, and any are left to predict."""
    if below.sum() < MIN_POINTS or below.all():
        return False
    scales = [values for v, values in points.x.items() if v != "U"]  # a pool may be one for all
    values = [len(np.unique(np.round(np.log(v[below]), 2))) for v in scales]
    return min(values) >= MIN_VALUES and np.ptp(np.log(points.compute[below])) >= np.log(MIN_RANGE)


def _weights(backtests: pd.DataFrame) -> pd.Series:
    """Weigh laws by the median of their errors in backtests; all alike without any. A law that a cut could not
    test counts there as the worst. Few cuts tell little, so the power grows with their number n as n / (n + 1)."""
    num_cuts = len(backtests)
    errors = backtests.T.fillna(backtests.max(axis=1)).median(axis=1) if num_cuts else pd.Series(1.0, backtests.columns)
    least = max(FLOOR * errors.min(), 1e-12)
    raw = (errors**2 + least**2) ** (-SHARPNESS / 2 * num_cuts / (num_cuts + 1))
    return raw / raw.sum()


def _rms(values: Array) -> Array:
    """Return the root mean square of an array, or of every column of a frame."""
    return np.sqrt(np.square(values).mean(axis=0))
