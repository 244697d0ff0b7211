"""Accuracy: every probe, its correlation with the loss, what is expected beyond the table."""

from __future__ import annotations

import numpy as np
import pandas as pd

from aimscale.analysis.fitting.sentences import kind_name
from aimscale.analysis.plots.style import human
from aimscale.analysis.report.cells import PageTable, number, page_table, percent, spans, text, whole
from aimscale.analysis.report.expected import accuracy_forecasts
from aimscale.analysis.report.study import Study


def probe_table(study: Study) -> PageTable | None:
    """Every frozen-feature result."""
    if study.probes.empty:
        return None
    frame = study.probes.copy()
    frame["kind"] = frame["kind"].map(kind_name)
    frame["interval"] = [
        f"{100 * lo:.1f} to {100 * hi:.1f}" if np.isfinite(lo) and np.isfinite(hi) else "–"
        for lo, hi in zip(frame["top1_lo95"], frame["top1_hi95"], strict=True)
    ]
    frame["block_list"] = ["–" if b is None else ", ".join(str(int(i)) for i in b) for b in frame["blocks"]]
    return page_table(
        "probes",
        "Frozen-feature accuracy, and LoRA's"
        if (frame["kind"] == kind_name("lora")).any()
        else "Frozen-feature accuracy",
        "Top-1 on the test split, scored once; blocks and rates were chosen on a hold-out of the training split. LoRA "
        "adapts the trunk and uses the last blocks; all other kinds read frozen features.",
        frame,
        [
            ("task", "task", text),
            ("kind", "probe", text),
            ("size", "size", text),
            ("params_total", "N", whole),
            ("images_seen", "D (images)", whole),
            ("val_loss", "loss", number(4)),
            ("top1", "top-1 (%)", percent),
            ("interval", "95 % interval", text),
            ("last_top1", "on the last blocks (%)", percent),
            ("chance", "chance (%)", percent),
            ("n", "n", whole),
            ("block_list", "blocks", text),
            ("lr", "rate", human),
        ],
    )


def correlation_table(study: Study) -> PageTable | None:
    """Loss against accuracy, every coefficient."""
    if not study.correlations:
        return None
    frame = pd.DataFrame(
        {
            "kind": kind_name(kind),
            "task": task,
            "method": c.method + (" at equal compute" if c.partial_on else f" within a {c.within}" if c.within else ""),
            "how": c.interval_method,
            "value": c.value,
            "low": c.low,
            "high": c.high,
            "n": c.num_points,
        }
        for (kind, task), found in study.correlations.items()
        for c in found
    )
    return page_table(
        "correlations",
        "Validation loss against accuracy",
        "−1: whoever has the lower loss always has the higher accuracy. At equal compute: within groups of rows "
        "that share it, else about a smooth function of it; within a size: less the mean of each size.",
        frame,
        [
            ("task", "task", text),
            ("kind", "probe", text),
            ("method", "coefficient", text),
            ("value", "value", number(3)),
            ("low", "low", number(3)),
            ("high", "high", number(3)),
            ("n", "points", whole),
            ("how", "95 % interval by", text),
        ],
    )


def accuracy_forecast_table(study: Study) -> PageTable | None:
    """Accuracy beyond the table, by way of the loss."""
    frame = accuracy_forecasts(study)
    if frame.empty:
        return None
    frame["kind"] = frame["kind"].map(kind_name)
    frame["scale"] = [f"{n:g} × N, {d:g} × D" for n, d in zip(frame["times_n"], frame["times_d"], strict=True)]
    frame["interval"] = spans(frame["pi_lo"], frame["pi_hi"], percent)
    return page_table(
        "accuracy-forecast",
        "Accuracy expected beyond this table",
        "Two steps: scale to loss by the law that forecasts, loss to accuracy by a sigmoid above chance; the interval "
        "has errors of both and the scatter of one measurement. Loss alone may not decide accuracy: see the figure.",
        frame,
        [
            ("task", "task", text),
            ("kind", "probe", text),
            ("scale", "scale", text),
            ("loss", "expected loss", number(4)),
            ("accuracy", "expected top-1 (%)", percent),
            ("interval", "95 % prediction interval (%)", text),
            ("beyond_range", "beyond range (×)", number(1)),
        ],
    )
