"""Differences of one change, over pairs of runs: a level of a column against the baseline, in every measure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Flag, Result, by_chance, did_you_mean, flag_words, some
from aimscale.analysis.distributions import t_quantile
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.covariance import Covariance, current_level, level_words, linear_design, sandwich
from aimscale.analysis.table.groups import groups_of
from aimscale.analysis.table.measures import Measure
from aimscale.analysis.table.schema import DEFAULT, SCRATCH

USUAL = {
    "prefix": "paired",
    "target": "normalised",
    "patch_order": "raster",
    "head_rule": "proportional",
    "init": SCRATCH,
}
"""Column -> the level that the paper uses, the baseline unless another is named; fields of the set-up default to it."""
BETTER, WORSE, ALIKE = "better", "worse", "no significant difference"
"""Verdicts."""
POWER = 0.8
"""Power of a minimum detectable effect."""
LEAST_SIZES = 3
"""Fewer sizes leave one degree of freedom or none to tell by how much sizes differ."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Mean of a difference over pairs of runs, with its interval; NaN where nothing tells its error."""

    difference: float
    low: float
    high: float
    detectable: float
    """Minimum detectable effect: the true difference that would be significant in 80 % of repetitions."""
    degrees: float
    """Degrees of freedom of the interval."""
    confidence: float
    """Level of the interval."""
    num_budgets: int
    """Budgets that are clusters of the interval; 0 where it speaks of these budgets alone."""


def mean_over_pairs(values: pd.Series, pairs: pd.DataFrame) -> Mean:
    """Average differences over pairs of runs, with an error that holds as far as the pairs reach.

    A size or a budget may suit one level better. So from three sizes on the variance is the sum of those clustered by
    sizes and, from three budgets on, by budgets (`fitting.covariance`), and the interval covers others like them. Two
    sizes do not tell how much sizes differ: the error is then that of pairs about the mean of their size (Student's,
    pooled), for these sizes alone. One pair a size has none.

    Args:
        values: a difference per pair of rows.
        pairs: `run_pair`, and `size` and `images_seen` where they are known and not what is compared.
    """
    runs = values.groupby(pairs["run_pair"])
    y, n, num_budgets = runs.mean().to_numpy(float), runs.ngroups, 0
    sizes = pairs.groupby("run_pair")["size"].first().map(str) if "size" in pairs else np.zeros(n)
    codes, names = pd.factorize(sizes)
    mean = float(y.mean())
    if len(names) >= LEAST_SIZES:
        clustered = {"sizes": sandwich(linear_design(np.ones((n, 1)), np.ones(n)), y - mean, codes)}
        budgets = groups_of(pairs, {}).get("budgets")
        if budgets is not None and budgets.max() + 1 >= LEAST_SIZES:
            num_budgets = int(budgets.max()) + 1
            design = linear_design(np.ones((len(pairs), 1)), 1 / runs.transform("size").to_numpy(float))
            clustered["budgets"] = sandwich(design, values.to_numpy(float) - mean, budgets)
        (se,), (degrees,) = Covariance(by=clustered).of_contrasts(np.ones((1, 1)))
    else:
        degrees = n - len(names) or np.nan
        within = y - pd.Series(y).groupby(codes).transform("mean").to_numpy()
        se = np.sqrt(within @ within / degrees / n)
    confidence = current_level()
    half, more = (se * t_quantile([0.5 + confidence / 2, POWER], degrees)).tolist()
    ends = {"low": mean - half, "high": mean + half, "detectable": half + more}
    return Mean(difference=mean, **ends, degrees=float(degrees), confidence=confidence, num_budgets=num_budgets)


def verdict_of(mean: Mean, *, lower_is_better: bool) -> str:
    """Say whether a difference is one for the better, unless its interval holds zero or is not known."""
    if not (mean.low > 0 or mean.high < 0):
        return ALIKE
    return BETTER if (mean.difference < 0) == lower_is_better else WORSE


