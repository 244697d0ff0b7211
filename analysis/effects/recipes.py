"""Two recipes as laws: does the gain of one grow, shrink or cross over with compute?

Both recipes' losses are fitted together. A size or a budget has one error for both (clusters hold rows of both), so
that cancels in what is told of their difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Drawing, Result
from aimscale.analysis.effects.result import baseline_of, level_names
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import CONFIDENCE, half_width, satterthwaite
from aimscale.analysis.fitting.estimate import fit
from aimscale.analysis.fitting.inference import Function
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.laws.base import Array, Columns, Law, Params, coefficient, exponent
from aimscale.analysis.table.design import FOLLOWS
from aimscale.analysis.table.names import no_column, our_name
from aimscale.analysis.table.points import usable_rows
from aimscale.analysis.table.select import main_part
from aimscale.analysis.words import Flag, flag_words, human, power_of_ten

NEWTON_STEPS = 20
"""Steps to a gain, in the logarithm of the excess loss, which is nearly linear in that of compute."""
NUM_SCALES = 7
"""Amounts of compute in the table of a result, evenly in the logarithm."""
BEYOND = 10.0
"""Factor beyond the largest compute up to which the gain is extrapolated by default."""
SPEED = "images_per_s"
"""Column of the measured speed."""
MOST_SEEDS = 10
"""Further seeds that are thought of at most."""
EXPONENTS = ("alpha", "beta")
"""Parameters whose ratio between the recipes is told."""
GAIN, TIME_GAIN = ("gain", "low", "high"), ("time_gain", "time_low", "time_high")
"""Columns of a gain and its interval."""


def _terms(x: Columns, t: Params) -> tuple[Array, ...]:
    """Return 1, and the terms of size and of data of the first recipe and of the second."""
    is_second, parts = x.log("G") / np.log(2.0), list[Array]()
    for name, variable in (("alpha", "N"), ("beta", "D")):
        first, second = (np.exp(-t[each] * x.log(variable)) for each in (name, _second(name, t)))
        parts += [(1 - is_second) * first, is_second * second]
    return np.ones_like(is_second), *parts


def _second(name: str, params: Params) -> str:
    """Name the second recipe's parameter: the first one's where they share it."""
    return own if (own := f"{name}_2") in params else name


def pair(*, own_exponents: bool = False) -> Law:
    """Make Chinchilla's law of two recipes, G = 1 and G = 2, that share E and, unless each has its own, exponents."""
    exponents = ("alpha", "alpha_2", "beta", "beta_2") if own_exponents else EXPONENTS
    return Law(
        name="pair",
        formula=f"L = E + A N^-alpha + B D^-beta, each recipe with its own A, B{', alpha, beta' * own_exponents}",
        variables=("N", "D", "G"),
        linear=tuple(map(coefficient, ("E", "A", "A_2", "B", "B_2"))),
        nonlinear=tuple(map(exponent, exponents)),
        basis=_terms,
        source="Hoffmann et al. 2022, approach 3, of two recipes",
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class Recipes(Result):
    """A recipe's worth in compute against another's, as a function of compute."""

    plot = Drawing("scaling.plot_recipes")

    by: str
    baseline: str
    level: str
    table: pd.DataFrame
    """A row per amount of compute: C, N and D (in the table's mean ratio), gain, low, high, beyond (of the largest
    run); time_gain, time_low and time_high where images_per_s is known of two sizes or more under both. A gain of 2:
    the baseline needs twice the compute for the same loss."""
    trend: tuple[float, float, float]
    """Change of the gain over the table's own range of compute, as a factor, with its interval."""
    crossover: float
    """Compute at which the gain is 1; NaN where it is on one side everywhere."""
    exponents: pd.DataFrame
    """alpha and beta: ratio of the level's to the baseline's, low, high, from laws that share E alone."""
    has_own_exponents: bool
    """Whether exponents differ significantly, so that each recipe keeps its own."""
    law: Fit
    """The joint law behind the gains."""
    flags: tuple[Flag, ...]
    decision: str
    """Further runs that would tell the gain at the largest compute of `table` from one, in words."""

    def headline(self) -> str:
        """Return the gain at the largest compute of the table and beyond."""
        inside, beyond = self.table[~self.table["beyond"]].iloc[-1], self.table.iloc[-1]
        return (
            f"{self.level} is worth {_words(inside, GAIN)} times the compute of {self.baseline} at "
            f"{power_of_ten(inside['C'])} FLOP, {_words(beyond, GAIN)} at {power_of_ten(beyond['C'])}"
        )

    def facts(self) -> list[tuple[str, str]]:
        """Return cautions, the gain, its trend and where it crosses over."""
        _, low, high = self.trend
        change = "grows" if low > 1 else "shrinks" if high < 1 else "is not known to change"
        ratios = (f"{name} x {_words(row)}" for name, row in self.exponents.iterrows())
        kept = "each keeps its own" if self.has_own_exponents else "both share them"
        where = f"at {power_of_ten(self.crossover)} FLOP" if np.isfinite(self.crossover) else "not up to the last row"
        return [
            *(("caution", text) for text in flag_words(self.flags)),
            ("worth", self.headline()),
            ("trend", f"with compute the gain {change}: x {_words(self.trend)}"),
            ("exponents", f"{', '.join(ratios)}: {kept}"),
            ("crosses over", where),
            ("to decide", self.decision),
        ]

    def cells(self) -> list[dict[str, str]]:
        """Write a row per amount of compute."""
        return [
            {
                "compute": power_of_ten(row["C"]),
                "gain": _words(row, GAIN),
                "gain in time": _words(row, TIME_GAIN) if "time_gain" in row else "",
                "beyond the table": "yes" if row["beyond"] else "",
            }
            for row in self.table.to_dict("records")
        ]


def _words(values: Any, names: Sequence[str] | None = None) -> str:
    """Write a factor with its interval, of a row's columns or of three numbers."""
    value, low, high = values if names is None else (values[name] for name in names)
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def recipes(df: pd.DataFrame, *, by: str, baseline: str | None = None, y: str = "val_loss") -> tuple[Recipes, ...]:
    """Fit the laws of two recipes or more together, and tell the gain of each over the baseline by compute.

    Args:
        by: column that tells the recipes apart.
        baseline: recipe to compare with; None takes the paper's, else the one with most rows.
        y: column of the loss.

    Returns:
        A result per other recipe.

    Raises:
        AnalysisError: a missing column, a single recipe, or too few rows of one for a law.

    Example:
        >>> recipes(read_table("two.csv"), by="recipe")[0].table
    """
    by, y = our_name(df, by), our_name(df, y)
    if by not in df:
        raise no_column(df, by)
    used = usable_rows(df, {"N": our_name(df, "N"), "D": our_name(df, "D"), "y": y})
    known = used.rows[used.rows[by].notna()]
    rows, which = main_part(known, free={by, *FOLLOWS.get(by, ())})
    others = len(known) - len(rows)
    text = f"{others} rows of other designs than {which} are left out."
    flags = [Flag(kind="design", subject=which, number=others, text=text)] * bool(which)
    numbers = used.numbers.loc[rows.index]
    if SPEED in rows:
        numbers = numbers.assign(speed=pd.to_numeric(rows[SPEED], errors="coerce"))
    if not np.isfinite(6 * numbers["N"] * numbers["D"]).all() or not len(numbers):
        raise AnalysisError(f"No row with a {by} has N, D and a loss whose compute, 6 N D, is a number; correct them.")
    level = level_names(rows[by])
    first = baseline_of(by, baseline, counts := level.value_counts())
    if len(counts) < 2:
        raise AnalysisError(f"All rows have {by} = {first}, so there is nothing to compare.")
    return tuple(
        _compared(numbers[level.isin([first, other])], level == other, (by, first, str(other)), flags)
        for other in counts.index
        if other != first
    )


def _compared(
    numbers: pd.DataFrame, is_level: pd.Series, names: tuple[str, str, str], flags: Sequence[Flag]
) -> Recipes:
    """Fit both laws to the rows of two recipes, called by their column, the baseline and the level."""
    points = numbers.assign(G=is_level.map({False: 1.0, True: 2.0}))
    own, shared = (fit(points, pair(own_exponents=each), y="y", is_tested=False) for each in (True, False))
    ratios = {name: own.estimate.error_of(_log_ratio(name)) for name in EXPONENTS}
    either = 1 - (1 - CONFIDENCE) / len(EXPONENTS)  # one of two intervals misses by chance twice as often
    differs = any(low > 1 or high < 1 for each in ratios.values() for _, low, high in [_factor(*each, either)[:, 0]])
    law = own if differs else shared
    compute = 6 * points["N"] * points["D"]
    ratio = float(np.exp(np.mean(np.log(points["D"] / points["N"]))))
    scales = np.geomspace(compute.min(), compute.max(), NUM_SCALES - 2)
    scales = np.append(scales, [BEYOND**0.5 * scales[-1], BEYOND * scales[-1]])
    n = np.sqrt(scales / (6 * ratio))
    gain = _gain_of(law, n, ratio * n)
    value, errors, degrees = law.estimate.error_of(gain)
    found = dict(zip(GAIN, _factor(value, errors, degrees), strict=True))
    if (speed := _speed(points)) is not None:
        faster, sd, free = (np.broadcast_to(each, value.shape) for each in speed)
        spare = satterthwaite(np.stack([errors, sd]), np.stack([degrees, free]))
        found |= dict(zip(TIME_GAIN, _factor(value + faster, np.hypot(errors, sd), spare), strict=True))
    last = NUM_SCALES - 3
    change = law.estimate.error_of(lambda p: (g := gain(p))[..., [last]] - g[..., [0]])
    exponents = {
        name: dict(zip(("ratio", *GAIN[1:]), _factor(*each)[:, 0], strict=True)) for name, each in ratios.items()
    }
    return Recipes(
        **dict(zip(("by", "baseline", "level"), names, strict=True)),
        table=pd.DataFrame({"C": scales, "N": n, "D": ratio * n, **found, "beyond": scales > 1.001 * compute.max()}),
        trend=tuple(_factor(*change)[:, 0].tolist()),
        crossover=_crossover(scales, value),
        exponents=pd.DataFrame.from_dict(exponents, orient="index"),
        has_own_exponents=differs,
        law=law,
        decision=_decision(law, points, lambda p: gain(p)[..., [-1]]),
        flags=(*flags, *(each for each in law.flags if each.kind in ("unseen", "few_groups"))),
    )


def _factor(value: Array, errors: Array, degrees: Array, confidence: float = CONFIDENCE) -> Array:
    """Return factors with the ends of their intervals (3, m) from their logarithms."""
    half = half_width(errors, degrees, confidence)
    return np.exp([value, value - half, value + half])


def _log_ratio(name: str) -> Function:
    """Make the logarithm of the level's parameter over the baseline's a function of the law's parameters."""
    return lambda params: np.log(params[f"{name}_2"] / params[name])


def _speed(points: pd.DataFrame) -> tuple[float, float, float] | None:
    """Return the logarithm of the level's images/s over the baseline's at equal size, its standard error over sizes and
    degrees of freedom; None where fewer than two sizes tell it."""
    if "speed" not in points:
        return None
    logs = np.log(points["speed"].where(points["speed"] > 0))
    baseline, level = (logs[points["G"] == group].groupby(points["N"]).mean() for group in (1.0, 2.0))
    apart = (level - baseline).dropna()
    return (apart.mean(), apart.sem(), len(apart) - 1.0) if len(apart) > 1 else None


def _decision(law: Fit, points: pd.DataFrame, gain: Function) -> str:
    """Say which further pairs of runs, at one size and amount of data, would tell for least compute whether a gain
    (its logarithm) is one; what the two of a pair have in common cancels."""
    estimate, cells = law.estimate, points[["N", "D"]].drop_duplicates()
    cells = pd.concat([cells, 2 * cells.max().to_frame().T], ignore_index=True)
    (value,), (error,), degrees = estimate.error_of(gain)
    reach = half_width(1.0, degrees)[0]
    if abs(value) > reach * error:
        return f"nothing more: at the largest compute the gain is {'above' if value > 0 else 'below'} 1"

    def apart(params: Params) -> Array:
        sides = (estimate.law_at({**cells, "G": np.full(len(cells), group)})(params) for group in (2.0, 1.0))
        return np.subtract(*sides)

    offers = []
    for seeds in range(1, MOST_SEEDS + 1):
        _, after = estimate.error_after(gain, apart, estimate.components.point * np.sqrt(2 / seeds))
        told = cells[reach * after < abs(value)]
        offers += [(seeds * n * d, seeds, n, d) for n, d in told.to_numpy()]
    if not offers:
        return f"larger sizes: {MOST_SEEDS} more seeds at one size do not tell a gain of {np.exp(value):.2f} from 1"
    _, seeds, n, d = min(offers)
    more = f"{seeds} more seed{'s' * (seeds > 1)} of both at N = {human(n)}, D = {human(d)}"
    return f"{more}, if the gain is {np.exp(value):.2f}"


def _gain_of(law: Fit, n: Array, d: Array) -> Function:
    """Make the logarithm of the gain at scales (m,) a function of the law's parameters: the baseline needs N and D of
    root gain times as much for the loss that the level has there."""

    def gain(params: Params) -> Array:
        names = ("E", "A", "B", *EXPONENTS)
        first = {name: np.asarray(params[name])[..., None] for name in names}
        second = {name: np.asarray(params[_second(name, params)])[..., None] for name in names}
        excess = second["E"] - first["E"] + second["A"] * n ** -second["alpha"] + second["B"] * d ** -second["beta"]
        found = np.zeros_like(excess)
        for _ in range(NEWTON_STEPS):
            parts = [
                first[c] * scale ** -first[e] * np.exp(-first[e] * found / 2)
                for c, e, scale in (("A", "alpha", n), ("B", "beta", d))
            ]
            slope = (first["alpha"] * parts[0] + first["beta"] * parts[1]) / 2
            found = found + sum(parts) / slope * np.log(sum(parts) / np.maximum(excess, 1e-300))
        return found

    return gain


def _crossover(scales: Array, log_gain: Array) -> float:
    """Find the compute at which the gain crosses 1, between two rows; NaN without a change of sign."""
    logs = np.log(scales)
    for i in np.flatnonzero(np.diff(np.sign(log_gain)))[:1]:
        return float(np.exp(logs[i] - log_gain[i] * (logs[i + 1] - logs[i]) / (log_gain[i + 1] - log_gain[i])))
    return float("nan")
