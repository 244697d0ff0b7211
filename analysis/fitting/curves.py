"""Learning curves: one loss against one scale, extrapolated."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Result, plain_types
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.objectives import LOG_LSQ
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.laws.base import Array
from aimscale.analysis.laws.catalogue import power, sigmoidal
from aimscale.analysis.table.names import no_column, their_name


@dataclass(frozen=True, kw_only=True, repr=False)
class Extrapolation(Result):
    """The default forecast of a single curve."""

    fits: tuple[Fit, ...]
    """The power law with offset and M4, fitted to the curve."""
    variable: str
    """Name of x."""
    table: pd.DataFrame = field(repr=False)
    """The points used: x, y."""
    asked: float | None = None
    """Where the forecast is asked for, if anywhere."""

    def at(self, x: float) -> Extrapolation:
        """The same, with the forecast at x in its words."""
        return replace(self, asked=x)

    def summary(self) -> str:
        """Laws and points, and the forecast that was asked for."""
        if self.asked is None:
            return super().summary()
        row = self.predict(np.array([self.asked])).iloc[0]
        apart, y = row["disagreement"] - 1, self.fits[0].names.get(self.table.columns[1], self.table.columns[1])
        return (
            f"{self.headline()}; at {self.variable} = {self.asked:.4g}, {row['beyond_range']:.3g} times beyond:\n"
            f"  {y}: {row['value']:.4g} (curve {row['ci_lo']:.4g} to {row['ci_hi']:.4g}; one "
            f"measurement {row['pi_lo']:.4g} to {row['pi_hi']:.4g}); the two laws differ by {apart:.2%}"
        )

    def headline(self) -> str:
        """Laws and points."""
        return f"{' and '.join(f.law.name for f in self.fits)} fitted to {len(self.table)} points of a curve"

    def to_dict(self) -> dict[str, Any]:
        """Plain types, with the forecast that was asked for."""
        out = super().to_dict()
        return out if self.asked is None else {**out, "forecast": plain_types(self.predict(np.array([self.asked])))[0]}

    def predict(self, x: Array) -> pd.DataFrame:
        """value, ci_lo, ci_hi, pi_lo, pi_hi, disagreement (ratio of the two laws), beyond_range at x.

        value is the geometric mean of the two laws; the intervals are the hulls of theirs.
        """
        parts = [f.predict({self.variable: np.asarray(x, float)}) for f in self.fits]
        values = np.array([p["value"] for p in parts])
        out = {"value": np.exp(np.mean(np.log(values), axis=0))}
        for name in ("ci_lo", "pi_lo"):
            out[name] = np.min([p[name] for p in parts], axis=0)
        for name in ("ci_hi", "pi_hi"):
            out[name] = np.max([p[name] for p in parts], axis=0)
        out["disagreement"] = values.max(axis=0) / values.min(axis=0)
        return pd.DataFrame({**out, "beyond_range": parts[0]["beyond_range"]})


def extrapolate(
    df: pd.DataFrame, *, x: str, y: str, tail_weight: float = 1.5, resamples: int = 0, confidence: float = 0.95
) -> Extrapolation:
    """Extrapolate one curve towards larger x.

    A power law with offset (M2) and M4 are fitted by least squares on logarithms to a global optimum, with weight
    (x / largest x)^tail_weight so that the end of the curve counts most, and averaged on the logarithm. Residuals of
    log y need no Jacobian, unlike the published ones of log(y - e_inf). Laws and weight were chosen on training points
    alone: of five laws, their averages and five weights, this one best predicted the upper half of the training range
    of the vision curves from the lower half, and the second quarter from the first.

    Args:
        df: one row per point; of several with the same x the last one counts.
        x: column of the scale.
        y: column of the loss or error, positive.
        tail_weight: power of x in the weights.
        resamples: draws for the intervals; 0 for none.
        confidence: coverage of the intervals.

    Raises:
        AnalysisError: missing columns or fewer than 6 different x.
    """
    for name in (x, y):
        if name not in df.columns:
            raise no_column(df, name)
    points = df[[x, y]].drop_duplicates(x, keep="last").sort_values(x)
    if len(points) < 6:
        raise AnalysisError(
            f"The curve has {len(points)} different {their_name(df, x)}; extrapolating it needs at least 6."
        )
    weights = (points[x] / points[x].max()).to_numpy() ** tail_weight
    fits = tuple(
        fit(law, points, y=y, objective=LOG_LSQ, weights=weights, resamples=resamples, confidence=confidence)
        for law in (power(x), sigmoidal(x))
    )
    return Extrapolation(fits=fits, variable=x, table=points)
