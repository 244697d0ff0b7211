"""The paper's ablations beside ours: its difference between two settings of AIM-0.6B, and that of two levels here.

The cells stand in `data/ablations.csv` as printed, each with the columns and levels of ours that mean its setting.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from aimscale.analysis.effects.contrasts import Contrast, Contrasts, contrast, factors, level_name
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.plots.style import human
from aimscale.analysis.published.published import DATA
from aimscale.analysis.table.design import DEFAULT, with_size
from aimscale.analysis.table.points import complete
from aimscale.analysis.words import measured_by

KINDS = ("linear", "attentive")
"""Probes of the paper's ablations."""
MODEL = "AIM-0.6B"
"""What was ablated."""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A published difference beside the same one here."""

    kind: str
    """Of the probe."""
    settings: tuple[str, str]
    """The paper's words for level and baseline."""
    published: float
    """The paper's level minus baseline in top-1, as a fraction; it has no interval."""
    published_on: str
    """Its task."""
    ours: Contrast
    sizes: str
    """Parameters of the smallest and the largest of our runs: of the trunk, where the table counts them."""

    def __str__(self) -> str:
        c, level, baseline = self.ours, *self.settings
        here = f"{100 * c.difference:+.1f}" + (f" [{100 * c.low:+.1f}, {100 * c.high:+.1f}]" if c.over else "")
        return (
            f"Paper: {level} over {baseline} {100 * self.published:+.1f} ({measured_by(self.kind)} on "
            f"{self.published_on}, {MODEL}); here {here} ({c.measure.task}, N = {self.sizes})."
        )

    @property
    def row(self) -> dict[str, Any]:
        """Of `Comparison.ablations`."""
        c, (level, baseline) = self.ours, self.settings
        return {
            "change": f"{level} over {baseline}",
            "kind": self.kind,
            "published": self.published,
            "published_on": self.published_on,
            "task": c.measure.task,
            "difference": c.difference,
            "low": c.low,
            "high": c.high,
            "over": c.over,
            "N": self.sizes,
        }


@functools.cache
def ablations() -> pd.DataFrame:
    """The published cells: ablation, setting, ours (`column=level`, several with | between; empty where a results table
    has no column for it), linear and attentive (top-1 as fractions), task, source.
    """
    cells = pd.read_csv(DATA / "ablations.csv").fillna({"ours": ""})
    cells[list(KINDS)] = (cells[list(KINDS)] / 100).round(4)
    return cells


@functools.cache
def _cells() -> dict[tuple[str, str], pd.Series]:
    """Column and level -> the cell that means it."""
    named = ((name, cell) for _, cell in ablations().iterrows() for name in cell["ours"].split("|") if name)
    return {(name.partition("=")[0], name.partition("=")[2]): cell for name, cell in named}


def beside_paper(found: Contrasts, frame: pd.DataFrame) -> list[Beside]:
    """The paper's difference beside each of a contrast, where it has both settings and that kind of probe.

    Args:
        frame: the table that was compared.
    """
    rows = complete(with_size(frame))
    if found.by not in rows:
        return []
    names = rows[found.by].map(level_name, na_action="ignore")
    out = []
    for each in found.contrasts:
        m, sides = (
            each.measure,
            [_settings(rows[names == name], found.by, name) for name in (each.level, each.baseline)],
        )
        columns = [column for column in sides[0] if column in sides[1]]
        if m.column != "top1" or m.kind not in KINDS or not columns:
            continue
        level, baseline = (side[columns[0]] for side in sides)
        published = level[m.kind] - baseline[m.kind]
        if level["setting"] == baseline["setting"] or pd.isna(published):
            continue
        size = "params_trunk" if "params_trunk" in rows and rows["params_trunk"].notna().all() else "params_total"
        ours = rows[rows["size"].isin(each.pairs["size"])] if "size" in each.pairs else rows
        out.append(
            Beside(
                kind=m.kind,
                settings=(level["setting"], baseline["setting"]),
                published=float(published),
                published_on=level["task"],
                ours=each,
                sizes=" to ".join(dict.fromkeys(map(human, (ours[size].min(), ours[size].max())))),
            )
        )
    return out


def _settings(rows: pd.DataFrame, by: str, level: str) -> dict[str, pd.Series]:
    """Column -> the published cell that rows of a level have in it: the one compared, and the rule that heads follow.

    Blocks of a head by the rule are no number of their own, and no block at all is the paper's head of none.
    """
    names = {by: level}
    if by == "head_depth" and "head_rule" in rows:
        own = [name for name in ("model.head_depth", "model.head_width", "model.head_kind") if name in rows]
        by_rule = bool((rows[own] == DEFAULT).all(axis=None))
        rules = ["none"] if level == "0" else rows["head_rule"].unique().tolist() if by_rule else []
        names |= {"head_rule": rules[0]} if len(rules) == 1 else {}
    return {column: _cells()[column, word] for column, word in names.items() if (column, word) in _cells()}


def all_beside_paper(frame: pd.DataFrame) -> Iterator[Beside]:
    """Every change of a table that the paper tried, too, where rows are paired over it."""
    rows = complete(frame)
    for name in factors(rows):
        if name in {"head_depth", *(column for column, _ in _cells())}:
            with contextlib.suppress(AnalysisError):  # nothing was probed, or nothing is paired
                yield from beside_paper(contrast(rows, by=name, measures=["top1"]), rows)
