"""The project's own baselines (raw pixels, random weights, timm models) beside the runs, on the same probes.

`aimscale baseline NAME --like RUN` writes them into the run's folder, `aimscale collect` gathers them into
`baselines.parquet` beside `results.parquet`: the same columns, a row per baseline; `size` names it, `run_id` is the run
whose images and seed it got. They are no rows of the table itself, so that no law takes them for runs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from aimscale.analysis.table.results import probe_frame, read_table
from aimscale.analysis.table.schema import FOLDER

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
    theirs = baselines.drop_duplicates(["size", "task", "kind", "n", "top1"]) if len(baselines) else baselines
    if theirs.empty or probes.empty:
        return pd.DataFrame(columns=[*columns, "gap_lo95", "gap_hi95", "verdict"])
    theirs = theirs.rename(columns={"size": "baseline"})
    names = {"top1": "baseline_top1", "top1_lo95": "baseline_lo95", "top1_hi95": "baseline_hi95"}
    theirs = theirs.rename(columns=names)[["task", "kind", "n", "baseline", *names.values()]]
    both = probes.merge(theirs, on=["task", "kind", "n"])
    both["gap"] = both["top1"] - both["baseline_top1"]
    below = np.hypot(both["top1"] - both["top1_lo95"], both["baseline_hi95"] - both["baseline_top1"])
    above = np.hypot(both["top1_hi95"] - both["top1"], both["baseline_top1"] - both["baseline_lo95"])
    both["gap_lo95"], both["gap_hi95"] = both["gap"] - below, both["gap"] + above
    both["verdict"] = np.select([both["gap_lo95"] > 0, both["gap_hi95"] < 0], ["above", "below"], "not told apart")
    for name in ("size", "params_total", "images_seen"):
        if name not in both:
            both[name] = None
    return both[[*columns, "gap_lo95", "gap_hi95", "verdict"]].reset_index(drop=True)
