"""One run beside the nearest published model, in five lines: who, the gap, what would close it, how far, what differs.

One run has one size and a few budgets, so no law of N can come from it. What data would close a gap comes from the
run's own budgets; what size would, from the slope of AIM's four published sizes on the same task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.plots.style import human
from aimscale.analysis.published.board import Published, published_results
from aimscale.analysis.published.published import BY_KEY, PUBLISHED_SIZES
from aimscale.analysis.published.worked_example import Line, fit_line

REACH = 1e6
"""How many times the run's budget or size is looked ahead."""


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """One result of a run and the published one that is nearest to it."""

    run: str
    task: str
    kind: str
    published: Published
    """The nearest in accuracy, of the same task and kind."""
    gap: float
    """Ours minus theirs, fraction."""
    gap_lo95: float
    gap_hi95: float
    lines: tuple[str, ...]


def nearest_published(
    probes: pd.DataFrame, run: str | None = None, called: Mapping[str, str] | None = None
) -> list[Nearest]:
    """The five lines of every task and kind of one run that published models have, too.

    Args:
        probes: `probe_frame` of complete rows.
        run: part of the run's id; None takes the only run there is.
        called: task of the table -> published task to put it beside, where the names differ.

    Raises:
        AnalysisError: no run or several are meant, or none of its tasks is published under its kind of probe.
    """
    ids = [str(name) for name in probes["run_id"].dropna().unique()] if "run_id" in probes else []
    chosen = [name for name in ids if run is None or run in name]
    if not ids:
        raise AnalysisError("--run takes a probed run of a results table, and this table has none.")
    if len(chosen) != 1:
        shown = ", ".join(chosen[:5] or ids[:5])
        raise AnalysisError(f"name one run with --run, part of its id; {len(chosen)} of {len(ids)} fit: {shown}")
    rows = probes[(probes["run_id"] == chosen[0]) & probes["top1"].notna()]
    names = dict(called or {})
    known = {(each.task, each.kind) for each in published_results()}
    if unknown := sorted(set(names.values()) - {task for task, _ in known}):
        raise AnalysisError(f"--task: no published task is called {unknown[0]}; they are {_tasks(known)}")
    groups = [(str(t), str(k), own) for (t, k), own in rows.groupby(["task", "kind"], sort=False)]
    shared = [(t, k, own) for t, k, own in groups if (names.get(t, t), k) in known]
    if not shared:
        theirs = ", ".join(f"{t} ({k})" for t, k, _ in groups) or "no probes"
        raise AnalysisError(
            f"run {chosen[0]} has {theirs}, and published are {_tasks(known)}; --task OURS=THEIRS puts a task beside "
            "a published one of another name"
        )
    return [_nearest(chosen[0], names.get(t, t), k, own) for t, k, own in shared]


def _tasks(known: set[tuple[str, str]]) -> str:
    """Published tasks by kind of probe."""
    by_kind = {kind: sorted(t for t, k in known if k == kind) for kind in sorted({k for _, k in known})}
    return "; ".join(f"{', '.join(tasks)} ({kind})" for kind, tasks in by_kind.items())


def _nearest(run: str, task: str, kind: str, own: pd.DataFrame) -> Nearest:
    own = own.sort_values("images_seen") if "images_seen" in own else own
    last = own.iloc[-1]
    plain = kind == "attentive" and pd.notna(last["last_top1"])
    name = "last_top1" if plain else "top1"
    rivals = [
        each for each in published_results()
        if (each.task, each.kind) == (task, kind) and each.blocks != "best 6"
    ]  # fmt: skip
    top1 = float(last[name])
    theirs = min(rivals, key=lambda each: abs(each.top1 - top1))
    gap, low, high = (float(last[column]) - theirs.top1 for column in (name, f"{name}_lo95", f"{name}_hi95"))
    scale = ", ".join(
        f"{human(float(last[column]))} {words}"
        for column, words in (("params_total", "parameters"), ("images_seen", "images seen"))
        if column in last and pd.notna(last[column])
    )
    closing, reach = _closing(own, name, kind, theirs, task)
    return Nearest(
        run=run, task=task, kind=kind, published=theirs, gap=gap, gap_lo95=low, gap_hi95=high,
        lines=(
            f"{task}, {kind} probe{', last blocks' if plain else ''}: {run} ({scale}) has {_pct(top1)} %; the nearest "
            f"published model is {theirs.model} ({theirs.data}) with {_pct(theirs.top1)} % [{theirs.source}].",
            f"Gap: {100 * gap:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}], from the size of our test split "
            "(theirs is printed without an interval)."
            if np.isfinite(low)
            else f"Gap: {100 * gap:+.1f} points; the table has no interval of our accuracy.",
            closing,
            reach,
            _differs(last, kind, theirs),
        ),
    )  # fmt: skip


