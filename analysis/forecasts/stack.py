"""The forecast: laws weighted by how they predict the table's own larger runs, and errors that grow with distance.

Each law is fitted to the runs below a half, a quarter ... of the table's compute and predicts the others; the mean of
the laws is weighted by how well. Its error is a sum of variances: of the noise of one run, of the parameters, of the
laws about their mean, and of a misfit that all of them share. The misfit grows with ln distance, at the rate at which
the backtests missed, each over its own distance: on public tables what laws miss grows so, and a root grows too slowly.
The constants are those that the losses of public tables speak for most, each family alike
(`tests/experiments/board.py`, which also leaves every family out in turn).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.stats import t as student

from aimscale.analysis.display import Result
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.inference import CONFIDENCE
from aimscale.analysis.forecasts.curves import Curve, Measurements
from aimscale.analysis.laws.base import Array
from aimscale.analysis.words import human, percent

CUTS = (2.0, 4.0, 8.0, 16.0, 32.0)
"""Backtests are fitted below the largest compute over these, and predict the rest."""
MIN_POINTS, MIN_VALUES, MIN_RANGE = 8, 3, 4.0
"""Points, values of each variable and factor in compute that a backtest needs to be fitted to."""
SHARPNESS, FLOOR = 4.0, 0.5
"""Weights fall with this power of a curve's error in backtests, half the best one's added to it: of powers of 2, 3, 4
and 6 none forecast public tables clearly better."""
MARGIN = 0.9
"""A law predicts better than another where its error is below this share of the other's in every backtest."""
DOF = 6.0
"""Degrees of freedom of the errors: tables differ in more than their backtests show."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Constants of a forecast's error, found on public tables (docs/forecasts.md)."""

    known: float
    """Share of the standard deviations of noise, parameters and laws, which overlap."""
    misfit: float
    """Share of the rate at which backtests missed."""
    least: float
    """Rate of misfit per unit of ln distance where backtests missed nothing."""


LOSSES = Calibration(known=0.58, misfit=0.41, least=0.0028)
"""On 108 cuts of 36 tables in 14 families; with a family left out: .54 to .63, .35 to .49, .002 to .0033."""
ACCURACIES = Calibration(known=0.54, misfit=0.2, least=0.01)
"""Constants for error rates, on 41 cuts in 4 families, too few to leave any out."""
UNTESTED = 2.0
"""Rate of misfit of a table that is too small for backtests, in units of the noise."""
TERMS = ("noise", "parameters", "laws", "misfit")
"""Parts of the error."""

