"""Choices of a table's rows: by conditions (`--where`), one experiment, fresh data, the envelope."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp

from aimscale.analysis.errors import AnalysisError, option
from aimscale.analysis.table.design import PROVENANCE, design_columns, experiment_columns, varies
from aimscale.analysis.table.names import CANONICAL, Exclusion, no_column, our_name, remember, their_name
from aimscale.analysis.table.points import REPEATS_FROM, complete, most_passes, passes_flags, usable_rows
from aimscale.analysis.words import Flag, human, some

_CONDITION = re.compile(r"([^=<>!]+?)\s*(<=|>=|!=|=|<|>)\s*(.+)")
_ORDER = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
FEW_PASSES = 4.0
"""Passes over a pool that are worth nearly as much as new data (Muennighoff et al. 2023)."""
CHANCE = 0.01
"""Probability of chance below which losses of two folders differ."""


def spaced(num: int, most: int) -> np.ndarray:
    """Choose at most so many of the numbers below `num`, evenly, the first and the last among them."""
    return np.unique(np.linspace(0, num - 1, min(num, most)).round().astype(int))


def select(frame: pd.DataFrame, conditions: Sequence[str]) -> pd.DataFrame:
    """Keep rows that meet every condition `column SIGN value`, SIGN one of = != <= >= < >; `a|b` after = is a choice.

    Letters of laws stand for their columns (`N>=1e6`). A word of `PARTS` alone is that part of the table.
    """
    for text in map(str.strip, conditions):
        chosen = PARTS[text](frame) if text in PARTS else frame[_condition(frame, text)]
        number, why = len(frame) - len(chosen), f"not chosen by {option('where', text)}"
        frame = remember(chosen, left_out=[Exclusion(kind="where", subject=text, number=number, text=why)])
    return frame.reset_index(drop=True) if conditions else frame


def _condition(frame: pd.DataFrame, text: str) -> pd.Series:
    """Find the rows (n,) that meet a condition."""
    if (found := _CONDITION.fullmatch(text)) is None:
        raise AnalysisError(f"{option('where')} needs a condition such as prefix=paired or D>=8000, not '{text}'")
    typed, sign, wanted = found.groups()
    if (name := our_name(frame, typed)) not in frame:
        raise no_column(frame, name, f" for {option('where', text)}")
    words, numbers = frame[name].astype(str), pd.to_numeric(frame[name], errors="coerce")
    choice = pd.Series(wanted.split("|")).str.strip()
    limits = pd.to_numeric(choice, errors="coerce").dropna()
    if sign in ("=", "!="):
        meets = (words.isin(choice) | numbers.isin(limits)) == (sign == "=")
    elif len(limits) == 1 and numbers.notna().any():
        meets = _ORDER[sign](numbers, limits.iloc[0])
    else:
        raise AnalysisError(f"{option('where', text)}: only numbers can be compared by {sign}")
    if not meets.any():
        values = some([f"{each:.40}" for each in words[frame[name].notna()].unique()])
        raise AnalysisError(f"{option('where', text)}: no row is left; {name} takes {values}")
    return meets


def main_part(frame: pd.DataFrame, free: Collection[str] = ()) -> tuple[pd.DataFrame, str]:
    """Keep the experiment with most (size, images seen) cells, with most rows among equals, whose rows may differ in
    columns that are `free`; and say what it is, or nothing where there are no others."""
    names = [name for name in design_columns(frame) if name not in free]
    if not names or frame.empty:
        return frame, ""
    best = max((rows for _, rows in frame.groupby(names, dropna=False)), key=lambda rows: (_num_cells(rows), len(rows)))
    return best, ", ".join(f"{name} {best[name].iloc[0]}" for name in names)


def fresh_part(frame: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Keep the rows at the number of unique images with most cells, the largest among equals; and say what they are.

    Where half of these see their pool more than `FEW_PASSES` times, the rows of any pool that do not, if they make as
    many as a third of the cells: data hardly repeated.
    """
    name = "unique_images"
    if name not in frame or not varies(frame[name]):
        return frame, ""
    best = max((rows for _, rows in frame.groupby(name)), key=lambda rows: (_num_cells(rows), rows[name].iloc[0]))
    if "images_seen" in frame and (best["images_seen"] / best[name]).median() > FEW_PASSES:
        few = frame[frame["images_seen"] <= FEW_PASSES * frame[name]]
        if 3 * _num_cells(few) >= _num_cells(best):
            return few, f"at most {FEW_PASSES:g} passes over their pool"
    return best, f"{best[name].iloc[0]:,.0f} {their_name(frame, name, 'unique images')}"


