"""What one change does with everything else equal: levels of a column, paired over size, data, seed and the rest.

Two rows are a pair when they agree in every other column of the design and stand at two levels of the one in question.
Budgets of the same two runs share most of their training, so their differences are averaged first: a pair of runs
counts once, and the interval is over pairs of runs (sizes x seeds), whose errors a size may share. It covers runs, on
the test images that they share. What other test images would change is told beside it, and is all that the interval of
a single pair of runs covers (`effects.paired`).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from aimscale.analysis.display import Result, plain_fields
from aimscale.analysis.effects.paired import Paired, hits_of, mean_of, paired
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.inference import CONFIDENCE
from aimscale.analysis.table.design import (
    DEFAULT,
    DESIGN,
    FOLLOWS,
    HEAD,
    MEASURED_ON,
    SCALE,
    foreign_settings,
    held_equal,
    is_plain,
    setup_columns,
    varies,
    with_size,
)
from aimscale.analysis.table.measures import KIND, Measure, long_format, wanted_measures
from aimscale.analysis.table.names import column_words, our_name, their_name
from aimscale.analysis.table.points import complete
from aimscale.analysis.words import POWER, Flag, contrast_cells, contrast_sentence, did_you_mean, flag_words, some

USUAL = {"prefix": "paired", "target": "normalised", "patch_order": "raster", "head_rule": "proportional",
         KIND: "attentive"}  # fmt: skip
"""Column -> the level that the paper uses, the baseline unless another is named; fields of the set-up default to it."""
OTHER_UNIT = ("target", "patch_size", "image_size")
"""Columns whose levels have losses that cannot be subtracted, beside all fields of the objective."""
CAUTION = {
    **{"prefix": "unseen_prefix", "patch_order": "other_patches"},
    **dict.fromkeys((*HEAD[:2], "model.head_kind"), "equal_images"),
}
"""Column -> kind of the flag about its losses."""
BETTER, WORSE, ALIKE = "better", "worse", "no significant difference"
"""Verdicts."""


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
    """Lower end of its interval: over pairs of runs, on the same test images; with a single pair over test images,
    for these very runs; NaN with a single pair where hits are missing."""
    high: float
    ratio: float
    """Geometric mean of level over baseline; NaN where a value is not positive."""
    ratio_low: float
    ratio_high: float
    detectable: float
    """Minimum detectable effect: the true difference that this interval leaves zero out for with probability 0.8."""
    images: Paired | None
    """The difference over test images, for these very runs; None without hits, or where test images differ."""
    verdict: str
    """`better`, `worse`, or `no significant difference`."""
    pairs: pd.DataFrame = field(repr=False)
    """One row per pair of rows: the columns held equal that vary, baseline and level value, difference, run_pair."""

    @property
    def is_significant(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.verdict != ALIKE

    @property
    def table(self) -> pd.DataFrame:
        """One row: the measure, the levels, their difference and ratio with intervals, the verdict."""
        own = {k: v for k, v in vars(self).items() if k not in ("measure", "pairs", "images")}
        images = {} if self.images is None else {f"images_{k}": v for k, v in plain_fields(self.images).items()}
        return pd.DataFrame([{"measure": self.measure.name, **own, "over": self.over, **images}])

    @property
    def over(self) -> str:
        """What the interval covers: `runs`, `test images`, or nothing."""
        return "runs" if self.num_run_pairs > 1 else "test images" if self.images else ""

    def sentence(self) -> str:
        """Difference, interval, what it is over, and the minimum detectable effect where it is not significant."""
        return contrast_sentence(self)

    headline = sentence


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
    """What was not compared and why, and what to know about this column's losses."""
    rows: pd.DataFrame = field(repr=False)
    """The complete rows of the table, with sizes."""

    def facts(self) -> list[tuple[str, str]]:
        """Flags, what is compared, what is equal within a pair."""
        return [
            *(("with care", each) for each in flag_words(self.flags)),
            ("compared", self.headline()),
            ("equal", ", ".join(self.equal) or "no other column varies"),
            ("intervals", "95 %, over pairs of runs; of a single pair over its test images"),
        ]

    def cells(self) -> list[dict[str, str]]:
        """One row per measure and level."""
        return [contrast_cells(each, self.by) for each in self.contrasts]

    @property
    def table(self) -> pd.DataFrame:
        """One row per measure and level."""
        return pd.concat([each.table for each in self.contrasts], ignore_index=True)

    def headline(self) -> str:
        """Column and baseline."""
        return f"{self.by}, against {self.baseline}"


