"""Which rows belong to one experiment: a law is fitted to runs that differ in scale, not in anything else."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from aimscale.analysis.table.schema import CANONICAL, FOLDER, KNOWN, THEIR_NAMES, no_column, their_name

DESIGN = ("prefix", "target", "patch_order", "head_rule", "schedule", "precision", "image_size", "patch_size")
"""Columns of the results table that make runs another experiment, not another scale of the same."""
MEASURED_ON = ("data_fingerprint", "val_num_images")
"""Other training data or another validation set: losses that cannot share a law."""


def design_columns(frame: pd.DataFrame) -> list[str]:
    """Columns, those of the set-up included, that take several values and make runs differ in more than scale."""
    return [name for name in (*DESIGN, *MEASURED_ON, *setup_columns(frame)) if name in frame and varies(frame[name])]


SECTIONS = ("model", "data", "objective", "optimiser", "schedule")
"""Parts of a run's configuration whose fields `read_tables` makes into columns."""


def setup_columns(frame: pd.DataFrame) -> list[str]:
    """Columns that `read_tables` made of fields of the set-up, such as `optimiser.weight_decay`."""
    return [str(name) for name in frame.columns if "." in str(name) and str(name).split(".")[0] in SECTIONS]


IDENTITIES = ("run_id", "config_hash", "git_commit", "finished_at", "probes", "extra", "setup", FOLDER)
"""Columns of words that tell runs apart without being settings."""


def foreign_settings(frame: pd.DataFrame, measured: Collection[str] = ()) -> list[str]:
    """Columns of a foreign table that are settings: words and numbers that repeat (numbers in three rows or more each).

    Other numbers are taken for measurements. A word that stands for one size and one seed is the name of a run.
    """
    scale = [name for name in ("params_total", "seed") if name in frame and varies(frame[name])]
    found = []
    for name in map(str, frame.columns):
        if name in KNOWN or name in IDENTITIES or name in CANONICAL or name in measured:
            continue
        if frame[name].map(lambda cell: isinstance(cell, list | dict)).any() or not varies(frame[name]):
            continue
        if pd.api.types.is_numeric_dtype(frame[name]):
            is_setting = 3 * frame[name].nunique() <= len(frame)
        else:
            is_name = len(scale) == 2 and len(frame[[name, *scale]].drop_duplicates()) == frame[name].nunique()
            is_setting = frame[name].nunique() < len(frame) and not is_name
        if is_setting:
            found.append(name)
    return found


