"""What one change does with everything else equal: levels of a column, paired over size, data, seed and the rest.

Two rows are a pair when they agree in every other column of the design and stand at two levels of the one in question.
Budgets of the same two runs share a trunk, so their differences are averaged first: a pair of runs counts once, and the
interval is Student's over pairs of runs (sizes x seeds). With three pairs it is wide, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from aimscale.analysis.effects.compared import Contrast, Contrasts
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.fitting.errors import sandwich
from aimscale.analysis.table.design import (
    DESIGN,
    MEASURED_ON,
    SCALE,
    foreign_settings,
    held_equal,
    setup_columns,
    varies,
    with_size,
)
from aimscale.analysis.table.measures import BLOCKS, KIND, Measure, long_format, wanted_measures
from aimscale.analysis.table.names import column_names, our_name, their_name
from aimscale.analysis.table.points import complete

HEAD = ("head_rule", "head_depth", "head_width", "model.head_depth", "model.head_width")
FOLLOWS = {
    **dict.fromkeys(HEAD, HEAD),
    "schedule": ("schedule.decay_fraction", "schedule.lr_end"),
    "image_size": ("patch_size", *MEASURED_ON),
    "patch_size": ("image_size",),
    "size": ("head_depth", "head_width", "lr_peak", "batch_size"),
}
"""Column in question -> columns that change with it and so cannot be held equal."""
USUAL = {"prefix": "paired", "target": "normalised", "patch_order": "raster", "head_rule": "proportional",
         KIND: "attentive", BLOCKS: "last"}  # fmt: skip
"""Column -> the level that the paper uses, the baseline unless another is named."""
OTHER_UNIT = {"target": "are errors of other targets", "patch_size": "are means over other patches",
              "image_size": "are measured on other pictures"}  # fmt: skip
"""Column whose levels have losses that cannot be subtracted, and why."""
CAUTION = {
    "prefix": "The validation loss gives every model a bidirectional prefix, which one trained without has never seen.",
    "patch_order": "Orders score other patches after the same prefix length, so their losses differ in what is asked.",
    "head_depth": "Equal images, not equal compute: a deeper head costs more per image.",
    "head_rule": "Equal images, not equal compute: a larger head costs more per image.",
}
"""Column -> what a reader should know about its losses."""
POWER_Z = 0.8
"""Power at which the smallest effect that could have been seen is stated."""


def contrast(
    frame: pd.DataFrame,
    *,
    by: str,
    baseline: str | None = None,
    measures: Sequence[str] = (),
    ignore: Sequence[str] = (),
    confidence: float = 0.95,
) -> Contrasts:
    """Compare the levels of a column with everything else equal.

    Args:
        by: a column; `kind` for kinds of probes and `blocks` for the chosen blocks against the last ones, both within a
            row.
        baseline: level to compare with; None takes the paper's, else the one with most rows.
        measures: `val_loss` or another numeric column, `top1`, `top1:TASK`, `top1:TASK:KIND`; empty takes the
            validation loss and every probe.
        ignore: columns that may differ within a pair.

    Raises:
        AnalysisError: no such column, fewer than two levels, or nothing is paired; the sentence says what differs.
    """
    by = by if by in (KIND, BLOCKS) else our_name(frame, by)
    frame = frame if by == "params_total" else with_size(frame)
    ignore = [our_name(frame, name) for name in ignore]
    rows = complete(frame)
    if by in rows and not varies(rows[by]):
        values = [level_name(value) for value in rows[by].dropna().unique()]
        taken = f"the single value {values[0]}" if values else "no value"
        raise AnalysisError(f"{by} takes {taken} among the complete rows, so there is nothing to compare; vary it.")
    asked = wanted_measures(rows, measures, by)
    left_out: list[str] = []
    if by in OTHER_UNIT and any(m.column == "val_loss" for m in asked):
        asked = [m for m in asked if m.column != "val_loss"]
        left_out.append(f"Losses at different {by} {OTHER_UNIT[by]}, so they are not compared.")
    if not asked:
        raise AnalysisError(f"Nothing can be compared over {by}. {' '.join(left_out)}".rstrip())
    keys = _keys(rows, by, ignore, {m.column for m in asked})
    long = long_format(rows, asked, by)
    levels = _levels(long[by])
    if len(levels) < 2:
        alone = f"{by} = {levels[0]} alone has" if levels else "no row has"
        raise AnalysisError(f"Nothing can be compared: {alone} values of {', '.join(m.title for m in asked)}.")
    baseline = _baseline(long, by, levels, baseline)
    found: list[Contrast] = []
    why: dict[str, list[str]] = {}  # reason -> the measures that have it
    for m in asked:
        for level in levels:
            if level == baseline:
                continue
            one = _one(long[long["measure"] == m.name], m, by, keys, baseline, level, confidence)
            if isinstance(one, str):
                why.setdefault(one, []).append(m.title)
            else:
                found.append(one)
    left_out += [f"{', '.join(titles)}: {reason}" for reason, titles in why.items()]
    if not found:
        raise AnalysisError(" ".join(_some_lines(left_out)))
    equal = tuple(their_name(rows, name) for name in keys if varies(rows[name]))
    return Contrasts(
        by=by,
        baseline=baseline,
        equal=equal,
        contrasts=tuple(found),
        left_out=_some_lines(left_out),
        caution=CAUTION.get(by, ""),
    )


def factors(frame: pd.DataFrame) -> list[str]:
    """Columns that `contrast` may compare in a table: those of the design that vary, probe kinds and blocks."""
    varied = [name for name in (*DESIGN, *setup_columns(frame)) if name in frame and varies(frame[name])]
    if set(HEAD) & set(varied):  # the actual depth tells the heads apart; it varies with size alone otherwise
        head = "head_depth" if "head_depth" in frame and varies(frame["head_depth"]) else "head_rule"
        varied = [head, *[name for name in varied if name not in HEAD]]
    return [*varied, KIND, BLOCKS]


def _some_lines(lines: list[str], limit: int = 5) -> tuple[str, ...]:
    """The first few different ones."""
    different = list(dict.fromkeys(lines))
    more = (f"And {len(different) - limit} more like these.",) if len(different) > limit else ()
    return (*different[:limit], *more)


def _keys(rows: pd.DataFrame, by: str, ignore: Sequence[str], measured: set[str]) -> list[str]:
    """Columns that a pair must share."""
    unknown = [name for name in ignore if name not in rows]
    if unknown:
        raise AnalysisError(f"The table has no column {unknown[0]!r} to ignore; it has {column_names(rows)}.")
    if by in (KIND, BLOCKS):
        return [name for name in ("run_id", *SCALE[:6]) if name in rows]
    names = held_equal(rows, free={by, *FOLLOWS.get(by, ()), *ignore, *measured})
    foreign = foreign_settings(rows, measured)
    return [name for name in names if name not in ("size", *foreign) or by not in rows or not _is_one(rows, by, name)]


def _is_one(rows: pd.DataFrame, one: str, other: str) -> bool:
    """Whether two columns are one under two names, such as a model's name and its size."""
    return len(rows[[one, other]].drop_duplicates()) == rows[one].nunique() == rows[other].nunique()


