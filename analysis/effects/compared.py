"""What a comparison with everything else equal hands back: differences with intervals, in words and as tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Result, plain_types
from aimscale.analysis.table.measures import Measure

if TYPE_CHECKING:
    from aimscale.analysis.effects.gains import Gain


@dataclass(frozen=True, kw_only=True, repr=False)
class Contrast(Result):
    """One level against the baseline, in one measure."""

    measure: Measure
    baseline: str
    """Level that is subtracted."""
    level: str
    num_pairs: int
    num_run_pairs: int
    """Pairs of runs, over which the interval is: budgets of the same two runs are averaged first."""
    baseline_mean: float
    """Mean of the measure at the baseline, over pairs of runs."""
    level_mean: float
    difference: float
    """Mean of level minus baseline."""
    low: float
    """Lower end of its interval; NaN with a single pair of runs."""
    high: float
    ratio: float
    """Geometric mean of level over baseline; NaN where a value is not positive."""
    ratio_low: float
    ratio_high: float
    detectable: float
    """Size of a true difference that would have been seen with probability 0.8; NaN with a single pair."""
    confidence: float
    pairs: pd.DataFrame = field(repr=False)
    """One row per pair of rows: the columns held equal, baseline and level value, difference, run_pair."""
    by_scale: pd.DataFrame = field(repr=False)
    """The difference per size and per budget: column, value, num_run_pairs, difference, low, high."""

    @property
    def table(self) -> pd.DataFrame:
        """One row: the measure, the levels, their difference and ratio with intervals, the verdict."""
        skip = {"measure", "pairs", "by_scale", "confidence"}
        fields = {k: v for k, v in vars(self).items() if k not in skip}
        return pd.DataFrame([{"measure": self.measure.name, **fields, "verdict": self.verdict}])

    def headline(self) -> str:
        """The difference in words."""
        return self.sentence()

    @property
    def is_shown(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `not shown to differ`."""
        if not self.is_shown:
            return "not shown to differ"
        return "better" if (self.difference < 0) == self.measure.lower_is_better else "worse"

    def sentence(self) -> str:
        """Difference, interval, pairs, what could have been seen, and where the sign is the other one."""
        m = self.measure
        values = f"{m.shown(self.level_mean)} against {m.shown(self.baseline_mean)}"
        head = f"{m.title}: {self.level} {values}, difference {m.shown_difference(self.difference)}"
        if self.num_run_pairs < 2:
            return f"{head}, from one pair of runs: no interval, so nothing is shown."
        text = f"{head} [{m.shown_difference(self.low)}, {m.shown_difference(self.high)}]"
        if np.isfinite(self.ratio):
            text += f", ratio {self.ratio:.4f} [{self.ratio_low:.4f}, {self.ratio_high:.4f}]"
        runs = f"{self.num_run_pairs} pairs of runs"
        rows = f" ({self.num_pairs} of rows)" if self.num_pairs > self.num_run_pairs else ""
        text += f", over {runs}{rows}: {self.level} is {self.verdict}{self._other_way()}."
        if self.verdict == "not shown to differ":
            text += f" A true difference of {m.shown_size(self.detectable)} would have been seen four times in five."
        return text

    def _other_way(self) -> str:
        """Sizes and budgets whose mean difference has the other sign."""
        sign = np.sign(self.difference)
        parts = []
        for column, word in (("size", "at size"), ("images_seen", "at D =")):
            rows = self.by_scale[self.by_scale["column"] == column]
            other = rows[np.sign(rows["difference"]) == -sign]
            if len(other) and len(rows) > 1:
                named = ", ".join(str(v) if column == "size" else f"{float(v):,.0f}" for v in other["value"])
                parts.append(f"{word} {named}")
        return f"; the sign is the other one {' and '.join(parts)}" if parts else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        skip = {"measure", "pairs", "by_scale"}
        return {
            "measure": self.measure.name,
            "unit": self.measure.unit,
            **{key: value for key, value in vars(self).items() if key not in skip},
            "verdict": self.verdict,
            "by_scale": self.by_scale.to_dict("records"),
            "pairs": self.pairs.astype(object).where(self.pairs.notna(), None).to_dict("records"),
            "sentence": self.sentence(),
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
    left_out: tuple[str, ...]
    """What was not compared, and why, in sentences."""
    caution: str
    """What to know about this column's losses, or an empty string."""
    gains: tuple[Gain, ...] = ()
    """What each level is worth in compute (`effects.gains.with_gains`)."""

    def sentences(self) -> list[str]:
        """In words."""
        equal = ", ".join(self.equal) or "no other column varies"
        lines = [f"{self.by}, against {self.baseline}, with everything else equal ({equal}):"]
        lines += [f"- {each.sentence()}" for each in self.contrasts]
        lines += [f"- {each.sentence()}" for each in self.gains]
        lines += [self.caution] if self.caution else []
        num = sum(each.num_run_pairs > 1 for each in self.contrasts)
        if num >= 5:
            lines.append(f"{num} intervals at 95 %: about {num / 20:.1g} of them miss zero by chance alone.")
        return [*lines, *self.left_out]

    @property
    def table(self) -> pd.DataFrame:
        """One row per measure and level."""
        return pd.concat([each.table for each in self.contrasts], ignore_index=True)

    def headline(self) -> str:
        """Column and baseline."""
        return f"{self.by} against {self.baseline}, everything else equal"

    def summary(self) -> str:
        """The sentences, one a line."""
        return "\n".join(self.sentences())

    def lines_by_scale(self) -> list[str]:
        """The differences per size and per budget, as tables."""
        lines = []
        for each in self.contrasts:
            if len(each.by_scale) and each.num_run_pairs > 1:
                lines += ["", f"{each.measure.title}, {each.level} minus {each.baseline}, by size and by images seen:"]
                lines.append(each.by_scale.to_string(index=False, float_format=lambda v: f"{v:.4g}"))
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return plain_types(
            {
                "by": self.by,
                "baseline": self.baseline,
                "equal": list(self.equal),
                "contrasts": [each.to_dict() for each in self.contrasts],
                "gains": [each.to_dict() for each in self.gains],
                "left_out": list(self.left_out),
                "caution": self.caution,
            }
        )
