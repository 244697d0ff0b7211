"""The forecast: laws weighted by how they predict the table's own larger runs, and errors that grow with distance.

Runs count in proportion to their compute, as in `fit(table, law, weights="compute", objective="log_lsq")`. Each law is
fitted to the runs below a half, a quarter ... of the table's compute and predicts the others; the mean of the laws is
weighted by how well. Its error is a sum of variances: of the noise of one run, of the parameters, of the laws about
their mean, and of a misfit that all of them share, which grows with ln distance at the rate at which the backtests
missed. Inside the table there is no misfit; beyond it all four overlap. The constants are those that public tables
speak for most, each family alike (`tests/experiments/board.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd

from aimscale.analysis.display import Result
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import half_width
from aimscale.analysis.forecasts.points import AUTO, THROUGH, Cache, Curve, Curves, Points, fit_curves, table_points
from aimscale.analysis.laws.base import Array, Law
from aimscale.analysis.words import human, percent

CUTS = (2.0, 4.0, 8.0, 16.0, 32.0)
"""Backtests are fitted below the largest compute over these, and predict the rest."""
MIN_POINTS, MIN_VALUES, MIN_RANGE = 8, 3, 4.0
"""Points, values of each variable and factor in compute that a backtest needs to be fitted to."""
SHARPNESS, FLOOR = 4.0, 0.5
"""Weights fall with this power of a curve's error in backtests, to which this share of the best one's is added."""
MARGIN = 0.9
"""A law predicts better than another where its error is below this share of the other's in every backtest."""
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


LOSSES = Calibration(known=0.53, misfit=0.43, least=0.0028)
"""On 108 cuts of 36 tables in 14 families; refitted they are .52, .43, .0029, and with a family left out .40 to .59,
.38 to .50, .0021 to .0034. The lowest share is without a family whose only run beyond 1/3 lies 6 % off."""
ACCURACIES = Calibration(known=0.53, misfit=0.2, least=0.01)
"""Calibration of error rates: known as of losses, the others on 41 cuts in 4 families, too few to leave any out."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Forecaster(Result):
    """Laws of one quantity of a table with their weights, and the errors of their mean."""

    points: Points = field(repr=False)
    curves: Mapping[str, Curve] = field(repr=False)
    """Laws fitted to all points, in the order of the candidates."""
    table: pd.DataFrame
    """One row a curve, the heaviest first: curve, num_params, weight, backtest_error, noise, reason why it is none."""
    backtests: pd.DataFrame
    """Root mean square of ln prediction - ln measurement: a row a cut of the table's compute, a column a curve."""
    misfit: float
    """Rate per ln distance at which the mean of the laws missed, the median of backtests; else `UNTESTED` noises."""

    @property
    def calibration(self) -> Calibration:
        """Constants of the error."""
        return ACCURACIES if self.points.is_accuracy else LOSSES

    @property
    def weights(self) -> pd.Series:
        """Weight of each curve, the largest first."""
        return self.table[self.table["reason"] == ""].set_index("curve")["weight"]

    @property
    def law(self) -> Law:
        """Law that predicts the table's own larger runs better than the first one in every backtest, else that."""
        best = next(law for law in self.points.laws if law.name == self.weights.index[0].removesuffix(THROUGH))
        first = next((law for law in self.points.laws if law.name in self.curves), best)
        return best if self.is_better(best.name, first.name) else first

    def is_better(self, name: str, than: str) -> bool:
        """Tell whether a curve predicted better than another in every backtest, by `MARGIN`."""
        errors = self.backtests
        return self.is_tested and {name, than} <= {*errors} and bool((errors[name] < MARGIN * errors[than]).all())

    @property
    def is_tested(self) -> bool:
        """Whether the table is large enough for a backtest."""
        return len(self.backtests) > 0

    def predict(self, at: Mapping[str, Array | float]) -> pd.DataFrame:
        """Forecast at scales (m,), accuracies between chance and 1.

        Returns:
            One row a scale: value; ci_lo, ci_hi of the curve and pi_lo, pi_hi of one measurement (95 %); distance;
            rival_lo, rival_hi, the lowest and highest curve; and the standard deviations of ln y of each of `TERMS`.
        """
        x, weights = self.points.place(at), self.weights[list(self.curves)].to_numpy()
        predicted = [curve.predict(x) for curve in self.curves.values()]
        logs, spreads, noises = (np.array(each) for each in zip(*predicted, strict=True))
        centre, distance, by = weights @ logs, self.points.distance(x), self.calibration
        share = by.share(distance)
        parts = {
            "noise": share * np.sqrt(weights @ noises**2),
            "parameters": share * (weights @ spreads),  # one table's curves err together
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
        if self.points.is_accuracy:  # ends as far on both sides: an error rate's logarithm has no end at 1
            out = {"value": 1 - value, "rival_lo": 1 - highest, "rival_hi": 1 - lowest}
            out |= {name: 1 - value + value * move for name, move in moves.items()}
            out = {name: np.clip(each, self.points.chance or 0.0, 1) for name, each in out.items()}
        return pd.DataFrame({**out, "distance": distance, **parts})

    def facts(self) -> list[tuple[str, str]]:
        """List which curves there are, and what they missed by in backtests."""
        off = "none: the table is too small to test laws on its own larger runs"
        if self.is_tested:
            cuts = " and ".join(f"1/{times:.0f}" for times in self.backtests.index)
            off = f"{percent(self.misfit)} off per factor e beyond, fitted below {cuts} of the table's compute"
        num_runs = human(next(iter(self.curves.values())).law.num_runs)
        return [
            ("laws", ", ".join(f"{name} {percent(share)}" for name, share in self.weights.items() if share > 0.005)),
            ("runs", f"as many as {num_runs} that count alike: they are weighted by their compute"),
            ("backtests", off),
        ]

    def cells(self) -> list[dict[str, str]]:
        """Write a row a curve: its weight and what it missed by, or why it takes no part."""
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
    df: pd.DataFrame, *, law: Sequence[Law | str] | str = AUTO, y: str = "val_loss", cache: Cache | None = None
) -> Forecaster:
    """Weigh laws of a loss by how well each predicts a table's own larger runs from its smaller ones.

    Args:
        law: laws to try: "auto", "auto:C" for those of C alone, names with commas, or laws.
        y: column to forecast, a loss or another positive quantity that falls with scale.
        cache: where fits are left for accuracies of the same runs.

    Returns:
        The laws with their weights; `forecast` takes it in the place of `law`.

    Raises:
        AnalysisError: a column is missing, or no law can be fitted.

    Example:
        >>> table = read_table("results.parquet")
        >>> forecaster(table, law="chinchilla,coupled").predict({"N": 1e6, "D": 1e6})
    """
    return weigh(table_points(df, law, y), {} if cache is None else cache)


