"""What one change does with everything else equal: levels of a column, paired over size, data, seed and the rest.

Two rows are a pair when they agree in every other column of the design and stand at two levels of the one in question.
Budgets of the same two runs share most of their training, so their differences are averaged first: a pair of runs
counts once. From three sizes on the interval is over sizes and budgets, and covers others like them. Of one or two it
is over the pairs of runs at these sizes, and speaks of these alone. Either is for the test images that the runs share.
What other images would change is told beside it, and is all that is known from a single pair of runs a size
(`effects.paired`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.display import Drawing, Result, plain_fields
from aimscale.analysis.effects.paired import LEAST_SIZES, POWER, Mean, Paired, hits_of, mean_over_pairs, paired
from aimscale.analysis.errors import AnalysisError, option
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
from aimscale.analysis.words import Flag, did_you_mean, flag_words, p_value, some

USUAL = {"prefix": "paired", "target": "normalised", "patch_order": "raster", "head_rule": "proportional",
         KIND: "attentive"}  # fmt: skip
"""Column -> the level that the paper uses, the baseline unless another is named; fields of the set-up default to it."""
OTHER_UNIT = ("target", "patch_size", "image_size")
"""Columns whose levels have losses that cannot be subtracted, beside all fields of the objective."""
_EQUAL_IMAGES = "equal_images", "Equal images, not equal compute: a deeper or larger head costs more per image."
CAUTIONS = {
    "prefix": (
        "unseen_prefix",
        "Validation gives every model a bidirectional prefix; a model trained without one never saw any.",
    ),
    "patch_order": (
        "other_patches",
        "Each order scores other patches after the prefix, so their losses measure different tasks.",
    ),
    **dict.fromkeys((*HEAD[:2], "model.head_kind"), _EQUAL_IMAGES),
}
"""Column -> kind and sentence of the flag about its losses."""
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
    """Pairs of runs: budgets of the same two runs are averaged first."""
    num_sizes: int
    """Sizes of the pairs, clusters of the interval from three on; 0 where sizes are compared or not known."""
    num_budgets: int
    """Budgets that are clusters of the interval, too; 0 where it speaks of these budgets alone."""
    degrees: float
    """Degrees of freedom of the interval; NaN where it is over test images, or there is none."""
    baseline_mean: float
    """Mean of the measure at the baseline, over pairs of runs."""
    level_mean: float
    difference: float
    """Mean of level minus baseline."""
    low: float
    """Lower end of its interval (see `over`); NaN where nothing tells one."""
    high: float
    ratio: float
    """Geometric mean of level over baseline; NaN where a value is not positive."""
    ratio_low: float
    ratio_high: float
    detectable: float
    """Minimum detectable effect: the true difference that would be significant in 80 % of repetitions."""
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
        """Reach of the interval: `sizes` like these, `runs` of these very sizes, `test images` of these very runs, or
        nothing."""
        if np.isnan(self.degrees):
            return "test images" if self.images else ""
        return "sizes" if self.num_sizes >= LEAST_SIZES else "runs"

    @property
    def scope(self) -> str:
        """Pairs, sizes and budgets that the interval is over, and those that it speaks of alone."""
        runs = "one pair of runs" if self.num_run_pairs == 1 else f"{self.num_run_pairs} pairs of runs"
        of_rows = self.num_pairs > self.num_run_pairs
        runs += f" ({self.num_pairs} of rows)" if of_rows else ""
        if self.over == "":
            return f"from {runs}{' of different sizes' * (self.num_sizes > 1)}, so without an interval"
        if self.images is not None and self.over == "test images":
            return f"over the {self.images.num_images:,} test images of {runs}"
        alone = (
            [] if self.over == "sizes" else ["", "this size", "these two sizes"][self.num_sizes : self.num_sizes + 1]
        )
        alone += ["these budgets"] * (of_rows and not self.num_budgets)
        runs += f" at {self.num_sizes} sizes" if self.over == "sizes" else ""
        runs += f" and {self.num_budgets} budgets" if self.num_budgets else ""
        runs += f", for {' and '.join(filter(None, alone))}" if any(alone) else ""
        return f"over {runs} ({self.degrees:.3g} degrees of freedom)"

    @property
    def interval_words(self) -> str:
        """Ends of the interval in the measure's unit."""
        return f"[{self.measure.shown_difference(self.low)}, {self.measure.shown_difference(self.high)}]"

    @property
    def ratio_words(self) -> str:
        """Ratio with its interval; empty where there is none."""
        return "" if math.isnan(self.ratio) else f"{self.ratio:.4f} [{self.ratio_low:.4f}, {self.ratio_high:.4f}]"

    def sentence(self) -> str:
        """Tell the difference, its interval and reach, and the minimum detectable effect where not significant."""
        m, is_over_images = self.measure, self.over == "test images"
        text = f"{m.title}: {m.shown(self.level_mean)} with {self.level}, {m.shown(self.baseline_mean)} with "
        text += f"{self.baseline}, difference {m.shown_difference(self.difference)}"
        if not self.over:
            return f"{text}, {self.scope}."
        text += f" {self.interval_words}"
        text += f", ratio {self.ratio_words}" if self.ratio_words and not is_over_images else ""
        text += f", {self.scope}"
        if self.images is not None and not is_over_images:
            text += f", on these test images (others: ±{m.shown_size(self.images.half)})"
        elif self.images is not None and not math.isnan(self.images.p):
            text += f", McNemar {p_value(self.images.p)}"
        if self.is_significant:
            return f"{text}: {self.level} is {self.verdict}."
        effect = f"minimum detectable effect {m.shown_size(self.detectable)} at {100 * POWER:.0f} % power"
        return f"{text}: {self.verdict} ({effect})."

    headline = sentence

    def row(self, by: str) -> dict[str, str]:
        """Write a row of a table of contrasts of the column `by`."""
        m, known = self.measure, bool(self.over)
        over = "1 pair" if self.num_run_pairs == 1 else f"{self.num_run_pairs} pairs"
        over += f", {self.images.num_images:,} images" if self.over == "test images" and self.images else ""
        return {
            "measure": m.title,
            by: self.level,
            "difference": m.shown_difference(self.difference),
            "95 % interval": self.interval_words if known else "",
            "over": over,
            "sizes": str(self.num_sizes or ""),
            "d.f.": "" if math.isnan(self.degrees) else f"{self.degrees:.3g}",
            "verdict": self.verdict if known else "no interval",
            "detectable": m.shown_size(self.detectable) if known and not self.is_significant else "",
            "mean": m.shown(self.level_mean),
            "baseline": m.shown(self.baseline_mean),
            "ratio": self.ratio_words if known else "",
        }