Fitter = Callable[[Measurements], dict[str, "Curve | str"]]
"""Curves by name fitted to points, or why one could not be."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Stack(Result):
    """Curves with weights, and their errors."""

    curves: Mapping[str, Curve] = field(repr=False)
    """Fitted to all points, in the order of the candidates."""
    weights: Mapping[str, float]
    """Weight of each curve; they sum to 1."""
    backtests: pd.DataFrame
    """One row a backtest and curve: times (the compute left out reaches so far), num_train, num_test, curve, error
    (root mean square of ln prediction - ln measurement)."""
    missing: Mapping[str, str]
    """Curve -> why it takes no part."""
    misfit: float
    """Rate at which the mean of the laws missed in its backtests, per unit of ln distance: the median of their root
    mean squares; `UNTESTED` noises without any."""
    calibration: Calibration
    """Constants of the error."""
    largest: Mapping[str, float]
    """Largest value of each variable, and of compute."""

    @property
    def best(self) -> str:
        """The curve with the largest weight."""
        return max(self.weights, key=self.weights.__getitem__)

    def is_better(self, name: str, than: str) -> bool:
        """Tell whether a curve predicted better than another in every backtest, by `MARGIN`."""
        errors = self.backtests.pivot_table(index="times", columns="curve", values="error")
        if not {name, than} <= {*errors}:
            return False
        return bool((errors[name] < MARGIN * errors[than]).all())

    @property
    def num_runs(self) -> float:
        """Effective number of points behind the fits, which are weighted by compute."""
        return next(iter(self.curves.values())).num_runs

    @property
    def is_tested(self) -> bool:
        """Whether the table is large enough for a backtest."""
        return len(self.backtests) > 0

    @property
    def table(self) -> pd.DataFrame:
        """One row a curve, the heaviest first: curve, num_params, weight, backtest_error, noise, reason."""
        tested = self.backtests.groupby("curve")["error"] if self.is_tested else None
        errors = {} if tested is None else tested.median().to_dict()
        rows = [
            {
                "curve": name,
                "num_params": curve.num_params,
                "weight": self.weights[name],
                "backtest_error": errors.get(name, np.nan),
                "noise": curve.noise,
                "reason": "",
            }
            for name, curve in self.curves.items()
        ]
        table = pd.DataFrame(rows).sort_values("weight", ascending=False, ignore_index=True)
        lost = [{"curve": name, "weight": 0.0, "reason": why} for name, why in self.missing.items()]
        return pd.concat([table, pd.DataFrame(lost)], ignore_index=True) if lost else table

    def distance(self, places: Mapping[str, Array]) -> Array:
        """How many times beyond the table places lie (m,), in compute or a variable, whichever is most; 1 inside."""
        return _distance(places, self.largest)

    def predict(self, places: Mapping[str, Array]) -> pd.DataFrame:
        """The forecast at places.

        Args:
            places: the variables and compute (C) by name (m,).

        Returns:
            One row a place: value; ci_lo, ci_hi of the curve and pi_lo, pi_hi of one measurement (95 %); distance;
            rival_lo, rival_hi, the lowest and highest curve; and the standard deviations of ln y of each of `TERMS`.
        """
        x = {v: np.atleast_1d(np.asarray(values, float)) for v, values in places.items()}
        share = np.array([self.weights[name] for name in self.curves])
        logs, spreads = (
            np.array(each) for each in zip(*(curve.predict(x) for curve in self.curves.values()), strict=True)
        )
        centre, far = share @ logs, self.distance(x)
        parts = {
            "noise": np.full(len(centre), np.sqrt(share @ np.array([c.noise**2 for c in self.curves.values()]))),
            "parameters": share @ spreads,  # one table's curves err together
            "laws": np.sqrt(share @ (logs - centre) ** 2),
        }
        parts = {name: self.calibration.known * part for name, part in parts.items()}
        parts["misfit"] = (self.calibration.misfit * self.misfit + self.calibration.least) * np.log(far)
        halves = half_widths(pd.DataFrame(parts))
        ends = {f"{name}_{end}": sign * half for name, half in halves.items() for end, sign in (("lo", -1), ("hi", 1))}
        rivals = {"rival_lo": np.exp(logs.min(axis=0)), "rival_hi": np.exp(logs.max(axis=0))}
        with np.errstate(over="ignore"):
            out = {"value": np.exp(centre), **{name: np.exp(centre + by) for name, by in ends.items()}}
        return pd.DataFrame({**out, "distance": far, **rivals, **parts})

    def facts(self) -> list[tuple[str, str]]:
        """Which curves, and what they missed by in backtests."""
        shown = self.table[self.table["weight"] > 0.005]
        pairs = zip(shown["curve"], shown["weight"], strict=True)
        laws = ("laws", ", ".join(f"{name} {percent(weight)}" for name, weight in pairs))
        runs = ("runs", f"as many as {human(self.num_runs)} that count alike: they are weighted by their compute")
        if not self.is_tested:
            return [laws, runs, ("backtests", "none: the table is too small to test laws on its own larger runs")]
        cuts = " and ".join(f"1/{times:.0f}" for times in sorted(self.backtests["times"].unique()))
        off = f"{percent(self.misfit)} off per factor e beyond, fitted below {cuts} of the table's compute"
        return [laws, runs, ("backtests", off)]

    def headline(self) -> str:
        """Which curves, and what they missed by in backtests."""
        return "; ".join(map(": ".join, self.facts()))

    def cells(self) -> list[dict[str, str]]:
        """A row a curve: its weight and what it missed by, or why it takes no part."""
        return [
            {
                "law": row["curve"],
                "weight": percent(row["weight"]),
                "off in backtests": "" if np.isnan(row["backtest_error"]) else percent(row["backtest_error"], 3),
                "left out because": row["reason"],
            }
            for row in self.table.to_dict("records")
        ]


def stacked(points: Measurements, fitter: Fitter, calibration: Calibration = LOSSES) -> Stack:
    """Weigh curves by backtests on the points themselves.

    Raises:
        AnalysisError: no curve can be fitted.
    """
    found = fitter(points)
    curves = {name: curve for name, curve in found.items() if isinstance(curve, Curve)}
    missing = {name: why for name, why in found.items() if isinstance(why, str)}
    if not curves:
        name, why = next(iter(missing.items()))
        raise AnalysisError(f"No law can be fitted to forecast with; {name}: {why}")
    rows, misses = [], list[tuple[dict[str, Array], Array]]()
    for times in CUTS:
        below = points.compute <= points.compute.max() / times
        if not _is_enough(points, below):
            continue
        test = points.rows(~below)
        fitted = {k: c for k, c in fitter(points.rows(below)).items() if isinstance(c, Curve) and k in curves}
        off = {name: curve.predict(test.x)[0] - np.log(test.y) for name, curve in fitted.items()}
        off = {name: miss for name, miss in off.items() if np.isfinite(miss).all()}
        counts = {"times": times, "num_train": int(below.sum()), "num_test": len(test.y)}
        rows += [{**counts, "curve": name, "error": _rms(miss)} for name, miss in off.items()]
        misses.append((off, np.log(_distance({**test.x, "C": test.compute}, _largest(points.rows(below))))))
    backtests = pd.DataFrame(rows, columns=["times", "num_train", "num_test", "curve", "error"])
    weights = _weights(list(curves), backtests)
    rates = [_rms(_mean(off, weights)) / _rms(far) for off, far in misses if off]
    noise = _rms([curve.noise for curve in curves.values()])
    return Stack(
        curves=curves,
        weights=weights,
        backtests=backtests,
        missing=missing,
        misfit=float(np.median(rates)) if rates else UNTESTED * noise,
        calibration=calibration,
        largest=_largest(points),
    )


def half_widths(parts: pd.DataFrame) -> dict[str, Array]:
    """Half-widths of 95 % intervals of ln y, of the curve (ci) and one measurement (pi), from the `TERMS` of rows."""
    reach, variances = student.ppf(0.5 + CONFIDENCE / 2, DOF), np.square(parts[list(TERMS)].to_numpy(float))
    return {"ci": reach * np.sqrt(variances[:, 1:].sum(axis=1)), "pi": reach * np.sqrt(variances.sum(axis=1))}


def _largest(points: Measurements) -> dict[str, float]:
    """Largest value of each variable and of compute; a pool of images is no scale to go beyond."""
    return {v: float(values.max()) for v, values in {**points.x, "C": points.compute}.items() if v != "U"}


def _distance(places: Mapping[str, Array], largest: Mapping[str, float]) -> Array:
    """How many times beyond places lie (m,), in compute or a variable, whichever is most; 1 inside."""
    factors = [np.asarray(places[v], float) / top for v, top in largest.items() if v in places]
    return np.maximum(1.0, np.max(factors, axis=0))


def _is_enough(points: Measurements, below: Array) -> bool:
    """Whether points below a cut can be fitted, and any are left to predict."""
    if below.sum() < MIN_POINTS or below.all():
        return False
    scales = [values for v, values in points.x.items() if v != "U"]  # a pool may be one for all
    values = [len(np.unique(np.round(np.log(v[below]), 2))) for v in scales]
    return min(values) >= MIN_VALUES and np.ptp(np.log(points.compute[below])) >= np.log(MIN_RANGE)


def _weights(names: Sequence[str], backtests: pd.DataFrame) -> dict[str, float]:
    """Weigh curves by the median of their errors in backtests; all alike without any.

    The lowest cuts leave too little for a law with many parameters, which says nothing about the whole table: hence the
    median. A curve that a cut could not test counts there as the worst. Few cuts tell little, so the power grows with
    their number n as n / (n + 1).
    """
    of_cuts = backtests.pivot_table(index="curve", columns="times", values="error").reindex(list(names))
    of_cuts = of_cuts.fillna(of_cuts.max())
    num_cuts = of_cuts.shape[1]
    errors = of_cuts.median(axis=1) if of_cuts.shape[1] else pd.Series(1.0, index=list(names))
    least = FLOOR * errors.min()
    raw = (errors**2 + max(least, 1e-12) ** 2) ** (-SHARPNESS / 2 * num_cuts / (num_cuts + 1))
    return {str(name): float(share) for name, share in (raw / raw.sum()).items()}


def _mean(off: Mapping[str, Array], weights: Mapping[str, float]) -> Array:
    total = sum(weights[name] for name in off)
    return sum(weights[name] / total * miss for name, miss in off.items())


def _rms(values: Sequence[float] | Array | pd.Series) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(values, float)))))