def accuracy_forecaster(
    probed: pd.DataFrame, cache: Cache, *, law: Sequence[Law | str] | str = AUTO, loss: str = "val_loss"
) -> Forecaster:
    """Weigh laws of an accuracy's error rate, and links to it from the loss, of one probe on one task (`probe_frame`);
    fits of the same runs are taken from the cache, or left there."""
    errors = (1 - pd.to_numeric(probed["top1"], errors="coerce")).clip(lower=LEAST_ERROR)
    return weigh(table_points(probed.assign(**{"error rate": errors}), law, "error rate", loss), cache)


def weigh(points: Points, cache: Cache, fit: Callable[[Points, Cache], Curves] = fit_curves) -> Forecaster:
    """Weigh curves by backtests on the points themselves."""
    found = fit(points, cache)
    missing = {name: why for name, why in found.items() if isinstance(why, str)}
    curves = {name: curve for name, curve in found.items() if not isinstance(curve, str)}
    if not curves:
        name, why = next(iter(missing.items()))
        raise AnalysisError(f"No law can be fitted to forecast with; {name}: {why}")
    misses = dict[float, tuple[pd.DataFrame, Array]]()
    for times in CUTS:
        below = points.compute <= points.compute.max() / times
        if _is_enough(points, below):
            known, test = points.rows(below), points.rows(~below)
            tried = {name: curve for name, curve in fit(known, cache).items() if not isinstance(curve, str)}
            off = pd.DataFrame(
                {name: tried[name].predict(test.x)[0] - np.log(test.y) for name in curves if name in tried}
            )
            off = off[[name for name in off.columns if np.isfinite(off[name]).all()]]
            misses |= {times: (off, np.log(known.distance({**test.x, "C": test.compute})))} if len(off.T) else {}
    backtests = pd.DataFrame({times: _rms(off) for times, (off, _) in misses.items()}, index=[*curves], dtype=float).T
    weights = _weights(backtests)
    rates = [_rms(off @ weights[off.columns] / weights[off.columns].sum()) / _rms(far) for off, far in misses.values()]
    largest = {v: values[[np.argmax(points.compute)]] for v, values in points.x.items()}
    noises = {name: float(curve.predict(largest)[2][0]) for name, curve in curves.items()}
    columns = {"num_params": {name: curve.num_params for name, curve in curves.items()}, "weight": weights}
    columns |= {"backtest_error": backtests.median(), "noise": noises}
    columns |= {"reason": dict.fromkeys(curves, "") | missing}
    names = [*weights.sort_values(ascending=False, kind="stable").index, *missing]
    table = pd.DataFrame(columns, index=pd.Index(names, name="curve")).fillna({"weight": 0.0})
    misfit = float(np.median(rates) if rates else UNTESTED * _rms([*noises.values()]))
    return Forecaster(points=points, curves=curves, table=table.reset_index(), backtests=backtests, misfit=misfit)


def _is_enough(points: Points, below: Array) -> bool:
    """Tell whether points below a cut can be fitted, and any are left to predict."""
    if below.sum() < MIN_POINTS or below.all():
        return False
    scales = [values for v, values in points.x.items() if v != "U"]  # a pool may be one for all
    values = [len(np.unique(np.round(np.log(v[below]), 2))) for v in scales]
    return min(values) >= MIN_VALUES and np.ptp(np.log(points.compute[below])) >= np.log(MIN_RANGE)


def _weights(backtests: pd.DataFrame) -> pd.Series:
    """Weigh curves by the median of their errors in backtests; all alike without any. A curve that a cut could not
    test counts there as the worst. Few cuts tell little, so the power grows with their number n as n / (n + 1)."""
    num_cuts = len(backtests)
    errors = backtests.T.fillna(backtests.max(axis=1)).median(axis=1) if num_cuts else pd.Series(1.0, backtests.columns)
    least = max(FLOOR * errors.min(), 1e-12)
    raw = (errors**2 + least**2) ** (-SHARPNESS / 2 * num_cuts / (num_cuts + 1))
    return raw / raw.sum()


def _rms(values: Array) -> Array:
    """Return the root mean square of an array, or of every column of a frame."""
    return np.sqrt(np.square(values).mean(axis=0))