@dataclass(frozen=True, kw_only=True, repr=False)
class Contrasts(Result):
    """All levels of a column against the baseline."""

    plot = Drawing("intervals.plot_contrasts")

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

    def rows_at(self, level: str) -> pd.DataFrame:
        """Return the rows of a level."""
        return self.rows[self.rows[self.by].map(level_name, na_action="ignore") == level]

    def facts(self) -> list[tuple[str, str]]:
        """Return flags, what is compared, what is equal within a pair."""
        return [
            *(("with care", each) for each in flag_words(self.flags)),
            ("compared", self.headline()),
            ("equal", ", ".join(self.equal) or "no other column varies"),
            ("intervals", f"95 %, {some([*dict.fromkeys(each.scope for each in self.contrasts)])}"),
        ]

    def cells(self) -> list[dict[str, str]]:
        """Return one row per measure and level."""
        return [each.row(self.by) for each in self.contrasts]

    @property
    def table(self) -> pd.DataFrame:
        """One row per measure and level."""
        return pd.concat([each.table for each in self.contrasts], ignore_index=True)

    def headline(self) -> str:
        """Name the column and the baseline."""
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
    _check_levels(rows, by)
    asked, flags = _comparable(wanted_measures(rows, measures, by), by)
    keys, parts = _keys(rows, by, [our_name(frame, name) for name in ignore], {m.column for m in asked})
    long = long_format(rows, asked, by)
    is_probe = long["measure"].str.startswith("top1:")
    long = long.assign(level=long[by].map(level_name, na_action="ignore"), hits=hits_of(long).where(is_probe, None))
    levels = _levels(long, by, asked)
    baseline = _baseline(long["level"], by, levels, baseline)
    found, missing = list[Contrast](), list[tuple[str, str, str, tuple[str, ...]]]()
    for m in asked:
        cells = long[long["measure"] == m.name]
        for level in (each for each in levels if each != baseline):
            sides = [cells[cells["level"] == each] for each in (baseline, level)]
            if absent := [name for name, side in zip((baseline, level), sides, strict=True) if side.empty]:
                missing.append((m.title, "absent", absent[0], ()))
            elif (pairs := _pairs(sides, keys, parts)).empty:
                missing.append((m.title, "unpaired", level, _differs(sides, keys)))
            else:
                found.append(_compared(pairs, m, baseline, level))
    flags += _reasons(missing, by, baseline)
    if not found:
        raise AnalysisError(" ".join(flag_words(flags)))
    if by in CAUTIONS:
        kind, text = CAUTIONS[by]
        flags.append(Flag(kind=kind, subject=by, text=text))
    if any(each.over == "test images" for each in found):
        text = "One pair of runs a size: the interval covers the test images, not seeds; run more seeds."
        flags.append(Flag(kind="one_pair", text=text))
    if any(each.over == "runs" and each.num_sizes for each in found):
        text = "Fewer than three sizes: intervals speak of these sizes alone; run more sizes to tell of others."
        flags.append(Flag(kind="these_sizes", text=text))
    equal = tuple(their_name(rows, name) for name in keys if varies(rows[name]))
    return Contrasts(by=by, baseline=baseline, equal=equal, contrasts=tuple(found), flags=tuple(flags), rows=rows)