def _num_cells(rows: pd.DataFrame) -> int:
    names = [name for name in ("size", "params_total", "N", "images_seen", "D") if name in rows]
    return len(rows[names].drop_duplicates()) if names else len(rows)


def lower_envelope(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep the complete rows whose loss no complete row of equal or lower compute undercuts."""
    names = ["flops_train", "val_loss"]
    rows = usable_rows(frame, dict(zip(names, names, strict=True))).rows.sort_values(names, kind="stable")
    return rows[rows["val_loss"] < rows["val_loss"].cummin().shift(fill_value=np.inf)]


PARTS: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "main": lambda frame: main_part(frame)[0],
    "fresh": lambda frame: fresh_part(frame)[0],
    "envelope": lower_envelope,
}
"""Name that `--where` takes -> the rows that it selects."""


def mixture_flags(frame: pd.DataFrame, variables: Sequence[str], y: str = "val_loss") -> tuple[Flag, ...]:
    """Flag columns in which the rows differ and which a law of these variables does not know, and points during
    training. Sweeps and folders count where their losses of equal cells differ: they may well be one experiment."""
    known = {*variables, *(CANONICAL.get(v, v) for v in variables)}
    rows, flags = complete(frame), list[Flag]()
    names = [n for n in experiment_columns(rows) if n not in PROVENANCE or _differ(rows, n, y)]
    names += ["unique_images"] * (most_passes(rows) > REPEATS_FROM)
    names += ["images_seen"] * ("params_total" in known) + ["params_total"] * ("images_seen" in known)
    for name in [name for name in names if name in rows and name not in known and varies(rows[name])]:
        called, number = their_name(frame, name), rows[name].nunique()
        unknown = f"The rows differ in {called} ({number} values), which is no variable of the law"
        text = f"{unknown}; choose one by {option('where')}."
        flags.append(Flag(kind="mixed", subject=called, number=number, text=text))
    if during := int((frame["status"] == "during").sum()) if "status" in frame else 0:
        is_mixed = during < len(rows)
        text = f"{during} rows are points during training, where losses are higher than at budgets"
        text += f"; leave them out by {option('where', 'status=complete')}." if is_mixed else "."
        flags.append(Flag(kind="during_mixed" if is_mixed else "during", number=during, text=text))
    return tuple(flags)


def table_flags(
    frame: pd.DataFrame, variables: Sequence[str], y: str, scales: Sequence[Mapping[str, float]] = ()
) -> tuple[Flag, ...]:
    """Flag what a law of these variables does not know, what was tuned, and scales that see their pool more often than
    any row."""
    found = usable_rows(frame, y, best_by=y)
    passes = [flag for at in scales for flag in passes_flags(found.rows, f"D = {human(at.get('D', 0))}", at)]
    return (*mixture_flags(frame, variables, y), *found.flags, *passes)


def _differ(rows: pd.DataFrame, name: str, y: str) -> bool:
    """Test whether losses of the two commonest values of a column differ in sizes and budgets that both hold."""
    cell = [each for each in ("params_total", "N", "images_seen", "D") if each in rows]
    if y not in rows or not cell:
        return False
    losses = pd.to_numeric(rows[y], errors="coerce")
    means = np.log(losses.where(losses > 0)).groupby([rows[each] for each in (*cell, name)]).mean()
    one, other = (means.xs(value, level=name) for value in rows[name].value_counts().index[:2])
    differences = (one - other).dropna().groupby(level=cell[0]).mean()
    return len(differences) > 2 and bool(ttest_1samp(differences, 0).pvalue < CHANCE)
