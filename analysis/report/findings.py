"""The two findings that a page opens with: whether the law predicts, and what lower loss does to features."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from aimscale import analysis
from aimscale.analysis.accuracy.correlation import Correlation, Correlations
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.published.comparison import ADAPTED, PROTOCOL, read_baselines
from aimscale.analysis.published.published import TASKS, best_frozen, table6
from aimscale.analysis.report.study import CORRELATION, LINK, Study
from aimscale.analysis.words import PROBES, accuracy_of, percent

SCALES = {"N": "size", "D": "amount of data", "C": "compute"}
"""Variable -> its name in a sentence."""
PIXELS = "raw-pixels"
"""The baseline that stands in the sentence: what features are made of."""


class Finding(NamedTuple):
    """A sentence, what else there is to say of it, and the figure that shows it."""

    key: str
    """HTML id, and name of the figure's files."""
    sentence: str
    detail: str
    draw: Callable[[], Figure]


def findings(study: Study) -> list[Finding]:
    """Give the findings that the tables allow: of the law, and of loss and features."""
    found = [_law_finding(law, study.whose)] if (law := study.get("law")) else []
    for kind in study.kinds:
        named = {task: study.get(CORRELATION, f"{task}:{kind}") for task in study.probes["task"].unique()}
        if correlations := {task: each for task, each in named.items() if each}:
            return [*found, _feature_finding(study, kind, correlations)]
    return found


def _law_finding(law: Fit, whose: str) -> Finding:
    """Tell how the largest scales are predicted when they are left out, and how a straight line fares."""
    told = [
        f"the largest {SCALES.get(test.variable, test.variable)} is predicted to "
        f"{percent(test.mean_abs_relative_error)}; a straight line misses by "
        f"{percent(test.naive_mean_abs_relative_error)}"
        for test in law.heldout
    ]
    sentence = f"Left out, {told[0]}" if told else f"One law of {law.num_points} points, tested on none"
    details = [f"Left out, {each}." for each in told[1:]]
    details += [f"{law.law.formula}, fitted to {law.num_points} of {law.num_rows} rows{whose}, with its 95 % interval."]
    return Finding("loss-N", sentence, " ".join(details), partial(law.plot, x="N"))


def _feature_finding(study: Study, kind: str, found: dict[str, Correlations]) -> Finding:
    """Tell how loss and accuracy go together by task, first where lower loss is better, and where raw pixels stand."""
    probes = study.probes[(study.probes["kind"] == kind) & study.probes["top1"].notna()]
    rows = {task: probes[probes["task"] == task] for task in found}
    beside = {task: levels(study, kind, rows[task]) for task in found}
    leading = {task: _leading(each) for task, each in found.items()}

    def reached(task: str) -> str:
        level = beside[task].set_index("name")["top1"]
        pixels = f", raw pixels {percent(level[PIXELS])}" if PIXELS in level else ""
        return f"at best {percent(rows[task]['top1'].max())}{pixels}"

    task, *others = sorted(found, key=lambda task: not (leading[task].is_significant and leading[task].value < 0))
    first, what = leading[task], accuracy_of(kind)
    better = "better features" if kind in PROBES and kind != ADAPTED else "higher accuracy"
    told = f"Lower loss, {better if first.value < 0 else 'LOWER accuracy'}"
    told = told if first.is_significant else f"Not known whether lower loss means {better}"
    equal = (c for c in found[task] if c.method == first.method and c.partial_on and c is not first)
    details = [f"{what[0].upper()}{what[1:]}."]
    details += [f"Both follow compute; {_shown(c)}, {c.verdict}." for c in equal]
    details += [f"On {each} {_shown(leading[each])}, {reached(each)}." for each in others]
    links = {task: link} if (link := study.get(LINK, f"{task}:{kind}")) else None
    pearson = {task: [c for c in found[task] if c.method == first.method]}
    draw = partial(analysis.plot_loss_accuracy, rows[task], pearson, links, beside[task])
    return Finding("finding-accuracy", f"{told}: {_shown(first)} on {task}, {reached(task)}", " ".join(details), draw)


def _leading(found: Correlations) -> Correlation:
    """Choose the coefficient to tell: Pearson's at equal compute where that is significant, else over all rows."""
    pearson = [c for c in found if c.method == "pearson"]
    return next((c for c in pearson if c.is_significant), pearson[-1])


def _shown(c: Correlation) -> str:
    return f"{'at equal compute ' * bool(c.partial_on)}r = {c.value:.2f} [{c.low:.2f}, {c.high:.2f}]"


def levels(study: Study, kind: str, rows: pd.DataFrame) -> pd.DataFrame:
    """List what accuracies of a kind may be compared with: the table's own baselines, and on its tasks the paper."""
    same, theirs = rows[["task", "n"]].drop_duplicates(), read_baselines(study.frame)
    theirs = theirs[theirs["kind"].eq(kind) & (kind != ADAPTED)].rename(columns={"size": "name"})
    own = theirs.merge(same, on=["task", "n"]).reindex(columns=["task", "name", "top1"])
    own = own.drop_duplicates(["task", "name"]).sort_values("top1")
    paper = [
        {"task": task, "name": f"{key}, published", "top1": table6().loc[key, task]}
        for task in (same["task"].unique() if kind == PROTOCOL and study.is_ours else ())
        if task in TASKS
        for key in dict.fromkeys(("aim-7B", best_frozen(task)))
    ]
    return pd.concat([own, pd.DataFrame(paper, columns=own.columns)], ignore_index=True)