def factors(frame: pd.DataFrame) -> list[str]:
    """List the columns that `contrast` may compare in a table: those of the design that vary, and probe kinds."""
    names = [*(name for name in DESIGN if name not in MEASURED_ON), *setup_columns(frame)]
    varied = [name for name in names if name in frame and varies(frame[name])]
    if set(HEAD) & set(varied):  # the actual depth tells the heads apart; it varies with size alone otherwise
        head = "head_depth" if "head_depth" in frame and varies(frame["head_depth"]) else "head_rule"
        head = "model.head_width" if set(HEAD) & set(varied) == {"model.head_width"} else head
        varied = [head, *[name for name in varied if name not in HEAD]]
    return [*varied, KIND]


def level_name(value: Any) -> str:
    """Write a level as a reader does: 6, not 6.0."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def _check_levels(rows: pd.DataFrame, by: str) -> None:
    if by in rows and not is_plain(rows[by]):
        raise AnalysisError(f"{by} holds lists, which cannot be compared; name a column of numbers or words.")
    if by in rows and not varies(rows[by]):
        values = ", ".join(map(level_name, rows[by].dropna().unique())) or "no value"
        raise AnalysisError(f"All complete rows have {by} = {values}; a contrast needs two levels of it.")


def _comparable(asked: list[Measure], by: str) -> tuple[list[Measure], list[Flag]]:
    """Return the measures whose levels can be subtracted, and a flag about the loss where it is left out."""
    is_other = by in OTHER_UNIT or by.startswith("objective.")  # `objective.prefix` has a column of its own
    kept = [m for m in asked if not (is_other and m.column == "val_loss")]
    text = f"Losses at different {by} have different targets or images, so they are not compared."
    flags = [Flag(kind="other_unit", subject=by, text=text)] if len(kept) < len(asked) else []
    if not kept:
        raise AnalysisError(f"Nothing can be compared over {by}. {' '.join(map(str, flags))}".rstrip())
    return kept, flags


def _keys(rows: pd.DataFrame, by: str, ignore: Sequence[str], measured: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the columns that a pair must share, and those that it shares where that leaves any pair.

    The latter are what else there is of a head, where one part of it is compared. Columns of a single value tell no
    pair from another; the size alone stays, which says what an interval covers.
    """
    if unknown := [name for name in ignore if name not in rows]:
        raise AnalysisError(f"The table has no column {unknown[0]!r} to ignore; {column_words(rows, unknown[0])}")
    if by == KIND:
        keys = [name for name in ("run_id", *SCALE) if name in rows]
    else:
        settings = [name for name in ("size", *foreign_settings(rows, measured)) if name in rows and by in rows]
        # a column may be `by` under another name, as a model's name and its size are
        same = [n for n in settings if len(rows[[by, n]].drop_duplicates()) == rows[by].nunique() == rows[n].nunique()]
        keys = held_equal(rows, {by, *FOLLOWS.get(by, ()), *same, *ignore, *measured})
    parts = [n for n in HEAD if by in HEAD and n in rows and n not in keys and n.split(".")[-1] != by.split(".")[-1]]
    several = [name for name in keys if name == "size" or len(pd.unique(rows[name])) > 1]
    return several or keys[:1], [name for name in parts if len(pd.unique(rows[name])) > 1]