def contrast(
    frame: pd.DataFrame,
    *,
    by: str,
    baseline: str | None = None,
    measures: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> Contrasts:
    """Compare the levels of a column with everything else equal.

    Args:
        by: a column; `kind` for kinds of probes within a row.
        baseline: level to compare with; None takes the paper's, else the one with most rows.
        measures: `val_loss` or another numeric column, `top1`, `top1:TASK`, `top1:TASK:KIND`; empty takes the
            validation loss and every probe.
        ignore: columns that may differ within a pair.

    Returns:
        A difference per measure and level, with its interval and its minimum detectable effect.

    Raises:
        AnalysisError: no such column, fewer than two levels, or nothing is paired; the sentence says what differs.

    Example:
        >>> table = read_table("results.parquet")
        >>> contrast(table, by="kind").table
    """
    by = by if by == KIND else our_name(frame, by)
    rows = complete(frame if by == "params_total" else with_size(frame))
    if by in rows and not is_plain(rows[by]):
        raise AnalysisError(f"{by} holds lists, which cannot be compared; name a column of numbers or words.")
    if by in rows and not varies(rows[by]):
        values = ", ".join(map(level_name, rows[by].dropna().unique())) or "no value"
        raise AnalysisError(f"All complete rows have {by} = {values}; a contrast needs two levels of it.")
    asked, flags = _comparable(wanted_measures(rows, measures, by), by)
    keys = _keys(rows, by, [our_name(frame, name) for name in ignore], {m.column for m in asked})
    # What else there is of a head may differ within a pair only where it has to.
    others = [n for n in HEAD if by in HEAD and n in rows and n not in keys and n.split(".")[-1] != by.split(".")[-1]]
    several = {n for n in (*keys, *others) if len(pd.unique(rows[n])) > 1}  # the others tell no pair from another
    keys, others = [n for n in keys if n in several] or keys[:1], [n for n in others if n in several]
    long = long_format(rows, asked, by)
    long = long.assign(hits=hits_of(long).where(long["measure"].str.startswith("top1:"), None))
    long = long[[by, *keys, *others, "measure", "value", "hits"]]
    levels = _levels(long, by, asked)
    baseline = _baseline(long, by, levels, baseline)
    found: list[Contrast] = []
    why: dict[str, dict[Flag, None]] = {}  # measure -> every reason why there is none
    rows_of = {m: long[long["measure"] == m.name] for m in asked}
    for m, level in itertools.product(asked, [each for each in levels if each != baseline]):
        of_measure = rows_of[m]
        one = _one(of_measure, m, by, [*keys, *others], baseline, level)
        if others and isinstance(one, Flag):
            one = _one(of_measure, m, by, keys, baseline, level)
        if isinstance(one, Contrast):
            found.append(one)
        else:
            why.setdefault(m.title, {})[one] = None
    flags += _reasons(why, by, baseline)
    if not found:
        raise AnalysisError(" ".join(flag_words(flags)))
    flags += [Flag(kind=CAUTION[by], subject=by)] if by in CAUTION else []
    flags += [Flag(kind="one_pair")] if any(each.over == "test images" for each in found) else []
    equal = tuple(their_name(rows, name) for name in keys if varies(rows[name]))
    return Contrasts(by=by, baseline=baseline, equal=equal, contrasts=tuple(found), flags=tuple(flags), rows=rows)


def factors(frame: pd.DataFrame) -> list[str]:
    """Columns that `contrast` may compare in a table: those of the design that vary, and probe kinds."""
    names = [*(name for name in DESIGN if name not in MEASURED_ON), *setup_columns(frame)]
    varied = [name for name in names if name in frame and varies(frame[name])]
    if set(HEAD) & set(varied):  # the actual depth tells the heads apart; it varies with size alone otherwise
        head = "head_depth" if "head_depth" in frame and varies(frame["head_depth"]) else "head_rule"
        head = "model.head_width" if set(HEAD) & set(varied) == {"model.head_width"} else head
        varied = [head, *[name for name in varied if name not in HEAD]]
    return [*varied, KIND]


def _comparable(asked: list[Measure], by: str) -> tuple[list[Measure], list[Flag]]:
    """The measures whose levels can be subtracted, and a flag about the loss where it is left out."""
    is_other = by in OTHER_UNIT or by.startswith("objective.")  # `objective.prefix` has a column of its own
    kept = [m for m in asked if not (is_other and m.column == "val_loss")]
    flags = [Flag(kind="other_unit", subject=by)] if len(kept) < len(asked) else []
    if not kept:
        raise AnalysisError(f"Nothing can be compared over {by}. {' '.join(map(str, flags))}".rstrip())
    return kept, flags


def _keys(rows: pd.DataFrame, by: str, ignore: Sequence[str], measured: Collection[str]) -> list[str]:
    """Columns that a pair must share."""
    if unknown := [name for name in ignore if name not in rows]:
        raise AnalysisError(f"The table has no column {unknown[0]!r} to ignore; {column_words(rows, unknown[0])}")
    if by == KIND:
        return [name for name in ("run_id", *SCALE) if name in rows]
    # a model's name and its size are one column under two names
    others = [name for name in ("size", *foreign_settings(rows, measured)) if name in rows and by in rows]
    same = [n for n in others if len(rows[[by, n]].drop_duplicates()) == rows[by].nunique() == rows[n].nunique()]
    return held_equal(rows, {by, *FOLLOWS.get(by, ()), *same, *ignore, *measured})


def _levels(long: pd.DataFrame, by: str, asked: Sequence[Measure]) -> list[str]:
    """Levels as words, numbers in order; two at least."""
    present = long[by].dropna().unique()
    numbers = pd.to_numeric(pd.Series(present), errors="coerce")
    order = np.argsort(numbers) if numbers.notna().all() else np.argsort([str(v) for v in present])
    levels = list(dict.fromkeys(level_name(present[i]) for i in order))
    if len(levels) < 2:
        alone = f"{by} = {levels[0]} alone has" if levels else "no row has"
        raise AnalysisError(f"Nothing can be compared: {alone} values of {some([m.title for m in asked])}.")
    return levels


def level_name(value: Any) -> str:
    """A level as a reader writes it: 6, not 6.0."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def _baseline(long: pd.DataFrame, by: str, levels: list[str], wish: str | None) -> str:
    if wish is not None:
        if wish not in levels:
            raise AnalysisError(f"{by} has no level {wish!r}; {did_you_mean(wish, levels, 'its levels are')}")
        return wish
    if (usual := USUAL.get(by, DEFAULT)) in levels:
        return usual
    counts = long[by].dropna().map(level_name).value_counts()
    return max(levels, key=lambda level: (counts[level], -levels.index(level)))


def _one(long: pd.DataFrame, measure: Measure, by: str, keys: list[str], baseline: str, level: str) -> Contrast | Flag:
    """One contrast, or why there is none: the level as the flag's subject, and what differs."""
    names = long[by].map(level_name, na_action="ignore")
    sides = [long[names == each] for each in (baseline, level)]
    if min(map(len, sides)) == 0:
        return Flag(kind="absent", subject=baseline if sides[0].empty else level)
    means = [_means(side, keys) for side in sides]
    words = dict.fromkeys(keys, object)  # a column may hold words on one side and numbers on the other
    pairs = means[0].astype(words).merge(means[1].astype(words), on=keys, suffixes=("_baseline", "_level"))
    pairs = pairs.rename(columns={"value_baseline": "baseline_value", "value_level": "level_value"})
    if pairs.empty:
        return Flag(kind="unpaired", subject=level, more=_differs(sides, keys))
    pairs["difference"] = pairs["level_value"] - pairs["baseline_value"]
    runs = [name for name in keys if name != "images_seen"]
    pairs["run_pair"] = pairs.groupby(runs, dropna=False).ngroup() if runs else 0
    groups = pairs.groupby("run_pair")
    means_of = groups[["baseline_value", "level_value", "difference"]].mean()
    size_of = groups["size"].first() if "size" in pairs else None
    weights = 1 / (len(means_of) * groups["difference"].transform("size"))
    images = paired(pairs.pop("hits_baseline").tolist(), pairs.pop("hits_level").tolist(), weights.tolist())
    centre, half, se, spare = mean_of(means_of["difference"], size_of)
    needed = student.ppf(0.5 + CONFIDENCE / 2, spare) + student.ppf(POWER, spare)
    low, high, detectable = centre - half, centre + half, float(needed * se)
    if len(means_of) == 1 and images is not None:
        low, high, detectable = images.low, images.high, images.detectable
    ratio: tuple[float, ...] = (np.nan, np.nan, np.nan)
    if not measure.is_accuracy and (pairs[["baseline_value", "level_value"]] > 0).all(axis=None):
        logs = pairs["level_value"].div(pairs["baseline_value"]).map(np.log).groupby(pairs["run_pair"]).mean()
        middle, width, *_ = mean_of(logs, size_of)
        ratio = tuple(float(np.exp(v)) for v in (middle, middle - width, middle + width))
    is_better = (centre < 0) == measure.lower_is_better
    return Contrast(
        measure=measure,
        baseline=baseline,
        level=level,
        num_pairs=len(pairs),
        num_run_pairs=len(means_of),
        baseline_mean=float(means_of["baseline_value"].mean()),
        level_mean=float(means_of["level_value"].mean()),
        difference=centre,
        low=low,
        high=high,
        ratio=ratio[0],
        ratio_low=ratio[1],
        ratio_high=ratio[2],
        detectable=detectable,
        images=images,
        verdict=ALIKE if not (low > 0 or high < 0) else BETTER if is_better else WORSE,
        pairs=pairs,
    )


def _means(side: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """The mean value of every cell, and its hits where every cell is one row."""
    if not side.duplicated(keys).any():
        return side[[*keys, "value", "hits"]]
    return side.groupby(keys, dropna=False)["value"].mean().reset_index().assign(hits=None)


def _differs(sides: list[pd.DataFrame], keys: list[str]) -> tuple[str, ...]:
    """Columns in which the two levels never agree, with their values; else all in which rows differ."""
    apart = []
    for name in keys:
        values = [set(side[name].dropna().unique()) for side in sides]
        if any(values) and not set.intersection(*values):
            shown = [sorted(map(level_name, each)) for each in values]
            apart.append(f"{name} ({' against '.join(map(some, shown))})")
    return tuple(apart or [name for name in keys if varies(pd.concat([side[name] for side in sides]))])


def _reasons(why: Mapping[str, Collection[Flag]], by: str, baseline: str) -> Iterator[Flag]:
    """Why there is no contrast: a flag for all levels of the measures that share a kind of reason."""
    alike: dict[tuple[Flag, ...], list[str]] = {}
    for title, flags in why.items():
        for kind in ("absent", "unpaired"):
            if same := tuple(flag for flag in flags if flag.kind == kind):
                alike.setdefault(same, []).append(title)
    for flags, titles in alike.items():
        levels, apart = [flag.subject for flag in flags], dict.fromkeys(each for flag in flags for each in flag.more)
        if len(flags) > 1:  # the columns alone
            apart = dict.fromkeys(str(each).split(" (")[0] for each in apart)
            levels = [f"{len(levels)} levels ({some(levels)})"]
        more = (some(titles), f"{by} = {baseline}", some([*map(str, apart)]), by)
        yield Flag(kind=flags[0].kind, subject=levels[0], number=len(flags), more=more)
