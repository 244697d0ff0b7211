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
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from scipy.stats import t as student

from aimscale.analysis.accuracy.links import task_level
from aimscale.analysis.display import Result
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.inference import CONFIDENCE
from aimscale.analysis.forecasts.curves import THROUGH, Cache, Curve, Curves, fit_curves
from aimscale.analysis.forecasts.points import AUTO, JOINT, Points, table_points
from aimscale.analysis.laws.base import Array, Law
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
UNTESTED = 2.0
"""Rate of misfit of a table that is too small for backtests, in units of the noise."""
TERMS = ("noise", "parameters", "laws", "misfit")
"""Parts of the error."""
LEAST_ERROR = 1e-4
"""Error rate that an accuracy of 1 counts as: one image of ten thousand."""


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


@dataclass(frozen=True, kw_only=True, repr=False)
class Forecaster(Result):
    """Laws of one quantity of a table with their weights, and the errors of their mean."""

    points: Points = field(repr=False)
    curves: Mapping[str, Curve] = field(repr=False)
    """Laws fitted to all points, in the order of the candidates."""
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
    calibration: Calibration = LOSSES
    is_accuracy: bool = False
    """Whether error rates are forecast, and shown as accuracies."""

    @property
    def best(self) -> str:
        """Curve with the largest weight."""
        return max(self.weights, key=self.weights.__getitem__)

    @property
    def law(self) -> Law:
        """Law that predicts the table's own larger runs better than the first one in every backtest, else that."""
        best = next(law for law in self.points.laws if law.name == self.best.removesuffix(THROUGH))
        first = next((law for law in self.points.laws if law.name in self.curves), best)
        return best if self.is_better(best.name, first.name) else first

    def is_better(self, name: str, than: str) -> bool:
        """Tell whether a curve predicted better than another in every backtest, by `MARGIN`."""
        errors = self.backtests.pivot_table(index="times", columns="curve", values="error")
        return {name, than} <= {*errors} and bool((errors[name] < MARGIN * errors[than]).all())

    @property
    def is_usual(self) -> bool:
        """Whether the laws are those that the record on public tables is of."""
        return set(JOINT) <= {law.name for law in self.points.laws}

    @property
    def is_tested(self) -> bool:
        """Whether the table is large enough for a backtest."""
        return len(self.backtests) > 0

    @property
    def table(self) -> pd.DataFrame:
        """One row a curve, the heaviest first: curve, num_params, weight, backtest_error, noise, reason."""
        errors = self.backtests.groupby("curve")["error"].median()
        rows = []
        for name in sorted(self.curves, key=lambda name: -self.weights[name]):
            row = {"curve": name, "num_params": self.curves[name].num_params, "weight": self.weights[name]}
            rows.append({**row, "backtest_error": errors.get(name, np.nan), "noise": self.curves[name].noise})
        lost = [{"curve": name, "weight": 0.0, "reason": why} for name, why in self.missing.items()]
        return pd.DataFrame([*(row | {"reason": ""} for row in rows), *lost])

    def predict(self, at: Mapping[str, Array | float]) -> pd.DataFrame:
        """Forecast at scales (m,), accuracies between chance and 1.

        Returns:
            One row a scale: value; ci_lo, ci_hi of the curve and pi_lo, pi_hi of one measurement (95 %); distance;
            rival_lo, rival_hi, the lowest and highest curve; and the standard deviations of ln y of each of `TERMS`.
        """
        x = self.points.place(at)
        share = np.array([self.weights[name] for name in self.curves])
        predicted = [curve.predict(x) for curve in self.curves.values()]
        logs, spreads = (np.array(each) for each in zip(*predicted, strict=True))
        centre, distance, by = share @ logs, self.points.distance(x), self.calibration
        noise = np.sqrt(share @ np.array([curve.noise**2 for curve in self.curves.values()]))
        parts = {
            "noise": np.full(len(centre), by.known * noise),
            "parameters": by.known * (share @ spreads),  # one table's curves err together
            "laws": by.known * np.sqrt(share @ (logs - centre) ** 2),
            "misfit": (by.misfit * self.misfit + by.least) * np.log(distance),
        }
        variances = np.square(np.array([parts[name] for name in TERMS]))
        reach = student.ppf(0.5 + CONFIDENCE / 2, DOF)
        halves = {"ci": reach * np.sqrt(variances[1:].sum(axis=0)), "pi": reach * np.sqrt(variances.sum(axis=0))}
        moves = {f"{name}_{end}": sign * half for name, half in halves.items() for end, sign in (("lo", -1), ("hi", 1))}
        with np.errstate(over="ignore"):
            value, lowest, highest = np.exp([centre, logs.min(axis=0), logs.max(axis=0)])
            if self.is_accuracy:  # ends as far on both sides: an error rate's logarithm has no end at 1
                out = {"value": 1 - value, "rival_lo": 1 - highest, "rival_hi": 1 - lowest}
                out |= {name: 1 - value + value * by for name, by in moves.items()}
                out = {name: np.clip(each, self.points.chance or 0.0, 1) for name, each in out.items()}
            else:
                out = {"value": value, "rival_lo": lowest, "rival_hi": highest}
                out |= {name: np.exp(centre + by) for name, by in moves.items()}
        return pd.DataFrame({**out, "distance": distance, **parts})

    def facts(self) -> list[tuple[str, str]]:
        """List which curves there are, and what they missed by in backtests."""
        shown = self.table[self.table["weight"] > 0.005]
        pairs = zip(shown["curve"], shown["weight"], strict=True)
        num_runs = human(next(iter(self.curves.values())).law.num_runs)
        off = "none: the table is too small to test laws on its own larger runs"
        if self.is_tested:
            cuts = " and ".join(f"1/{times:.0f}" for times in sorted(self.backtests["times"].unique()))
            off = f"{percent(self.misfit)} off per factor e beyond, fitted below {cuts} of the table's compute"
        return [
            ("laws", ", ".join(f"{name} {percent(weight)}" for name, weight in pairs)),
            ("runs", f"as many as {num_runs} that count alike: they are weighted by their compute"),
            ("backtests", off),
        ]

    def headline(self) -> str:
        """Say which curves there are, and what they missed by in backtests."""
        return "; ".join(map(": ".join, self.facts()))

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
    return weigh(table_points(df, law, y)[0], cache)