def _levels(long: pd.DataFrame, by: str, asked: Sequence[Measure]) -> list[str]:
    """Return the levels as words, numbers in order; two at least."""
    present = long[by].dropna().unique()
    numbers = pd.to_numeric(pd.Series(present), errors="coerce")
    order = np.argsort(numbers) if numbers.notna().all() else np.argsort([str(v) for v in present])
    levels = list(dict.fromkeys(level_name(present[i]) for i in order))
    if len(levels) < 2:
        alone = f"{by} = {levels[0]} alone has" if levels else "no row has"
        raise AnalysisError(f"Nothing can be compared: {alone} values of {some([m.title for m in asked])}.")
    return levels


def _baseline(names: pd.Series, by: str, levels: list[str], wish: str | None) -> str:
    if wish is not None and wish not in levels:
        raise AnalysisError(f"{by} has no level {wish!r}; {did_you_mean(wish, levels, 'its levels are')}")
    counts, usual = names.value_counts(), USUAL.get(by, DEFAULT)
    most = max(levels, key=lambda level: (counts[level], -levels.index(level)))
    return wish or (usual if usual in levels else most)


def _pairs(sides: Sequence[pd.DataFrame], keys: list[str], parts: list[str]) -> pd.DataFrame:
    """Return the pairs of one contrast (`Contrast.pairs`, with their hits).

    Args:
        sides: rows of the baseline and of the level.
        keys: columns that a pair must share.
        parts: columns that it shares where that leaves any pair.
    """
    pairs, on = pd.DataFrame(), keys
    for on in ([*keys, *parts], keys):
        means = [_means(side, on).astype(dict.fromkeys(on, object)) for side in sides]  # a column may mix types
        pairs = means[0].merge(means[1], on=on, suffixes=("_baseline", "_level"))
        if not pairs.empty:
            break
    pairs = pairs.rename(columns={"value_baseline": "baseline_value", "value_level": "level_value"})
    pairs["difference"] = pairs["level_value"] - pairs["baseline_value"]
    runs = [name for name in on if name != "images_seen"]
    return pairs.assign(run_pair=pairs.groupby(runs, dropna=False).ngroup() if runs else 0)


