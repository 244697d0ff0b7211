"""Worked example on the paper's own numbers: fit 0.6B, 1B and 3B, forecast 7B, and look at what 7B really scored.

Three points and two parameters leave one degree of freedom, where a bootstrap has nothing to resample; the intervals
are the textbook ones of a straight line with Student's t, which say so by their width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.result import about
from aimscale.analysis.published.published import LOSS_SOURCE, PAPER, PAPER_EXPONENTS, published_frame

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Line:
    """y = intercept + slope x by least squares, with Student's t for its intervals."""

    x: np.ndarray
    """Fitted x (n,)."""
    slope: float
    slope_lo: float
    slope_hi: float
    intercept: float
    sigma: float
    """Residual standard deviation, n - 2 degrees of freedom."""

    def predict(self, x: float) -> tuple[float, float, float]:
        """Value of a new measurement at x, and its 95 % prediction interval."""
        value = self.intercept + self.slope * x
        centred = self.x - self.x.mean()
        spread = 1 + 1 / len(self.x) + (x - self.x.mean()) ** 2 / float(centred @ centred)
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(self.x) - 2)) * self.sigma * float(np.sqrt(spread))
        return value, value - half, value + half


def fit_line(x: np.ndarray, y: np.ndarray) -> Line:
    """Least squares through three points or more."""
    assert len(x) == len(y) > 2
    found = stats.linregress(x, y)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 2)) * float(found.stderr)
    residuals = y - found.intercept - found.slope * x
    return Line(
        x=x,
        slope=float(found.slope),
        slope_lo=float(found.slope) - half,
        slope_hi=float(found.slope) + half,
        intercept=float(found.intercept),
        sigma=float(np.sqrt(residuals @ residuals / (len(x) - 2))),
    )


@dataclass(frozen=True, kw_only=True)
class PublishedForecast:
    """One quantity of AIM-7B, forecast from the three smaller models."""

    what: str
    """The quantity."""
    by: str
    """How it was forecast."""
    predicted: float
    low: float
    """Lower end of the 95 % prediction interval."""
    high: float
    actual: float
    """What the paper reports for 7B."""
    extrapolation: float
    """7B's N over the largest fitted N."""

    @property
    def inside(self) -> bool:
        """The interval holds the real value."""
        return self.low <= self.actual <= self.high

    def sentence(self, digits: int = 4) -> str:
        """In words."""
        return (
            f"{self.what} of AIM-7B by {self.by}: forecast {self.predicted:.{digits}f} "
            f"[{self.low:.{digits}f}, {self.high:.{digits}f}], really {self.actual:.{digits}f} "
            f"({100 * (self.predicted / self.actual - 1):+.2f} %, "
            f"{'inside' if self.inside else 'outside'} the interval); "
            f"{self.extrapolation:.1f} times the largest fitted N."
        )


def forecast_7b(count: str = "params_trunk") -> list[PublishedForecast]:
    """Validation loss by a power law of N; 15-task mean by a line in ln N and by a line in the (forecast) loss."""
    frame = published_frame()
    small, large = frame.iloc[:3], frame.iloc[3]
    log_n, target = np.log(small[count].to_numpy(float)), float(np.log(large[count]))
    factor = float(large[count] / small[count].iloc[-1])
    loss_line = fit_line(log_n, np.log(small["val_loss"].to_numpy()))
    loss = tuple(float(np.exp(v)) for v in loss_line.predict(target))
    mean = small["mean15_last6"].to_numpy()
    by_size = fit_line(log_n, mean).predict(target)
    link = fit_line(small["val_loss"].to_numpy(), mean)
    by_loss = _through(link, loss)
    real_loss, real_mean = float(large["val_loss"]), float(large["mean15_last6"])
    rows = (
        ("validation loss", "a power law in N", loss, real_loss),
        ("15-task mean", "a straight line in ln N", by_size, real_mean),
        ("15-task mean", "a straight line in the forecast loss", by_loss, real_mean),
    )
    return [
        PublishedForecast(what=what, by=by, predicted=v[0], low=v[1], high=v[2], actual=actual, extrapolation=factor)
        for what, by, v, actual in rows
    ]