def accuracy_forecaster(
    probed: pd.DataFrame, *, law: Sequence[Law | str] | str = AUTO, loss: str = "val_loss", cache: Cache | None = None
) -> Forecaster:
    """Weigh laws of an accuracy's error rate, and links to it from the loss.

    Args:
        probed: rows of one probe on one task, as `probe_frame` gives them.
        cache: fits for other probes of the same runs; this one leaves its own there.
    """
    errors = (1 - pd.to_numeric(probed["top1"], errors="coerce")).clip(lower=LEAST_ERROR)
    points, rows = table_points(probed.assign(**{"error rate": errors}), law, "error rate")
    losses = pd.to_numeric(rows[loss], errors="coerce").to_numpy(float) if loss in rows else np.zeros(len(rows))
    chance, ideal = (task_level(rows, name) for name in ("chance", "ideal"))
    points = replace(points, loss=losses if np.all(losses > 0) else None, chance=chance, ideal=ideal)
    return replace(weigh(points, cache), calibration=ACCURACIES, is_accuracy=True)


def weigh(
    points: Points, cache: Cache | None = None, fit: Callable[[Points, Cache], Curves] = fit_curves
) -> Forecaster:
    """Weigh curves by backtests on the points themselves."""
    cache = {} if cache is None else cache
    found = fit(points, cache)
    missing = {name: why for name, why in found.items() if isinstance(why, str)}
    curves = {name: curve for name, curve in found.items() if not isinstance(curve, str)}
    if not curves:
        name, why = next(iter(missing.items()))
        raise AnalysisError(f"No law can be fitted to forecast with; {name}: {why}")
    rows, misses = [], list[tuple[dict[str, Array], Array]]()
    for times in CUTS:
        below = points.compute <= points.compute.max() / times
        if not _is_enough(points, below):
            continue
        known, test = points.rows(below), points.rows(~below)
        off = dict[str, Array]()
        for name, curve in fit(known, cache).items():
            if name in curves and not isinstance(curve, str):
                miss = curve.predict(test.x)[0] - np.log(test.y)
                off |= {name: miss} if np.isfinite(miss).all() else {}
        counts = {"times": times, "num_train": len(known.y), "num_test": len(test.y)}
        rows += [{**counts, "curve": name, "error": _rms(miss)} for name, miss in off.items()]
        misses.append((off, np.log(known.distance({**test.x, "C": test.compute}))))
    backtests = pd.DataFrame(rows, columns=["times", "num_train", "num_test", "curve", "error"])
    weights = _weights(list(curves), backtests)
    rates = []
    for off, far in misses:
        if off:
            mean = np.average(list(off.values()), axis=0, weights=[weights[name] for name in off])
            rates.append(_rms(mean) / _rms(far))
    noise = _rms([curve.noise for curve in curves.values()])
    misfit = float(np.median(rates)) if rates else UNTESTED * noise
    return Forecaster(
        points=points, curves=curves, weights=weights, backtests=backtests, missing=missing, misfit=misfit
    )


def _is_enough(points: Points, below: Array) -> bool:
    """Tell whether points below a cut can be fitted, and any are left to predict."""
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
    num_cuts = of_cuts.shape[1]
    errors = of_cuts.fillna(of_cuts.max()).median(axis=1) if num_cuts else pd.Series(1.0, index=list(names))
    least = max(FLOOR * errors.min(), 1e-12)
    raw = (errors**2 + least**2) ** (-SHARPNESS / 2 * num_cuts / (num_cuts + 1))
    return {str(name): float(share) for name, share in (raw / raw.sum()).items()}


def _rms(values: Sequence[float] | Array) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(values, float)))))