def _closing(own: pd.DataFrame, name: str, kind: str, theirs: Published, task: str) -> tuple[str, str]:
    """What would close the gap, and how far that extrapolates."""
    top1 = float(own[name].iloc[-1])
    if top1 >= theirs.top1:
        return "Nothing is to be closed: the run is not below it.", "No extrapolation."
    parts, reach = [], []
    points = own.dropna(subset=["images_seen", name]) if "images_seen" in own else own.iloc[:0]
    if points["images_seen"].nunique() > 2:
        seen = points["images_seen"].to_numpy(float)
        line = fit_line(np.log(seen), points[name].to_numpy(float))
        factors = np.geomspace(1, REACH, 2000)
        ends = [_first(line, factors * seen.max(), theirs.top1, which) for which in (0, 2, 1)]
        parts.append(f"{_span('images seen', ends)} by this run's own {len(points)} budgets (a line in ln D)")
        reach.append(f"D from {human(seen.min())} to {human(seen.max())} images{_times(ends[0], seen.max())}")
    else:
        parts.append("data: not estimated, a run with three budgets or more shows its own slope")
    if kind == "attentive" and "params_trunk" in own and pd.notna(own["params_trunk"].iloc[-1]):
        params = float(own["params_trunk"].iloc[-1])
        sizes = np.array([each.params_trunk for each in PUBLISHED_SIZES], float)
        line = fit_line(np.log(sizes), np.array([BY_KEY[each.key].accuracy(task) for each in PUBLISHED_SIZES]))
        slopes = (line.slope, line.slope_hi, line.slope_lo)
        ends = [_size(params, theirs.top1 - top1, slope) for slope in slopes]
        parts.append(f"{_span('trunk parameters', ends)} by the slope of AIM's four sizes")
        reach.append(
            f"N measured from {human(sizes.min())} to {human(sizes.max())}, this run has {human(params)}"
            f"{_times(ends[0], params)}"
        )
    else:
        parts.append("size: not estimated, no published ladder of sizes under this probe")
    return "To close it: " + "; ".join(parts) + ".", (
        "How far that reaches: " + "; ".join(reach) + "; unverified." if reach else "No extrapolation."
    )


def _first(line: Line, grid: np.ndarray, target: float, which: int) -> float:
    """First grid value at which the line (0), or the lower (1) or upper (2) end of its interval, reaches the target."""
    for value in grid:
        if line.predict(float(np.log(value)))[which] >= target:
            return float(value)
    return np.inf


def _size(params: float, gap: float, slope: float) -> float:
    """N at which a slope per ln N makes up for a gap; infinite beyond `REACH` times the run."""
    exponent = gap / slope if slope > 0 else np.inf
    return params * float(np.exp(exponent)) if exponent <= np.log(REACH) else np.inf


def _span(what: str, ends: list[float]) -> str:
    value, low, high = ends
    limits = [human(end) if np.isfinite(end) else "no limit found" for end in (low, high)]
    if not np.isfinite(value):
        interval = f" [{limits[0]}, {limits[1]}]" if np.isfinite([low, high]).any() else ""
        return f"no number of {what} up to {human(REACH)} times this run's{interval}"
    return f"about {human(value)} {what} [{limits[0]}, {limits[1]}]"


def _times(value: float, largest: float) -> str:
    return f", so {human(value / largest)} times beyond this run" if np.isfinite(value) else ""


def _differs(row: pd.Series, kind: str, theirs: Published) -> str:
    """What is not comparable between the two results."""
    found = [f"they saw {theirs.data}"]
    if row["task"] != theirs.task:
        found.append(f"our task is {row['task']}, put beside {theirs.task} as asked")
    if "image_size" in row and pd.notna(row["image_size"]) and row["image_size"] != theirs.image_size:
        found.append(f"{int(row['image_size'])} px against {theirs.image_size} px")
    if row.get("test_in_train", 0) > 0 or row.get("test_in_pool", 0) > 0:
        found.append("some of our test images were seen in training")
    found += [theirs.caveat] if theirs.caveat else []
    if kind == "efficient":
        found.append("ours trains with AdamW, norm in front of the pooling, theirs with LARS and the norm behind it")
    return "Not comparable: " + "; ".join(found) + "; and losses (other images, patches and prefixes)."


def _pct(value: float) -> str:
    return f"{100 * value:.1f}"
