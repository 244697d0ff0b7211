"""Runs beside the project's own baselines, and one run beside the nearest published model.

The baselines are raw pixels, random weights and timm models on the same probes. `aimscale baseline NAME --like RUN`
writes them into the run's folder, `aimscale collect` gathers them into `baselines.parquet` beside the table: the same
columns, a row per baseline; `size` names it, `run_id` is the run whose images and seed it got. They are no rows of the
table itself, so that no law takes them for runs.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.plots.style import human
from aimscale.analysis.published.published import published_results
from aimscale.analysis.table.names import FOLDER
from aimscale.analysis.table.read import probe_frame, read_table

BASELINES_FILE = "baselines.parquet"


def read_baselines(frame: pd.DataFrame) -> pd.DataFrame:
    """Probes of the baselines that lie beside the tables of a frame from `read_tables`; empty where there are none."""
    folders = sorted(set(frame[FOLDER].dropna())) if FOLDER in frame else []
    paths = [path for folder in folders if (path := Path(folder) / BASELINES_FILE).exists()]
    if not paths:
        return probe_frame(pd.DataFrame({"probes": []}))
    return probe_frame(pd.concat([read_table(path) for path in paths], ignore_index=True))


def beside_runs(probes: pd.DataFrame, baselines: pd.DataFrame) -> pd.DataFrame:
    """Each probe of the runs beside every baseline of the same task, kind and test images.

    Args:
        probes: `probe_frame` of the runs.
        baselines: `read_baselines`.

    Returns:
        task, kind, size, params_total and images_seen of the run, n, baseline, top1, baseline_top1, gap (ours minus
        the baseline's) with gap_lo95 and gap_hi95, and verdict: above, below, or not told apart.

    The interval is Newcombe's for two independent proportions (Statistics in Medicine 17:873, 1998, method 10). Both
    were measured on the same images, which usually makes the true one narrower.
    """
    columns = ["task", "kind", "size", "params_total", "images_seen", "n", "baseline", "top1", "baseline_top1", "gap"]
    columns += ["gap_lo95", "gap_hi95", "verdict"]
    theirs = baselines.drop_duplicates(["size", "task", "kind", "n", "top1"]) if len(baselines) else baselines
    if theirs.empty or probes.empty:
        return pd.DataFrame(columns=columns)
    names = {"size": "baseline", "top1": "baseline_top1", "top1_lo95": "baseline_lo95", "top1_hi95": "baseline_hi95"}
    theirs = theirs.rename(columns=names)[["task", "kind", "n", *names.values()]]
    both = probes.merge(theirs, on=["task", "kind", "n"])
    gap = both["top1"] - both["baseline_top1"]
    below = np.hypot(both["top1"] - both["top1_lo95"], both["baseline_hi95"] - both["baseline_top1"])
    above = np.hypot(both["top1_hi95"] - both["top1"], both["baseline_top1"] - both["baseline_lo95"])
    verdict = np.select([gap - below > 0, gap + above < 0], ["above", "below"], "not told apart")
    both = both.assign(gap=gap, gap_lo95=gap - below, gap_hi95=gap + above, verdict=verdict)
    return both.reindex(columns=columns)


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """One result of a run and the published one that is nearest to it."""

    run: str
    task: str
    """The published task."""
    kind: str
    published: dict[Hashable, Any]
    """The row of `published_results` that is nearest in accuracy, of the same task and kind."""
    gap: float
    """Ours minus theirs, fraction."""
    gap_lo95: float
    """Lower end of its 95 % interval, from the size of our test split; NaN where the table has none."""
    gap_hi95: float
    lines: tuple[str, ...]
    """Who, the gap, and what is not comparable."""


def nearest_published(
    probes: pd.DataFrame, run: str | None = None, called: Mapping[str, str] | None = None
) -> list[Nearest]:
    """Every task and kind of one run that published models have, too, beside the nearest of them.

    Args:
        probes: `probe_frame` of complete rows.
        run: part of the run's id; None takes the only run there is.
        called: task of the table -> published task to put it beside, where the names differ.

    Raises:
        AnalysisError: no run or several are meant, or none of its tasks is published under its kind of probe.
    """
    chosen = _run_of(probes, run)
    rows = probes[(probes["run_id"] == chosen) & probes["top1"].notna()]
    names = dict(called or {})
    published = published_results()
    if unknown := sorted(set(names.values()) - set(published["task"])):
        raise AnalysisError(f"--task: no published task is called {unknown[0]}; they are {_tasks(published)}")
    groups = [(str(t), str(k), own) for (t, k), own in rows.groupby(["task", "kind"], sort=False)]
    known = set(zip(published["task"], published["kind"], strict=True))
    shared = [(t, k, own) for t, k, own in groups if (names.get(t, t), k) in known]
    if not shared:
        theirs = ", ".join(f"{t} ({k})" for t, k, _ in groups) or "no probes"
        raise AnalysisError(
            f"run {chosen} has {theirs}, and published are {_tasks(published)}; --task OURS=THEIRS puts a task "
            "beside a published one of another name"
        )
    return [_nearest(chosen, names.get(t, t), k, own, published) for t, k, own in shared]


def _run_of(probes: pd.DataFrame, part: str | None) -> str:
    """Id of the one probed run that is meant."""
    ids = [str(name) for name in probes["run_id"].dropna().unique()] if "run_id" in probes else []
    if not ids:
        raise AnalysisError("--run takes a probed run of a results table, and this table has none.")
    chosen = [name for name in ids if part is None or part in name]
    if len(chosen) != 1:
        shown = ", ".join(chosen[:5] or ids[:5])
        raise AnalysisError(f"name one run with --run, part of its id; {len(chosen)} of {len(ids)} fit: {shown}")
    return chosen[0]


def _tasks(published: pd.DataFrame) -> str:
    """Published tasks by kind of probe."""
    by_kind = published.groupby("kind")["task"].unique()
    return "; ".join(f"{', '.join(sorted(tasks))} ({kind})" for kind, tasks in by_kind.items())


def _nearest(run: str, task: str, kind: str, own: pd.DataFrame, published: pd.DataFrame) -> Nearest:
    last = (own.sort_values("images_seen") if "images_seen" in own else own).iloc[-1]
    plain = kind == "attentive" and pd.notna(last["last_top1"])
    name = "last_top1" if plain else "top1"
    top1 = float(last[name])
    rivals = published[(published["task"] == task) & (published["kind"] == kind) & (published["blocks"] != "best 6")]
    [theirs] = rivals.loc[(rivals["top1"] - top1).abs().sort_values().index[:1]].to_dict("records")
    gap, low, high = (float(last[column]) - theirs["top1"] for column in (name, f"{name}_lo95", f"{name}_hi95"))
    scale = ", ".join(
        f"{human(float(last[column]))} {words}"
        for column, words in (("params_total", "parameters"), ("images_seen", "images seen"))
        if column in last and pd.notna(last[column])
    )
    blocks = ", last blocks" if plain else ""
    interval = f" [{100 * low:+.1f}, {100 * high:+.1f}], from the size of our test split" if np.isfinite(low) else ""
    lines = (
        f"{task}, {kind} probe{blocks}: {run} ({scale}) has {100 * top1:.1f} %; the nearest published model is "
        f"{theirs['model']} ({theirs['data']}) with {100 * theirs['top1']:.1f} % [{theirs['source']}].",
        f"Gap: {100 * gap:+.1f} points{interval} (theirs is printed without an interval).",
        _differs(last, kind, theirs),
    )
    return Nearest(run=run, task=task, kind=kind, published=theirs, gap=gap, gap_lo95=low, gap_hi95=high, lines=lines)


def _differs(row: pd.Series, kind: str, theirs: Mapping[Hashable, Any]) -> str:
    """What is not comparable between the two results."""
    found = [f"they saw {theirs['data']}"]
    if row["task"] != theirs["task"]:
        found.append(f"our task is {row['task']}, put beside {theirs['task']} as asked")
    if "image_size" in row and pd.notna(row["image_size"]) and row["image_size"] != theirs["image_size"]:
        found.append(f"{int(row['image_size'])} px against {theirs['image_size']} px")
    if row.get("test_in_train", 0) > 0 or row.get("test_in_pool", 0) > 0:
        found.append("some of our test images were seen in training")
    found += [theirs["caveat"]] if theirs["caveat"] else []
    if kind == "efficient":
        found.append("ours trains with AdamW, norm in front of the pooling, theirs with LARS and the norm behind it")
    return "Not comparable: " + "; ".join(found) + "; and losses (other images, patches and prefixes)."