@dataclass(frozen=True, kw_only=True, repr=False)
class Contrast(Mean, Result):
    """One level against the baseline, in one measure; the mean is of level minus baseline."""

    measure: Measure
    baseline: str
    level: str
    num_pairs: int
    num_run_pairs: int
    """Pairs of runs: budgets of the same two runs are averaged first."""
    num_sizes: int
    """Sizes of the pairs, clusters of the interval from three on; 0 where sizes are compared or not known."""
    baseline_mean: float
    level_mean: float
    ratio: float
    """Geometric mean of level over baseline; NaN where a value is not positive."""
    ratio_low: float
    ratio_high: float
    verdict: str
    pairs: pd.DataFrame = field(repr=False)
    """One row per pair of rows: the columns held equal that vary, baseline and level value, difference, run_pair."""

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes zero."""
        return self.verdict != ALIKE

    @property
    def table(self) -> pd.DataFrame:
        """One row: the measure, the levels, their difference and ratio with intervals, the verdict."""
        first = {"measure": self.measure.name, "baseline": self.baseline, "level": self.level}
        values = {k: v for k, v in vars(self).items() if k not in ("measure", "pairs")}
        return pd.DataFrame([first | values | {"over": self.over}])

    @property
    def over(self) -> str:
        """Reach of the interval: `sizes` like these, `runs` of these sizes, or nothing."""
        if np.isnan(self.degrees):
            return ""
        return "sizes" if self.num_sizes >= LEAST_SIZES else "runs"

    @property
    def scope(self) -> str:
        """Pairs, sizes and budgets that the interval is over, and those that it speaks of alone."""
        of_rows = self.num_pairs > self.num_run_pairs
        runs = "one pair of runs" if self.num_run_pairs == 1 else f"{self.num_run_pairs} pairs of runs"
        runs += f" ({self.num_pairs} of rows)" * of_rows
        if not self.over:
            return f"from {runs}{' of different sizes' * (self.num_sizes > 1)}, so without an interval"
        alone = ["these budgets"] * (of_rows and not self.num_budgets)
        if self.over == "sizes":
            runs += f" at {self.num_sizes} sizes"
        elif self.num_sizes:
            alone.insert(0, "this size" if self.num_sizes == 1 else "these two sizes")
        runs += f" and {self.num_budgets} budgets" * (self.num_budgets > 0)
        runs += f", for {' and '.join(alone)}" * bool(alone)
        return f"over {runs} ({self.degrees:.3g} degrees of freedom)"

    def sentence(self) -> str:
        """Tell what a row of the table does, and how far the interval reaches."""
        cells = {name: cell for name, cell in self.row("level").items() if cell and name not in ("measure", "over")}
        return f"{self.measure.title}: {', '.join(map(' '.join, cells.items()))}; {self.scope}."

    headline = sentence

    def row(self, by: str) -> dict[str, str]:
        """Write a row of a table of contrasts of the column `by`."""
        m, is_known = self.measure, bool(self.over)
        interval = f"[{m.shown_difference(self.low)}, {m.shown_difference(self.high)}]" * is_known
        ratio = "" if math.isnan(self.ratio) else f"{self.ratio:.4f} [{self.ratio_low:.4f}, {self.ratio_high:.4f}]"
        return {
            "measure": m.title,
            by: self.level,
            "difference": m.shown_difference(self.difference),
            f"{level_words(self.confidence)} interval": interval,
            "over": f"{self.num_run_pairs} pair{'s' * (self.num_run_pairs > 1)}",
            "sizes": str(self.num_sizes or ""),
            "d.f.": f"{self.degrees:.3g}" * is_known,
            "verdict": self.verdict if is_known else "no interval",
            "detectable": m.shown_size(self.detectable) if is_known and not self.is_significant else "",
            "mean": m.shown(self.level_mean),
            "baseline": m.shown(self.baseline_mean),
            "ratio": ratio * is_known,
        }


@dataclass(frozen=True, kw_only=True, repr=False)
class Contrasts(Result):
    """All levels of a column against the baseline."""

    by: str
    baseline: str
    equal: tuple[str, ...]
    """Columns that take several values and are equal within every pair."""
    contrasts: tuple[Contrast, ...]
    """One per measure and level."""
    flags: tuple[Flag, ...]
    """Levels that were not compared, with reasons, and cautions about this column's losses."""

    @property
    def table(self) -> pd.DataFrame:
        """One row per measure and level."""
        return pd.concat([each.table for each in self.contrasts], ignore_index=True)

    def headline(self) -> str:
        """Name the column and the baseline."""
        return f"{self.by}, against {self.baseline}"

    def facts(self) -> list[tuple[str, str]]:
        """Return flags, what is compared, what is equal within a pair."""
        confidence, scopes = self.contrasts[0].confidence, [*dict.fromkeys(each.scope for each in self.contrasts)]
        return [
            *(("caution", each) for each in flag_words(self.flags)),
            ("compared", self.headline()),
            ("equal", ", ".join(self.equal) or "no other column varies"),
            ("intervals", f"{level_words(confidence)}, {some(scopes)}"),
            ("significant", by_chance([each.is_significant for each in self.contrasts if each.over], confidence)),
        ]

    def cells(self) -> list[dict[str, str]]:
        """Return one row per measure and level."""
        return [each.row(self.by) for each in self.contrasts]


def level_names(values: pd.Series) -> pd.Series:
    """Write levels as a reader does: 6, not 6.0."""

    def name(value: Any) -> str:
        return str(int(value) if isinstance(value, float) and value.is_integer() else value)

    return values.map(name, na_action="ignore")


def baseline_of(by: str, named: str | None, counts: pd.Series) -> str:
    """Return the level of a column to compare with, of those that `counts` has rows of: the one named, else the
    paper's, else the one with most rows.

    Raises:
        AnalysisError: there is no level of that name.
    """
    if named is not None and named not in counts:
        raise AnalysisError(f"{by} has no level {named!r}; {did_you_mean(named, counts.index, 'its levels are')}")
    usual = USUAL.get(by, DEFAULT)
    return named or (usual if usual in counts else str(counts.idxmax()))