def _means(side: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Return the mean value of every cell, and its hits where every cell is one row."""
    if not side.duplicated(keys).any():
        return side[[*keys, "value", "hits"]]
    return side.groupby(keys, dropna=False)["value"].mean().reset_index().assign(hits=None)


def _compared(pairs: pd.DataFrame, measure: Measure, baseline: str, level: str) -> Contrast:
    groups = pairs.groupby("run_pair")
    means = groups[["baseline_value", "level_value"]].mean().mean()
    weights = 1 / (groups.ngroups * groups["difference"].transform("size"))
    images = paired(pairs.pop("hits_baseline").tolist(), pairs.pop("hits_level").tolist(), weights.tolist())
    mean = mean_over_pairs(pairs["difference"], pairs)
    (low, high), detectable = mean.ends, mean.detectable
    if np.isnan(mean.degrees) and images is not None:
        low, high, detectable = images.low, images.high, images.detectable
    values = pairs[["level_value", "baseline_value"]]
    log_ratio = Mean(np.nan, np.nan, np.nan)
    if not measure.is_accuracy and (values > 0).all(axis=None):
        log_ratio = mean_over_pairs(np.log(values["level_value"] / values["baseline_value"]), pairs)
    ratio, ratio_low, ratio_high = np.exp([log_ratio.value, *log_ratio.ends]).tolist()
    is_better = (mean.value < 0) == measure.lower_is_better
    return Contrast(
        measure=measure,
        baseline=baseline,
        level=level,
        num_pairs=len(pairs),
        num_run_pairs=groups.ngroups,
        num_sizes=pairs["size"].nunique() if "size" in pairs else 0,
        num_budgets=mean.num_budgets,
        degrees=mean.degrees,
        baseline_mean=float(means["baseline_value"]),
        level_mean=float(means["level_value"]),
        difference=mean.value,
        low=low,
        high=high,
        ratio=ratio,
        ratio_low=ratio_low,
        ratio_high=ratio_high,
        detectable=detectable,
        images=images,
        verdict=ALIKE if not (low > 0 or high < 0) else BETTER if is_better else WORSE,
        pairs=pairs,
    )


def _differs(sides: Sequence[pd.DataFrame], keys: list[str]) -> tuple[str, ...]:
    """Return columns in which the two levels never agree, with their values; else all in which rows differ."""
    apart = []
    for name in keys:
        values = [set(side[name].dropna().unique()) for side in sides]
        if any(values) and not set.intersection(*values):
            shown = [sorted(map(level_name, each)) for each in values]
            apart.append(f"{name} ({' against '.join(map(some, shown))})")
    return tuple(apart or [name for name in keys if varies(pd.concat([side[name] for side in sides]))])


def _reasons(missing: Iterable[tuple[str, str, str, tuple[str, ...]]], by: str, baseline: str) -> Iterator[Flag]:
    """Say why measures lack levels: a flag for all measures that lack the same levels for one kind of reason.

    Args:
        missing: title of a measure, kind of the reason, a level, and columns in which it differs.
    """
    columns = ["title", "kind", "level", "apart"]
    of_title = pd.DataFrame(missing, columns=columns).groupby(["title", "kind"], sort=False, as_index=False).agg(tuple)
    for (kind, levels, apart), alike in of_title.groupby(["kind", "level", "apart"], sort=False)["title"]:
        titles, names = some(alike.tolist()), list(dict.fromkeys(levels))
        differ = list(dict.fromkeys(column for each in apart for column in each))
        if len(names) > 1:  # the columns alone
            differ = list(dict.fromkeys(column.split(" (")[0] for column in differ))
        told = names[0] if len(names) == 1 else f"{len(names)} levels ({some(names)})"
        text = f"{titles}: no value at {by} = {told}."
        if kind == "unpaired":
            text = (
                f"{titles}: nothing is paired between {by} = {baseline} and {told}, which differ in {some(differ)}; "
                f"run both with the same, or {option('ignore')} that column."
            )
        yield Flag(kind=kind, subject=told, number=len(names), text=text)
