"""Measures in which runs are compared: columns of a row, and the accuracies of its probes, in long format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from aimscale.analysis.display import MAX_NAMED, MFU, accuracy_of, did_you_mean, measured_by, option
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.table.columns import named_like_accuracy
from aimscale.analysis.table.runs import Runs
from aimscale.analysis.table.select import by_probe

ACCURACIES = ("top1", "last_top1")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number of a run at a budget."""

    column: str
    """Column of the table, or top1 or last_top1 of a probe."""
    task: str = ""
    kind: str = ""
    """Kind of the probe."""

    @property
    def name(self) -> str:
        """Name as `--measure` takes it."""
        return ":".join(filter(None, (self.column, self.task, self.kind)))

    @property
    def is_accuracy(self) -> bool:
        """A fraction, higher is better."""
        return self.column in ACCURACIES

    @property
    def lower_is_better(self) -> bool:
        """Losses, times and costs."""
        return not (self.is_accuracy or named_like_accuracy(self.column) or self.column in (*MFU, "images_per_s"))

    @property
    def title(self) -> str:
        """Name for a reader."""
        if not self.task:
            return "validation loss" if self.column == "val_loss" else self.column
        return f"{self.task} {measured_by(self.kind)}{' on the last blocks' * (self.column == 'last_top1')}"

    def shown(self, value: float, sign: str = "") -> str:
        """Write a value with its unit."""
        if self.is_accuracy:
            return f"{100 * value:{sign}.2f} %"
        return f"{value:{sign}.4f}" if abs(value) < 1e4 else f"{value:{sign}.4g}"

    def shown_difference(self, value: float) -> str:
        """Write a signed difference."""
        return self.shown(value, "+").removesuffix(" %")

    def shown_size(self, value: float) -> str:
        """Write an unsigned difference with its unit."""
        return f"{100 * value:.2f} points" if self.is_accuracy else f"{value:.4f}"


def wanted_measures(rows: Runs, names: Sequence[str]) -> list[Measure]:
    """Find measures by name: a column, or `top1`, `top1:TASK` or `top1:TASK:KIND` with or without `top1:`.

    None named: the validation loss and every probe's accuracy.
    """
    entries = [entry for each in rows["probes"] for entry in each] if "probes" in rows else []
    pairs = dict.fromkeys((str(e["task"]), str(e["kind"])) for e in entries)
    of_probes = [Measure(column="top1", task=task, kind=kind) for task, kind in pairs]
    if names:
        return [*dict.fromkeys(m for name in names for m in _named(rows, rows.column(name), of_probes))]
    has_loss = "val_loss" in rows and rows["val_loss"].notna().any()
    if not (has_loss or of_probes):
        raise AnalysisError(f"The table has neither val_loss nor probes; name a column with {option('measure')}.")
    return [Measure(column="val_loss")] * bool(has_loss) + of_probes


def _named(rows: Runs, name: str, of_probes: Sequence[Measure]) -> list[Measure]:
    column, task, kind = [*name.split(":"), "", ""][:3]
    if name not in rows and column in {m.task for m in of_probes}:
        column, task, kind = "top1", column, task
    is_accuracy = column in ACCURACIES and column not in rows
    numeric = [] if is_accuracy else [str(each) for each in rows.frame.select_dtypes("number").columns]
    if name in numeric:
        return [Measure(column=name)]
    fitting = [m for m in of_probes if is_accuracy and task in ("", m.task) and kind in ("", m.kind)]
    if not fitting:
        names = [*(f"{m.task}:{m.kind}".strip(":") for m in of_probes), *numeric]
        what = f"accuracy {name!r}" if is_accuracy else f"column of numbers and no accuracy {name!r}"
        how = f"; accuracies are named by {option('columns', 'TASK:KIND=THEIRS')}" if not of_probes else ""
        near = f"; {did_you_mean(task or kind or name, names, 'it has')}" if names else ""
        raise AnalysisError(f"The table has no {what}{how}{near}")
    return [replace(m, column=column) for m in fitting]


def to_minimise(runs: Runs, name: str) -> tuple[Runs, str]:
    """Add the column that a name means, to be fitted as a loss is; return the runs and the column's name in them.

    A probe (`TASK:KIND`) stands for its error rate, 1 - top1: a law's E is then the error's floor, and 1 - chance is
    its ceiling, which no law knows. The runs remember what the new column is called in words.
    """
    ours, complete = runs.column(name), runs.complete()
    if ours in runs or "probes" not in runs or not any(map(len, complete["probes"])):
        return runs, ours
    probe, *others = measures = wanted_measures(complete, [name])
    if others:
        names = ", ".join(m.name for m in measures[:MAX_NAMED])
        raise AnalysisError(f"{name!r} is {len(measures)} accuracies ({names}); name one of them.")
    by_probe = [{(p["task"], p["kind"]): p.get(probe.column) for p in reversed(row)} for row in runs["probes"]]
    accuracy = pd.Series([row.get((probe.task, probe.kind)) for row in by_probe], runs.index, dtype=float)
    if not accuracy.dropna().between(0, 1).all():
        raise AnalysisError(f"{probe.name} goes from {accuracy.min():g} to {accuracy.max():g}; give fractions, 0 to 1.")
    last = " of the last blocks" if probe.column == "last_top1" else ""
    column, words = f"1 - {probe.name}", f"{accuracy_of(probe.kind, 'error')}{last} on {probe.task}"
    return runs.assign(**{column: 1 - accuracy}).described({column: words}), column


def long_format(rows: Runs, measures: Sequence[Measure], by: str) -> pd.DataFrame:
    """Give one row per run, budget and measure: the table's columns, `measure`, `value`, and `by` if it is one."""
    probes, parts = by_probe(rows), list[pd.DataFrame]()
    for m in measures:
        of_probe = m.is_accuracy and m.column not in rows
        mine = probes[f"{m.task}:{m.kind}"].frame if of_probe else rows.frame.drop(columns="probes", errors="ignore")
        parts.append(mine.assign(measure=m.name, value=mine[m.column]))
    long = pd.concat(parts, ignore_index=True)
    if by not in long:
        raise rows.no_column(by, " to compare by")
    return long[long["value"].notna()]