def _levels(values: pd.Series) -> list[str]:
    """Levels as words, numbers in order."""
    present = values.dropna().unique()
    numbers = pd.to_numeric(pd.Series(present), errors="coerce")
    order = np.argsort(numbers) if numbers.notna().all() else np.argsort([str(v) for v in present])
    return list(dict.fromkeys(level_name(present[i]) for i in order))


def level_name(value: Any) -> str:
    """A level as a reader writes it: 6, not 6.0."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def _baseline(long: pd.DataFrame, by: str, levels: list[str], wish: str | None) -> str:
    if wish is not None:
        if wish not in levels:
            raise AnalysisError(f"{by} takes {', '.join(levels)}, not {wish!r}; choose the baseline from these.")
        return wish
    if USUAL.get(by) in levels:
        return USUAL[by]
    counts = long[by].dropna().map(level_name).value_counts()
    return max(levels, key=lambda level: (counts[level], -levels.index(level)))


def _one(
    long: pd.DataFrame, measure: Measure, by: str, keys: list[str], baseline: str, level: str, confidence: float
) -> Contrast | str:
    """One contrast, or a sentence why there is none."""
    names = long[by].map(level_name, na_action="ignore")
    sides = [long[names == each] for each in (baseline, level)]
    if min(map(len, sides)) == 0:
        absent = baseline if sides[0].empty else level
        return f"no value at {by} = {absent}."
    means = [side.groupby(keys, dropna=False)["value"].mean().reset_index() for side in sides]
    pairs = means[0].merge(means[1], on=keys, suffixes=("_baseline", "_level"))
    pairs = pairs.rename(columns={"value_baseline": "baseline_value", "value_level": "level_value"})
    if pairs.empty:
        return f"nothing is paired between {by} = {baseline} and {level}; {_why(sides, keys)}"
    pairs["difference"] = pairs["level_value"] - pairs["baseline_value"]
    runs = [name for name in keys if name != "images_seen"]
    pairs["run_pair"] = pairs.groupby(runs, dropna=False).ngroup() if runs else 0
    by_run = pairs.groupby("run_pair")[["baseline_value", "level_value", "difference"]].mean()
    size_of = pairs.groupby("run_pair")["size"].first() if "size" in pairs else None
    centre, low, high, se = grouped_interval(by_run["difference"].to_numpy(), size_of, confidence)
    ratio: tuple[float, ...] = (np.nan, np.nan, np.nan)
    positive = (pairs[["baseline_value", "level_value"]] > 0).all(axis=None)
    if positive and measure.has_ratio:
        logs = pairs["level_value"].div(pairs["baseline_value"]).map(np.log).groupby(pairs["run_pair"]).mean()
        ratio = tuple(float(np.exp(v)) for v in grouped_interval(logs.to_numpy(), size_of, confidence)[:3])
    spare = len(by_run) - 1
    needed = student.ppf(0.5 + confidence / 2, spare) + student.ppf(POWER_Z, spare) if spare else np.nan
    return Contrast(
        measure=measure,
        baseline=baseline,
        level=level,
        num_pairs=len(pairs),
        num_run_pairs=len(by_run),
        baseline_mean=float(by_run["baseline_value"].mean()),
        level_mean=float(by_run["level_value"].mean()),
        difference=centre,
        low=low,
        high=high,
        ratio=ratio[0],
        ratio_low=ratio[1],
        ratio_high=ratio[2],
        detectable=float(needed * se),
        confidence=confidence,
        pairs=pairs,
        by_scale=_by_scale(pairs, confidence),
    )


def grouped_interval(
    values: np.ndarray, groups: pd.Series | None, confidence: float
) -> tuple[float, float, float, float]:
    """`t_interval` that allows for what pairs of a group (a size) share, such as a rate that suits one level better.

    Groups of one pair each, or fewer than three groups, tell nothing of that.
    """
    codes = None if groups is None else np.unique(groups.astype(str), return_inverse=True)[1]
    if codes is None or not 3 <= codes.max() + 1 < len(values) or np.ptp(values) == 0:
        return t_interval(values, confidence)
    n, centre = len(values), float(np.mean(values))
    found = sandwich(np.ones((n, 1)), values - centre, np.ones(n), codes)
    (se,), (degrees,) = found.of_contrasts(np.ones((1, 1)))
    half = float(student.ppf(0.5 + confidence / 2, degrees) * se)
    return centre, centre - half, centre + half, float(se)


def t_interval(values: np.ndarray, confidence: float) -> tuple[float, float, float, float]:
    """Mean, Student's interval and standard error of independent values; NaN ends for a single one."""
    centre, n = float(np.mean(values)), len(values)
    if n < 2:
        return centre, np.nan, np.nan, np.nan
    se = float(np.std(values, ddof=1) / np.sqrt(n))
    half = float(student.ppf(0.5 + confidence / 2, n - 1)) * se
    return centre, centre - half, centre + half, se