def _through(link: Line, loss: tuple[float, ...]) -> tuple[float, float, float]:
    """Accuracy by way of a forecast loss: the two steps' half-widths added in quadrature."""
    value, low, _ = link.predict(loss[0])
    step_one = abs(link.slope) * (loss[2] - loss[1]) / 2
    half = float(np.hypot(value - low, step_one))
    return value, value - half, value + half


@dataclass(frozen=True, kw_only=True)
class FourPoints:
    """Correlation of loss and 15-task mean over AIM's four sizes, and how little that proves."""

    pearson: float
    low: float
    """Lower end of Fisher's 95 % interval."""
    high: float
    p_rank: float
    """Chance that four unrelated pairs line up in perfect order, either way: 2 / 4!."""

    def sentence(self) -> str:
        """In words."""
        return (
            f"Over AIM's four sizes the 15-task mean and the validation loss have Pearson r = {self.pearson:.3f} "
            f"[{self.low:.3f}, {self.high:.3f}] (Fisher's interval). They are in perfect rank order, which four "
            f"unrelated pairs are in {100 * self.p_rank:.1f} % of cases: too few points to call it shown."
        )


def four_points() -> FourPoints:
    """The paper's loss against its 15-task mean."""
    frame = published_frame()
    r = float(np.corrcoef(frame["val_loss"], frame["mean15_last6"])[0, 1])
    half = 1.959964 / np.sqrt(len(frame) - 3)
    low, high = np.tanh(np.arctanh(r) - half), np.tanh(np.arctanh(r) + half)
    return FourPoints(pearson=r, low=float(low), high=float(high), p_rank=2 / 24)


def paper_exponent(count: str) -> dict[str, float]:
    """a of L ~ N^-a through the paper's four points: exponent, low, high, n_low, n_high."""
    frame = published_frame()
    n = frame[count].to_numpy(float)
    line = fit_line(np.log(n), np.log(frame["val_loss"].to_numpy()))
    ends = {"low": -line.slope_hi, "high": -line.slope_lo, "n_low": float(n.min()), "n_high": float(n.max())}
    return {"exponent": -line.slope} | ends


def worked_example() -> dict[str, Any]:
    """Everything that `aimscale compare --published` prints, in plain types; `sentences` is for reading."""
    exponents = {count: paper_exponent(count) for count in PAPER_EXPONENTS}
    forecasts = {count: forecast_7b(count) for count in PAPER_EXPONENTS}
    names = {"params_trunk": "trunk parameters", "params_total": "parameters with the pixel head"}
    sentences = [f"Loss: {LOSS_SOURCE}. 15-task mean: {PAPER}, Table 6, attentive probe, last six blocks."]
    for count, slope in exponents.items():
        sentences.append(
            f"L ~ N^-{slope['exponent']:.4f} [{slope['low']:.4f}, {slope['high']:.4f}] on the paper's four points, "
            f"N: {names[count]}. {_with_offset(count)}"
        )
        sentences += [f"N: {names[count]}. {forecast.sentence()}" for forecast in forecasts[count]]
    sentences.append(four_points().sentence())
    return {
        "exponents": exponents,
        "forecasts": {k: [vars(f) | {"inside": f.inside} for f in v] for k, v in forecasts.items()},
        "correlation": vars(four_points()),
        "sentences": sentences,
    }


def _with_offset(count: str) -> str:
    """What the four points say of an irreducible loss."""
    found = fit("power_offset:N", published_frame(), columns={"N": count}, objective="log_lsq", resamples=400)
    flags = " ".join(flag for flag in found.flags if about(flag) in ("E", "a"))
    return f"With an offset, L = E + A N^-a: E = {found.shown('E')}, a = {found.shown('a')}. {flags}".rstrip()
