"""Two recipes by compute: does the gain of one over the other grow, shrink or cross over?

A size or a budget errs alike under both recipes, so that cancels in the gains that are measured (`effects.gains`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Flag, Result, flag_words, human, p_value, power_of_ten
from aimscale.analysis.distributions import t_below, t_quantile
from aimscale.analysis.effects.gains import Gains, Spread, measured_gains, smooth
from aimscale.analysis.effects.ladder import LADDER_LAWS, Ladder, fit_ladder, is_short
from aimscale.analysis.effects.ladder import MOST_SEEDS as LADDER_SEEDS
from aimscale.analysis.effects.result import POWER, baseline_of, level_names
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import CONFIDENCE, half_width
from aimscale.analysis.fitting.diagnostics import ALARM, unidentified
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.laws import Array
from aimscale.analysis.table.groups import Cost, cost_of, shared_budgets
from aimscale.analysis.table.points import usable_rows
from aimscale.analysis.table.runs import Runs, Table
from aimscale.analysis.table.schema import FOLLOWS
from aimscale.analysis.table.select import main_part

NUM_SCALES, MOST_BUDGETS = 5, 15
"""Amounts of compute inside the table, evenly in the logarithm; or the budgets themselves, where there are at most so
many."""
BEYOND = 10.0
"""Factor beyond the largest compute up to which gains are told by default."""
MISSED = 0.1
"""Share of budgets whose gain may lie outside the interval of the curve, where anything is decided by it."""
SPEED = "images_per_s"
"""Column of the measured speed."""
MOST_SEEDS = 10
"""Further seeds that are thought of at most."""
EXPONENTS = {"alpha", "beta"}
"""Parameters of the baseline's law that its slopes rest on."""
MOST_SURE = 0.999
"""Probability above which no digits are shown."""
GAIN, TIME_GAIN = ("gain", "low", "high"), ("time_gain", "time_low", "time_high")
"""Columns of a gain and its interval."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Recipes(Result):
    """A recipe's worth in compute against another's, as a function of compute."""

    by: str
    baseline: str
    level: str
    table: pd.DataFrame
    """A row per amount of compute: C, N and D (in the table's mean ratio), gain, low, high, measured (mean of the gains
    that were measured near it), beyond (of the largest run); time_gain, time_low and time_high where images_per_s is
    known of two sizes or more under both. A gain of 2: the baseline needs twice the compute for the same loss. NaN
    where not known."""
    trend: tuple[float, float, float]
    """Change of the gain over the table's own range of compute, as a factor, with its interval, by a straight line."""
    trend_p: float
    """Probability of such a change, or a larger one, of a gain that does not change."""
    crossover: float
    """Compute at which the gain is 1; NaN where it is not known to lie on both sides of it."""
    law: Fit | None
    """Law of the baseline that turned losses into compute; None where gains were read off budgets of compute."""
    flags: tuple[Flag, ...]
    """Cautions, those of the law among them."""
    probability: float
    """Probability that the level is better: that its gain at the table's largest compute is above 1."""
    decision: str
    """Further runs that would tell the gain at the table's largest compute from one, in words."""

    @property
    def is_known(self) -> bool:
        """Whether the rows tell the gain."""
        return bool(self.table["gain"].notna().all())

    def headline(self) -> str:
        """Return the gain at the largest compute of the table and beyond."""
        if not self.is_known:
            return f"not known: these rows do not tell the compute that {self.level} saves against {self.baseline}"
        inside, beyond = self.table[~self.table["beyond"]].iloc[-1], self.table.iloc[-1]
        return (
            f"{self.level} is worth {_words(inside, GAIN)} times the compute of {self.baseline} at "
            f"{power_of_ten(inside['C'])} FLOP, {_words(beyond, GAIN)} at {power_of_ten(beyond['C'])}"
        )

    def facts(self) -> list[tuple[str, str]]:
        """Return cautions, the gain, its trend and where it crosses over."""
        facts = [*(("caution", text) for text in flag_words(self.flags)), ("worth", self.headline())]
        if self.is_known:
            change = (
                ("grows" if self.trend[0] > 1 else "shrinks") if self.trend_p <= ALARM else "is not known to change"
            )
            inside = self.table[~self.table["beyond"]]
            is_aside = (inside["low"] > 1).all() or (inside["high"] < 1).all()
            where = "at" if np.isfinite(self.crossover) else f"{'no crossover' if is_aside else 'not known to,'} up to"
            where += f" {power_of_ten(np.nanmin([self.crossover, inside['C'].max()]))} FLOP"
            words = f"with compute the gain {change}: x {_words(self.trend)} ({p_value(self.trend_p)})"
            shown = ">0.999" if self.probability > MOST_SURE else f"{self.probability:.3g}"
            facts += [("better", f"with a probability of {shown} at the table's largest compute")]
            facts += [("trend", words), ("crosses over", where)] if np.isfinite(self.trend_p) else []
        return [*facts, ("to decide", self.decision)]

    def cells(self) -> list[dict[str, str]]:
        """Write a row per amount of compute."""
        return [
            {
                "compute": power_of_ten(row["C"]),
                "gain": _words(row, GAIN),
                "measured": f"{row['measured']:.2f}" if np.isfinite(row["measured"]) else "",
                "gain in time": _words(row, TIME_GAIN) if "time_gain" in row else "",
                "beyond the table": "yes" if row["beyond"] else "",
            }
            for row in self.table.to_dict("records")
        ]


