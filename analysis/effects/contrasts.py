"""Contrasts of a column's levels with everything else equal: rows are paired over size, data, seed and the rest.

Budgets of the same two runs share most of their training, so their differences are averaged first: a pair of runs
counts once. From three sizes on the interval covers others like them; of one or two it speaks of these alone. Either is
for the test images that the runs share. A single pair of runs a size has no interval.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd

from aimscale.analysis.display import Flag, flag_words, option, some
from aimscale.analysis.effects.result import Contrast, Contrasts, baseline_of, level_names, mean_over_pairs, verdict_of
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.table.measures import Measure, long_format, wanted_measures
from aimscale.analysis.table.runs import Runs, Table
from aimscale.analysis.table.schema import FOLLOWS, HEAD, is_plain, varies

OTHER_UNIT = ("target", "patch_size", "image_size")
"""Columns whose levels have losses that cannot be subtracted, beside all fields of the objective."""
SCALES = ("params_total", "images_seen", "unique_images", "N", "D", "U")
"""Columns of scale, which pairs share to within `SAME_SCALE`."""
SAME_SCALE = 1e-3
CAUTIONS = {
    "prefix": ("unseen_prefix", "Every model is validated with a bidirectional prefix; some were trained without one."),
    "patch_order": (
        "other_patches",
        "Each order scores different patches after the prefix, so losses measure different tasks.",
    ),
    **dict.fromkeys(
        ("head_rule", "head_depth", "model.head_kind"),
        ("equal_images", "Equal images, not equal compute: a deeper or larger head costs more per image."),
    ),
}
"""Column -> kind and sentence of the flag about its losses."""


def contrast(
    table: Table,
    *,
    by: str,
    baseline: str | None = None,
    measures: Sequence[str] = (),
    ignore: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
) -> Contrasts:
    """Compare the levels of a column with everything else equal.

    Args:
        by: a column.
        baseline: level to compare with; None takes the paper's, else the one with most rows.
        measures: `val_loss` or another numeric column, `top1`, `top1:TASK`, `top1:TASK:KIND`; empty takes the
            validation loss and every probe.
        ignore: columns that may differ within a pair.
        columns: our name or a law's letter -> the name in the table, or a formula, as `read_table` takes them.

    Returns:
        A difference per measure and level, with its interval and its minimum detectable effect.

    Raises:
        AnalysisError: no such column, fewer than two levels, or nothing is paired; the sentence says what differs.

    Example:
        >>> table = read_table("results.parquet")
        >>> contrast(table, by="size").table
    """
    runs = Runs(table, columns)
    by = runs.column(by)
    rows = (runs if by == "params_total" else runs.with_size()).complete()
    if by in rows and not is_plain(rows[by]):
        raise AnalysisError(f"{by} holds lists, which cannot be compared; name a column of numbers or words.")
    wanted = wanted_measures(rows, measures)
    keys, parts = _keys(rows, by, [runs.column(name) for name in ignore], {m.column for m in wanted})
    long = long_format(rows, wanted, by)
    long = long.assign(**{name: one_scale(long[name]) for name in SCALES if name in keys})
    long = long.assign(level=level_names(long[by]))
    baseline, *levels = _levels(long, by, wanted, baseline)
    asked, flags = _comparable(wanted, by)
    contrasts, missing = list[Contrast](), defaultdict[tuple[str, str, str], list[str]](list)
    for m, level in itertools.product(asked, levels):
        sides = {each: long[(long["measure"] == m.name) & (long["level"] == each)] for each in (baseline, level)}
        pairs = next((each for on in ([*keys, *parts], keys) if len(each := _pairs(sides, on))), None)
        if pairs is not None:
            contrasts.append(_compared(pairs, m, baseline, level))
        else:
            missing[_why_unpaired(by, sides, keys)].append(m.title)
    flags += [
        Flag(kind=kind, subject=of, text=f"{some(each)}: {reason}") for (kind, of, reason), each in missing.items()
    ]
    if not contrasts:
        raise AnalysisError(" ".join(flag_words(flags)))
    if by in CAUTIONS:
        flags.append(Flag(kind=CAUTIONS[by][0], subject=by, text=CAUTIONS[by][1]))
    if any(not each.over for each in contrasts):
        text = "With one pair of runs per size the spread of seeds is unknown, so there is no interval; run more seeds."
        flags.append(Flag(kind="one_pair", text=text))
    if any(each.over == "runs" and each.num_sizes for each in contrasts):
        text = "Fewer than three sizes: intervals hold for these sizes only; run more sizes to cover others."
        flags.append(Flag(kind="these_sizes", text=text))
    equal = tuple(rows.called(name) for name in keys if varies(rows[name]))
    return Contrasts(by=by, baseline=baseline, equal=equal, contrasts=tuple(contrasts), flags=tuple(flags))


def _comparable(asked: list[Measure], by: str) -> tuple[list[Measure], list[Flag]]:
    """Return the measures whose levels can be subtracted, and a flag about the loss where it is left out."""
    if not (by in OTHER_UNIT or by.startswith("objective.")):  # `objective.prefix` has a column of its own
        return asked, []
    kept = [m for m in asked if m.column != "val_loss"]
    text = f"Losses at different {by} have different targets or images, so they are not compared."
    if not kept:
        raise AnalysisError(f"Nothing can be compared over {by}. {text}")
    return kept, [Flag(kind="other_unit", subject=by, text=text)] * (len(kept) < len(asked))


def _keys(runs: Runs, by: str, ignore: Sequence[str], measured: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the columns that a pair must share, and those that it shares where that leaves any pair.

    The latter are what else there is of a head, where one part of it is compared. Columns of a single value tell no
    pair from another; the size alone stays, which says what an interval covers.
    """
    if unknown := [name for name in ignore if name not in runs]:
        raise runs.no_column(unknown[0], " to ignore")
    rows = runs.frame
    settings = [name for name in ("size", *runs.settings(measured)) if name in rows and by in rows]
    # a column may be `by` under another name, as a model's name and its size are
    same = [n for n in settings if len(rows[[by, n]].drop_duplicates()) == rows[by].nunique() == rows[n].nunique()]
    keys = runs.held_equal({by, *FOLLOWS.get(by, ()), *same, *ignore, *measured})
    field = by.split(".")[-1]
    parts = [n for n in HEAD if by in HEAD and n in rows and n not in keys and n.split(".")[-1] != field]
    several = {name for name in (*keys, *parts) if name == "size" or len(pd.unique(rows[name])) > 1}
    return [n for n in keys if n in several] or keys[:1], [n for n in parts if n in several]


