"""The paper's ablations beside ours: its difference between two settings of AIM-0.6B, and that of two levels here.

The cells stand in `data/ablations.csv` as printed, each with the columns and levels of ours that mean its setting.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pandas as pd

from aimscale.analysis.effects.contrasts import Contrasts, contrast, factors, level_name
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.plots.style import human
from aimscale.analysis.published.published import DATA
from aimscale.analysis.table.design import DEFAULT, with_size
from aimscale.analysis.table.points import complete
from aimscale.analysis.words import measured_by

KINDS = ["linear", "attentive"]
"""Probes of the paper's ablations."""


@functools.cache
def ablations() -> pd.DataFrame:
    """The published cells: ablation, setting, ours (`column=level`, several with | between; empty where a results table
    has no column for it), linear and attentive (top-1 as fractions), task, source.
    """
    cells = pd.read_csv(DATA / "ablations.csv").fillna({"ours": ""})
    cells[KINDS] = (cells[KINDS] / 100).round(4)
    return cells


@functools.cache
def _cells() -> dict[tuple[str, str], pd.Series]:
    """Column and level -> the cell that means it."""
    named = ((name, cell) for _, cell in ablations().iterrows() for name in cell["ours"].split("|") if name)
    return {(name.partition("=")[0], name.partition("=")[2]): cell for name, cell in named}


def beside_paper(found: Contrasts, frame: pd.DataFrame) -> pd.DataFrame:
    """The paper's difference beside each of a contrast, where it has both settings and that kind of probe.

    Args:
        frame: the table that was compared.

    Returns:
        change (level over baseline, in the paper's words), kind, published (its difference in top-1, a fraction without
        an interval), published_on, task, difference (ours), low, high, over (what the interval covers), N (parameters
        of our smallest and largest run: of the trunk, where the table counts them).
    """
    rows = complete(with_size(frame))
    count = "params_trunk" if "params_trunk" in rows else "params_total"
    out: list[dict[str, Any]] = []
    for each in [c for c in found.contrasts if c.measure.column == "top1" and c.measure.kind in KINDS]:
        keys, kind = [name for name in each.pairs if name in rows], each.measure.kind
        own = rows.astype(dict.fromkeys(keys, object)).merge(
            each.pairs[keys].drop_duplicates()
        )  # those that are paired
        names = own[found.by].map(level_name, na_action="ignore")
        ours, theirs = (_settings(own[names == name], found.by, name) for name in (each.level, each.baseline))
        shared = [(ours[column], theirs[column]) for column in ours if column in theirs]
        if not shared or shared[0][0]["setting"] == shared[0][1]["setting"] or pd.isna(shared[0][0][kind]):
            continue
        level, baseline = shared[0]
        out.append(
            {
                "change": f"{level['setting']} over {baseline['setting']}",
                "kind": kind,
                "published": level[kind] - baseline[kind],
                "published_on": level["task"],
                "task": each.measure.task,
                "difference": each.difference,
                "low": each.low,
                "high": each.high,
                "over": each.over,
                "N": " to ".join(dict.fromkeys(map(human, (own[count].min(), own[count].max())))),
            }
        )
    return pd.DataFrame(out)


def in_words(beside: pd.DataFrame) -> Iterator[str]:
    """A sentence per row of `beside_paper`."""
    for row in beside.to_dict("records"):
        interval = f" [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]" if row["over"] else ""
        yield (
            f"Paper: {row['change']} {100 * row['published']:+.1f} ({measured_by(row['kind'])} on "
            f"{row['published_on']}, AIM-0.6B); here {100 * row['difference']:+.1f}{interval} "
            f"({row['task']}, N = {row['N']})."
        )


def _settings(rows: pd.DataFrame, by: str, level: str) -> dict[str, pd.Series]:
    """Column -> the published cell that rows of a level have in it: the one compared, and the rule that heads follow.

    Blocks of a head by the rule are no number of their own, and no block at all is the paper's head of none.
    """
    names = {by: level}
    if by == "head_depth" and "head_rule" in rows:
        own = [name for name in ("model.head_depth", "model.head_width", "model.head_kind") if name in rows]
        rules = rows["head_rule"].unique().tolist() if (rows[own] == DEFAULT).all(axis=None) else []
        names |= {"head_rule": "none"} if level == "0" else {"head_rule": rules[0]} if len(rules) == 1 else {}
    return {column: _cells()[column, word] for column, word in names.items() if (column, word) in _cells()}


def all_beside_paper(frame: pd.DataFrame) -> pd.DataFrame:
    """`beside_paper` of every column of a table that the paper varied, too, and over which rows are paired."""
    rows, found = complete(frame), [pd.DataFrame()]
    columns = {"head_depth", *(column for column, _ in _cells())}
    for name in filter(columns.__contains__, factors(rows)):
        with contextlib.suppress(AnalysisError):  # nothing was probed, or nothing is paired
            found.append(beside_paper(contrast(rows, by=name, measures=["top1"]), rows))
    return pd.concat(found, ignore_index=True)