def _words(values: Any, names: Sequence[str] | None = None) -> str:
    """Write a factor with its interval, of a row's columns or of three numbers."""
    value, low, high = values if names is None else (values[name] for name in names)
    return f"{value:.2f} [{low:.2f}, {high:.2f}]" if np.isfinite(value) else "not known"


def recipes(
    table: Table,
    *,
    by: str,
    baseline: str | None = None,
    y: str = "val_loss",
    beyond: float = BEYOND,
    law: str = "",
    fixed: Mapping[str, float] | None = None,
    columns: Mapping[str, str] | None = None,
) -> tuple[Recipes, ...]:
    """Tell the gain in compute of recipes over a baseline, by compute.

    Args:
        by: column that tells the recipes apart.
        baseline: recipe to compare with; None takes the paper's, else the one with most rows.
        y: column of the loss.
        beyond: factor beyond the largest compute up to which gains are told.
        law: law of compute that both recipes follow but for one gain, `power_offset:C` or `power:C`; empty takes it
            for short ladders alone (`effects.ladder`), and otherwise lets the gain change with compute.
        fixed: parameters of that law held at a value, such as E.
        columns: our name or a law's letter -> the name in the table, or a formula, as `read_table` takes them.

    Returns:
        A result per other recipe.

    Raises:
        AnalysisError: a missing column, a single recipe, or too few rows of one for a law.

    Example:
        >>> recipes(read_table("two.csv"), by="recipe")[0].table
    """
    runs = Runs(table, columns).with_compute()
    by, y = runs.column(by), runs.column(y)
    if by not in runs:
        raise runs.no_column(by)
    used = usable_rows(runs, {**{v: runs.column(v) for v in "NDC"}, "y": y})
    with_level = used.rows[used.rows[by].notna()]
    rows, which = main_part(with_level, free={by, *FOLLOWS.get(by, ())})
    others = len(with_level) - len(rows)
    text = f"{others} rows of other designs than {which} are left out."
    flags = [Flag(kind="design", subject=which, number=others, text=text)] * bool(which)
    numbers = used.numbers.loc[rows.index]
    if SPEED in rows:
        numbers = numbers.assign(speed=pd.to_numeric(rows[SPEED], errors="coerce"))
    if numbers.empty:
        raise AnalysisError(f"No row with a {by} has N, D, compute and a loss that are numbers; correct them.")
    level = level_names(rows[by])
    first = baseline_of(by, baseline, counts := level.value_counts())
    if len(counts) < 2:
        raise AnalysisError(f"All rows have {by} = {first}, so there is nothing to compare.")
    results = list[Recipes]()
    for other in counts.index[counts.index != first]:
        points = numbers[level.isin([first, other])].assign(G=(level == other).map({False: 1.0, True: 2.0}))
        names = {"by": by, "baseline": str(first), "level": str(other)}
        if law or fixed or is_short(points):
            results.append(_by_ladder(points, names, flags, beyond, fit_ladder(points, law or LADDER_LAWS[0], fixed)))
        else:
            results.append(_compared(points, names, flags, beyond))
    return tuple(results)