def with_size(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with a `size` per number of parameters where it has none: foreign tables count, and do not name."""
    if "size" in frame or "params_total" not in frame:
        return frame
    out = frame.assign(size=frame["params_total"].map("{:.4g}".format))
    out.attrs[THEIR_NAMES] = {**frame.attrs.get(THEIR_NAMES, {}), "size": their_name(frame, "params_total")}
    return out


def varies(values: pd.Series) -> bool:
    """Whether a column takes several values, missing ones aside."""
    return len(pd.unique(values.dropna())) > 1


@dataclass(frozen=True, kw_only=True)
class Part:
    """The rows of one experiment out of a table that holds several."""

    rows: pd.DataFrame
    words: str
    """What they have in common that others do not, or an empty string when there are no others."""
    num_others: int
    """Rows of other experiments."""


def main_part(frame: pd.DataFrame) -> Part:
    """The experiment with most (size, images seen) cells; with most rows among equals.

    A table that mixes, say, attention kinds and head depths holds several; a law fitted to all of them would take their
    differences for scatter.
    """
    names = design_columns(frame)
    if not names or frame.empty:
        return Part(rows=frame, words="", num_others=0)
    groups = [rows for _, rows in frame.groupby(names, dropna=False, sort=True)]
    best = max(groups, key=lambda rows: (_num_cells(rows), len(rows)))
    words = ", ".join(f"{name} {best[name].iloc[0]}" for name in names)
    return Part(rows=best, words=words, num_others=len(frame) - len(best))


FEW_PASSES = 4.0
"""Passes over a pool that are worth nearly as much as new data (Muennighoff et al. 2023)."""


def fresh_part(frame: pd.DataFrame) -> Part:
    """The rows at the number of unique images that has most cells, the largest among equals: data hardly repeated.

    Where half of these see their pool more than `FEW_PASSES` times, the rows of any pool that do not, if they make as
    many as a third of the cells.
    """
    name = "unique_images"
    if name not in frame or not varies(frame[name]):
        return Part(rows=frame, words="", num_others=0)
    groups = [rows for _, rows in frame.groupby(name, sort=True)]
    best = max(groups, key=lambda rows: (_num_cells(rows), rows[name].iloc[0]))
    words = f"{best[name].iloc[0]:,.0f} {their_name(frame, name, 'unique images')}"
    if "images_seen" in frame:
        few = frame[frame["images_seen"] <= FEW_PASSES * frame[name]]
        if (best["images_seen"] / best[name]).median() > FEW_PASSES and 3 * _num_cells(few) >= _num_cells(best):
            best, words = few, f"at most {FEW_PASSES:g} passes over their pool"
    return Part(rows=best, words=words, num_others=len(frame) - len(best))


def _num_cells(rows: pd.DataFrame) -> int:
    names = [name for name in ("size", "params_total", "images_seen") if name in rows]
    return len(rows[names].drop_duplicates()) if names else len(rows)


def lower_envelope(frame: pd.DataFrame, x: str = "flops_train", y: str = "val_loss") -> pd.DataFrame:
    """Rows whose loss no row of equal or lower compute undercuts.

    Raises:
        TableError: a column is missing.
    """
    for name in (x, y):
        if name not in frame:
            raise no_column(frame, name)
    ordered = frame[(frame[x] > 0) & (frame[y] > 0)].sort_values([x, y], kind="stable")
    best_before = np.minimum.accumulate(np.r_[np.inf, ordered[y].to_numpy()[:-1]])
    return ordered[ordered[y].to_numpy() < best_before]


def mixture_flags(frame: pd.DataFrame, variables: Sequence[str]) -> tuple[str, ...]:
    """Sentences of warning about rows that differ in more than a law's variables."""
    flags = []
    names = design_columns(frame)
    if names:
        several = "; ".join(f"{name}: {', '.join(map(str, frame[name].dropna().unique()[:4]))}" for name in names)
        flags.append(
            f"The rows mix experiments ({several}), whose differences count as scatter here; choose with --where."
        )
    repeated = "unique_images" in frame and varies(frame["unique_images"])
    if repeated and not {"U", "unique_images"} & set(variables):
        values = sorted(frame["unique_images"].dropna().unique())
        flags.append(
            f"The rows differ in {their_name(frame, 'unique_images', 'unique images')} "
            f"({', '.join(f'{value:,.0f}' for value in values[:6])}), which this law does not know; choose with "
            "--where or fit the law 'repeated'."
        )
    known = {CANONICAL.get(v, v) for v in variables} | set(variables)
    for name, words in (("images_seen", "images seen"), ("params_total", "parameters")):
        one = {"images_seen": {"params_total"}, "params_total": {"images_seen"}}[name]
        if name in frame and varies(frame[name]) and known & one and name not in known:
            flags.append(
                f"The rows differ in {their_name(frame, name, words)} ({frame[name].nunique()} values), which this law "
                "does not know; choose one with --where, or fit the joint law."
            )
    return tuple(flags)


def widest_slice(frame: pd.DataFrame, varies: str, fixed: str) -> tuple[pd.DataFrame, str]:
    """The rows at the value of `fixed` that has most values of `varies` (the largest such value), and that value."""
    spread = frame.groupby(fixed)[varies].nunique()
    if spread.empty:
        return frame.iloc[:0], "no"
    value = spread[spread == spread.max()].index.max()
    return frame[frame[fixed] == value], f"{value:,.0f}"
