"""Contrasts of a column's levels with everything else equal: rows are paired over size, data, seed and the rest.

Budgets of the same two runs share most of their training, so their differences are averaged first: a pair of runs
counts once. From three sizes on the interval covers others like them; of one or two it speaks of these alone. Either is
for the test images that the runs share. What other images would change is told beside it, and is all that is known
from a single pair of runs a size (`effects.paired`).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import pandas as pd

from aimscale.analysis.effects.paired import Mean, hits_of, mean_over_pairs, paired
from aimscale.analysis.effects.result import ALIKE, BETTER, WORSE, Contrast, Contrasts, level_name
from aimscale.analysis.errors import AnalysisError, option
from aimscale.analysis.table import design
from aimscale.analysis.table.measures import KIND, Measure, long_format, wanted_measures
from aimscale.analysis.table.names import no_column, our_name, their_name
from aimscale.analysis.table.points import complete
from aimscale.analysis.words import Flag, did_you_mean, flag_words, some

USUAL = {"prefix": "paired", "target": "normalised", "patch_order": "raster", "head_rule": "proportional",
         KIND: "attentive"}  # fmt: skip
"""Column -> the level that the paper uses, the baseline unless another is named; fields of the set-up default to it."""
OTHER_UNIT = ("target", "patch_size", "image_size")
"""Columns whose levels have losses that cannot be subtracted, beside all fields of the objective."""
_HEAD = "equal_images", "Equal images, not equal compute: a deeper or larger head costs more per image."
_PREFIX = "Validation gives every model a bidirectional prefix; a model trained without one never saw any."
_ORDER = "Each order scores other patches after the prefix, so their losses measure different tasks."
CAUTIONS = {
    "prefix": ("unseen_prefix", _PREFIX),
    "patch_order": ("other_patches", _ORDER),
    **dict.fromkeys((*design.HEAD[:2], "model.head_kind"), _HEAD),
}
"""Column -> kind and sentence of the flag about its losses."""


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
    rows = complete(frame if by == "params_total" else design.with_size(frame))
    if by in rows and not design.is_plain(rows[by]):
        raise AnalysisError(f"{by} holds lists, which cannot be compared; name a column of numbers or words.")
    wanted = wanted_measures(rows, measures, by)
    keys, parts = _keys(rows, by, [our_name(frame, name) for name in ignore], {m.column for m in wanted})
    long = long_format(rows, wanted, by)
    is_probe = long["measure"].str.startswith("top1:")
    long = long.assign(level=long[by].map(level_name, na_action="ignore"), hits=hits_of(long).where(is_probe, None))
    levels = _levels(long, by, wanted)
    asked, flags = _comparable(wanted, by)
    baseline = _baseline(long["level"], by, levels, baseline)
    found, missing = list[Contrast](), list[tuple[str, str, str, tuple[str, ...]]]()
    for m, level in itertools.product(asked, (each for each in levels if each != baseline)):
        sides = [long[(long["measure"] == m.name) & (long["level"] == each)] for each in (baseline, level)]
        if absent := [name for name, side in zip((baseline, level), sides, strict=True) if side.empty]:
            missing.append((m.title, "absent", absent[0], ()))
            continue
        pairs = next((each for on in ([*keys, *parts], keys) if len(each := _pairs(sides, on))), None)
        if pairs is None:
            missing.append((m.title, "unpaired", level, _differs(sides, keys)))
        else:
            found.append(_compared(pairs, m, baseline, level))
    flags += _reasons(pd.DataFrame(missing, columns=["title", "kind", "level", "apart"]), by, baseline)
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
    equal = tuple(their_name(rows, name) for name in keys if design.varies(rows[name]))
    return Contrasts(by=by, baseline=baseline, equal=equal, contrasts=tuple(found), flags=tuple(flags), rows=rows)


def factors(frame: pd.DataFrame) -> list[str]:
    """List the columns that `contrast` may compare in a table: those of the design that vary, and probe kinds."""
    names = [*(name for name in design.DESIGN if name not in design.MEASURED_ON), *design.setup_columns(frame)]
    varied = [name for name in names if name in frame and design.varies(frame[name])]
    if set(design.HEAD) & set(varied):  # the actual depth tells the heads apart; else it varies with size alone
        head = "head_depth" if "head_depth" in frame and design.varies(frame["head_depth"]) else "head_rule"
        head = "model.head_width" if set(design.HEAD) & set(varied) == {"model.head_width"} else head
        varied = [head, *[name for name in varied if name not in design.HEAD]]
    return [*varied, KIND]


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
        raise no_column(rows, unknown[0], " to ignore")
    if by == KIND:
        keys = [name for name in ("run_id", *design.SCALE) if name in rows]
    else:
        settings = [name for name in ("size", *design.foreign_settings(rows, measured)) if name in rows and by in rows]
        # a column may be `by` under another name, as a model's name and its size are
        same = [n for n in settings if len(rows[[by, n]].drop_duplicates()) == rows[by].nunique() == rows[n].nunique()]
        keys = design.held_equal(rows, {by, *design.FOLLOWS.get(by, ()), *same, *ignore, *measured})
    own = by.split(".")[-1]
    parts = [n for n in design.HEAD if by in design.HEAD and n in rows and n not in keys and n.split(".")[-1] != own]
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
    counts, usual = names.value_counts(), USUAL.get(by, design.DEFAULT)
    most = max(levels, key=lambda level: (counts[level], -levels.index(level)))
    return wish or (usual if usual in levels else most)


def _pairs(sides: Sequence[pd.DataFrame], keys: list[str]) -> pd.DataFrame:
    """Return the pairs (`Contrast.pairs`, with their hits) of rows of the baseline and the level that agree in keys."""
    cells = []
    for side, name in zip(sides, ("baseline", "level"), strict=True):
        groups = side.groupby(keys, dropna=False, sort=False)
        means = groups.agg(value=("value", "mean"), hits=("hits", "first")).reset_index()
        means["hits"] = means["hits"].where((groups.size() == 1).to_numpy(), None)
        cells.append(means.astype(dict.fromkeys(keys, object)).rename(columns={"value": f"{name}_value", "hits": name}))
    pairs = cells[0].merge(cells[1], on=keys)  # as objects: a column may mix types
    pairs["difference"] = pairs["level_value"] - pairs["baseline_value"]
    runs = [name for name in keys if name != "images_seen"]
    return pairs.assign(run_pair=pairs.groupby(runs, dropna=False, sort=False).ngroup() if runs else 0)


def _compared(pairs: pd.DataFrame, measure: Measure, baseline: str, level: str) -> Contrast:
    groups = pairs.groupby("run_pair")
    means = groups[["baseline_value", "level_value"]].mean().mean()
    weights = 1 / (groups.ngroups * groups["difference"].transform("size"))
    images = paired(pairs.pop("baseline").tolist(), pairs.pop("level").tolist(), weights.tolist())
    mean = mean_over_pairs(pairs["difference"], pairs)
    (low, high), detectable = mean.ends, mean.detectable
    if np.isnan(mean.degrees) and images is not None:
        low, high, detectable = images.low, images.high, images.detectable
    log_ratio = Mean(np.nan, np.nan, np.nan)
    if not measure.is_accuracy and (pairs[["level_value", "baseline_value"]] > 0).all(axis=None):
        log_ratio = mean_over_pairs((pairs["level_value"] / pairs["baseline_value"]).map(np.log), pairs)
    ratios = np.exp([log_ratio.value, *log_ratio.ends]).tolist()
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
        **dict(zip(("ratio", "ratio_low", "ratio_high"), ratios, strict=True)),
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
    return tuple(apart or [name for name in keys if design.varies(pd.concat([side[name] for side in sides]))])


def _reasons(missing: pd.DataFrame, by: str, baseline: str) -> Iterator[Flag]:
    """Say why measures lack levels: a flag for all measures that lack the same levels for one kind of reason."""
    of_level = missing.groupby(["kind", "level"], sort=False).agg({"title": tuple, "apart": "sum"}).reset_index()
    lost = of_level.groupby(["kind", "title"], sort=False).agg({"level": list, "apart": "sum"}).reset_index()
    for kind, titles, levels, apart in lost.itertuples(index=False, name=None):
        told, columns = levels[0], some([*dict.fromkeys(apart)])
        if len(levels) > 1:
            told = f"{len(levels)} levels ({some(levels)})"
            columns = some([*dict.fromkeys(column.split(" (")[0] for column in apart)])
        text = f"{some(titles)}: no value at {by} = {told}."
        if kind == "unpaired":
            text = (
                f"{some(titles)}: nothing is paired between {by} = {baseline} and {told}, which differ in {columns}; "
            )
            text += f"run both with the same, or {option('ignore')} that column."
        yield Flag(kind=kind, subject=told, number=len(levels), text=text)