def _by_ladder(
    points: pd.DataFrame, names: Mapping[str, str], flags: Sequence[Flag], beyond: float, ladder: Ladder
) -> Recipes:
    """Tell the one gain of a short ladder."""
    inside = np.unique(shared_budgets(points))
    scales = np.append(inside, inside[-1] * beyond)
    ends = ladder.log_gain, ladder.log_gain - ladder.half, ladder.log_gain + ladder.half
    if ends[1] > 0 or ends[2] < 0:
        decision = f"nothing more: the gain is {'above' if ladder.log_gain > 0 else 'below'} 1"
    elif seeds := ladder.seeds():
        more = f"{seeds} more seed{'s' * (seeds > 1)} of both at every rung"
        decision = f"{more}, which tell a gain of {np.exp(ladder.log_gain):.2f} from 1 with probability {POWER}"
    else:
        decision = f"another rung: {LADDER_SEEDS} more seeds do not tell a gain of {np.exp(ladder.log_gain):.2f} from 1"
    measured = ladder.measured(points)
    flag = _one_gain(ladder, *ladder.trend(measured))
    columns = dict(zip(GAIN, np.exp(ends), strict=True)) | {"measured": np.exp(measured.reindex(scales).to_numpy())}
    n, d = _along(points, scales, cost_of(points))
    return Recipes(
        **names,
        table=pd.DataFrame({"C": scales, "N": n, "D": d, **columns, "beyond": scales > inside[-1]}),
        trend=(np.nan,) * 3,
        trend_p=np.nan,
        crossover=np.nan,
        law=ladder.law,
        flags=(*flags, flag, *ladder.law.flags),
        probability=ladder.probability,
        decision=decision,
    )


def _one_gain(ladder: Ladder, change: float, chance: float) -> Flag:
    """Flag that a ladder has one gain for all compute: the more so where the measured ones change with it."""
    one = f"One gain for all compute ({ladder.law.law.formula})"
    if chance > ALARM:
        return Flag(kind="one_gain", text=f"{one}: so few rungs hardly tell whether it changes with compute.")
    text = (
        f"The gains measured at the rungs change with compute, x {change:.2f} for each factor of ten "
        f"({p_value(chance)}), which one gain cannot follow: do not carry it beyond the table; six rungs or more tell "
        "how it goes on."
    )
    return Flag(kind="gain_changes", number=change, p=chance, text=text)


def _along(points: pd.DataFrame, flops: Array, cost: Cost) -> tuple[Array, Array]:
    """Return N and D of amounts of compute (m,), in the points' mean ratio."""
    ratio = float(np.exp(np.mean(np.log(points["D"] / points["N"]))))
    n = (flops / (cost.kappa * ratio)) ** (1 / (2 + cost.s))
    return n, ratio * n


def _compared(points: pd.DataFrame, names: Mapping[str, str], flags: Sequence[Flag], beyond: float) -> Recipes:
    """Tell the gains of two recipes, called by their column, the baseline and the level."""
    cost = cost_of(points)
    gains = measured_gains(points, cost)
    inside = np.unique(gains.flops)
    if gains.law or len(inside) > MOST_BUDGETS:
        inside = np.geomspace(inside[0], inside[-1], NUM_SCALES)
    scales = np.append(inside, inside[-1] * beyond ** np.array([0.5, 1.0]))
    constant, line = (smooth(gains, scales, with_line=each) for each in (False, True))
    # no trend inside the table but one that is told; beyond it one may go on, end, or begin
    is_told, beyond_table = line.trend_p <= ALARM, scales > inside[-1]
    value = (constant.value + line.value) / 2 if is_told else constant.value
    curve, both = line if is_told else constant, beyond_table | is_told
    low: Array = np.where(both, np.minimum(constant.low, line.low), constant.low)
    high: Array = np.where(both, np.maximum(constant.high, line.high), constant.high)
    measured = gains.near(inside).reindex(range(len(scales))).to_numpy()
    hidden = unidentified(gains.law.law, gains.law.variables(gains.law.data)) if gains.law else frozenset()
    lost = ", ".join(sorted(EXPONENTS & hidden))
    top = len(inside) - 1
    half = (high[top] - low[top]) / 2
    outside = int(np.sum((measured < low) | (measured > high)))
    flags = [*flags, *(gains.law.flags if gains.law else ())]
    if lost:
        value = low = high = np.full(len(scales), np.nan)
        decision = f"more sizes or amounts of data: {lost} is not identified"
    elif not gains.law and outside > max(1, MISSED * len(inside)):
        text = f"{outside} of the gains at {len(inside)} budgets lie outside the interval of their curve."
        flags.append(Flag(kind="off_curve", number=outside, text=text))
        decision = "nothing can be told: see the caution about budgets outside the interval"
    else:
        spread = curve.spread(top)
        decision = _decision(gains, spread, (value[top], low[top], high[top]), cost)
    columns = dict(zip((*GAIN, "measured"), np.exp([value, low, high, measured]), strict=True))
    columns |= _in_time(points, value, low, high)
    n, d = _along(gains.rows, scales, cost)
    return Recipes(
        **names,
        table=pd.DataFrame({"C": scales, "N": n, "D": d, **columns, "beyond": beyond_table}),
        trend=line.trend,
        trend_p=line.trend_p,
        crossover=_crossover(inside, value, low, high) if is_told else float("nan"),
        law=gains.law,
        flags=tuple(flags),
        probability=float(t_below(value[top] / half * half_width(1.0, np.array(curve.degrees)), curve.degrees)),
        decision=decision,
    )