def _levels(long: pd.DataFrame, by: str, asked: Sequence[Measure], baseline: str | None) -> list[str]:
    """Return the levels as words, two at least: the baseline, then the others, numbers in order."""
    present = long.drop_duplicates("level").dropna(subset="level")
    numbers = pd.to_numeric(present[by], errors="coerce")
    order = (numbers if numbers.notna().all() else present["level"]).argsort()
    levels = present["level"].iloc[order].tolist()
    if len(levels) < 2:
        alone = f"{by} = {levels[0]} alone has" if levels else "no row has"
        raise AnalysisError(f"Nothing can be compared: {alone} values of {some([m.title for m in asked])}.")
    first = baseline_of(by, baseline, long["level"].value_counts()[levels])
    return [first, *(level for level in levels if level != first)]


def one_scale(numbers: pd.Series) -> pd.Series:
    """Give numbers that differ by less than `SAME_SCALE` the smallest of theirs: batches seldom divide a budget."""
    values = np.sort(numbers.dropna().unique().astype(float))
    first = np.r_[True, values[1:] > values[:-1] * (1 + SAME_SCALE)][: len(values)]
    return numbers.map(dict(zip(values, values[first][np.cumsum(first) - 1], strict=True)))


def _pairs(sides: Mapping[str, pd.DataFrame], keys: list[str]) -> pd.DataFrame:
    """Return the pairs (`Contrast.pairs`) of rows of the baseline and the level that agree in keys."""
    means = (side.groupby(keys, dropna=False, sort=False)["value"].mean().reset_index() for side in sides.values())
    one, other = (side.astype(dict.fromkeys(keys, object)) for side in means)  # a column may mix types
    names = {"value_x": "baseline_value", "value_y": "level_value"}
    pairs = one.merge(other, on=keys).rename(columns=names)
    pairs["difference"] = pairs["level_value"] - pairs["baseline_value"]
    runs = [name for name in keys if name != "images_seen"]
    return pairs.assign(run_pair=pairs.groupby(runs, dropna=False, sort=False).ngroup() if runs else 0)


def _compared(pairs: pd.DataFrame, measure: Measure, baseline: str, level: str) -> Contrast:
    groups, mean, ratios = pairs.groupby("run_pair"), mean_over_pairs(pairs["difference"], pairs), [np.nan] * 3
    baseline_mean, level_mean = groups[["baseline_value", "level_value"]].mean().mean().tolist()
    if not measure.is_accuracy and (pairs[["level_value", "baseline_value"]] > 0).all(axis=None):
        logs = mean_over_pairs((pairs["level_value"] / pairs["baseline_value"]).map(np.log), pairs)
        ratios = np.exp([logs.difference, logs.low, logs.high]).tolist()
    return Contrast(
        measure=measure,
        baseline=baseline,
        level=level,
        num_pairs=len(pairs),
        num_run_pairs=groups.ngroups,
        num_sizes=pairs["size"].nunique() if "size" in pairs else 0,
        baseline_mean=baseline_mean,
        level_mean=level_mean,
        **vars(mean),
        ratio=ratios[0],
        ratio_low=ratios[1],
        ratio_high=ratios[2],
        verdict=verdict_of(mean, lower_is_better=measure.lower_is_better),
        pairs=pairs,
    )


def _why_unpaired(by: str, sides: Mapping[str, pd.DataFrame], keys: list[str]) -> tuple[str, str, str]:
    """Say why no rows of the baseline and a level are paired: kind, level and words of a flag.

    Named are the columns in which the two never agree, with their values; else all in which rows differ.
    """
    if empty := [level for level, side in sides.items() if side.empty]:
        return "absent", empty[0], f"no value at {by} = {empty[0]}."
    values = {name: [sorted({*level_names(side[name].dropna())}) for side in sides.values()] for name in keys}
    shown = [f"{name} ({some(one)} against {some(other)})" for name, (one, other) in values.items()
             if (one or other) and not {*one} & {*other}]  # fmt: skip
    shown = shown or [name for name, both in values.items() if len({*itertools.chain(*both)}) > 1]
    baseline, level = sides
    text = f"nothing is paired between {by} = {baseline} and {level}, which differ in {some(shown)}; run both with the "
    return "unpaired", level, f"{text}same, or {option('ignore')} that column."