def _by_scale(pairs: pd.DataFrame, confidence: float) -> pd.DataFrame:
    rows = []
    for column in ("size", "images_seen"):
        if column not in pairs or not varies(pairs[column]):
            continue
        for value, group in pairs.groupby(column, sort=column != "size"):
            means = group.groupby("run_pair")["difference"].mean()
            centre, low, high, _ = t_interval(means.to_numpy(), confidence)
            row = {"column": column, "value": value, "num_run_pairs": len(means), "difference": centre}
            rows.append({**row, "low": low, "high": high})
    return pd.DataFrame(rows, columns=["column", "value", "num_run_pairs", "difference", "low", "high"])


def _why(sides: list[pd.DataFrame], keys: list[str]) -> str:
    """Columns in which the two levels never agree, each or with the others equal."""
    apart = []
    for name in keys:
        ours, theirs = (set(side[name].dropna().unique()) for side in sides)
        if (ours or theirs) and not ours & theirs:
            apart.append(f"{name} ({_some(ours)} against {_some(theirs)})")
    if apart:
        return f"their rows never agree in {', '.join(apart)}; run both with the same, or --ignore that column."
    for name in keys:
        rest = [key for key in keys if key != name]
        near = sides[0].merge(sides[1], on=rest) if rest else sides[0].merge(sides[1], how="cross")
        if len(near):
            ours, theirs = (set(near[f"{name}_{side}"].dropna().unique()) for side in "xy")
            return (
                f"rows that agree in all else differ in {name} ({_some(ours)} against {_some(theirs)}); run both with "
                "the same, or --ignore that column."
            )
    varied = [name for name in keys if len(pd.concat([side[name] for side in sides]).unique()) > 1]
    return f"no row of one agrees with a row of the other in all of {', '.join(varied)}."


def _some(values: set[Any]) -> str:
    names = sorted(level_name(value) for value in values)
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") if names else "none"