def _in_time(points: pd.DataFrame, value: Array, low: Array, high: Array) -> dict[str, Array]:
    """Return the gain in time with its interval by those of the gain in compute; nothing where no speed is known."""
    if (speed := _speed(points)) is None:
        return {}
    faster, half = value + speed[0], half_width(*speed[1:])
    ends = faster, faster - np.hypot(value - low, half), faster + np.hypot(high - value, half)
    return dict(zip(TIME_GAIN, np.exp(ends), strict=True))


def _speed(points: pd.DataFrame) -> tuple[float, float, float] | None:
    """Return the logarithm of the level's images/s over the baseline's at equal size, its standard error over sizes and
    degrees of freedom; None where fewer than two sizes tell it."""
    if "speed" not in points:
        return None
    logs = np.log(points["speed"].where(points["speed"] > 0))
    baseline, level = (logs[points["G"] == group].groupby(points["N"]).mean() for group in (1.0, 2.0))
    apart = (level - baseline).dropna()
    return (apart.mean(), apart.sem(), len(apart) - 1.0) if len(apart) > 1 else None


def _decision(gains: Gains, spread: Spread, top: tuple[float, float, float], cost: Cost) -> str:
    """Say which further pairs of runs, at one size and amount of data, would tell for least compute that the gain at
    the table's largest compute (its logarithm and interval) is not one: in 80 % of repetitions, if it is as found."""
    value, low, high = top
    if low > 0 or high < 0:
        return f"nothing more: at the table's largest compute the gain is {'above' if value > 0 else 'below'} 1"
    n, d = gains.rows[["N", "D"]].to_numpy().T
    needed = t_quantile([0.5 + CONFIDENCE / 2, POWER], spread.degrees).sum()
    offers = list[tuple[float, ...]]()
    for seeds in range(1, MOST_SEEDS + 1):
        told = needed * spread.after(seeds) < abs(value)
        offers += [(seeds * float(cost.flops(n[i], d[i])), seeds, n[i], d[i]) for i in np.flatnonzero(told)]
    if not offers:
        return f"larger sizes: {MOST_SEEDS} more seeds at one size do not tell a gain of {np.exp(value):.2f} from 1"
    _, num, size, samples = min(offers)
    more = f"{num:.0f} more seed{'s' * (num > 1)} of both at N = {human(size)}, D = {human(samples)}"
    return f"{more}, which tell a gain of {np.exp(value):.2f} from 1 with probability {POWER}"


def _crossover(flops: Array, value: Array, low: Array, high: Array) -> float:
    """Find the compute (m,) at which the gain (its logarithm and interval) crosses 1; NaN where it is not known to lie
    on both sides inside the table."""
    m, logs = len(flops), np.log(flops)
    if low[:m].max() > 0 > high[:m].min():
        i = int(np.flatnonzero(np.diff(np.sign(value[:m])))[0])
        return float(np.exp(logs[i] - value[i] * (logs[i + 1] - logs[i]) / (value[i + 1] - value[i])))
    return float("nan")
