"""AIM's published numbers, and ours beside them and beside baselines."""

from __future__ import annotations

import pandas as pd

from aimscale.analysis.fitting.sentences import kind_name
from aimscale.analysis.published.comparison import Comparison
from aimscale.analysis.published.published import BASELINES, LOSS_SOURCE, PUBLISHED_SIZES, TASK_TITLES, TASKS
from aimscale.analysis.published.worked_example import forecast_7b, four_points
from aimscale.analysis.report.cells import Formatter, PageTable, number, page_table, percent, spans, text, whole


def task_comparison_table(comparison: Comparison) -> PageTable | None:
    """Ours beside AIM-7B and the best frozen model, where the task is the same."""
    if comparison.tasks.empty:
        return None
    return page_table(
        "compare",
        "The same tasks, ours and theirs",
        "Attentive probe on frozen features, top-1 in per cent; gaps are ours minus theirs. The last six blocks stand "
        "beside AIM-7B's last six, chosen ones beside its best six.",
        comparison.tasks,
        [
            ("task", "task", text),
            ("size", "size", text),
            ("params_total", "N", whole),
            ("images_seen", "D (images)", whole),
            ("blocks", "blocks", text),
            ("top1", "ours", percent),
            ("aim_7b", "AIM-7B", percent),
            ("gap_to_aim_7b", "gap", percent),
            ("best_frozen", "best frozen", text),
            ("best_frozen_top1", "its top-1", percent),
            ("gap_to_best_frozen", "gap to it", percent),
        ],
    )


def baseline_table(comparison: Comparison) -> PageTable | None:
    """Ours beside raw pixels, random weights and other models that were probed on the same tasks."""
    if comparison.baselines.empty:
        return None
    frame = comparison.baselines.copy()
    frame["kind"] = frame["kind"].map(kind_name)
    frame["interval"] = spans(frame["gap_lo95"], frame["gap_hi95"], percent)
    return page_table(
        "baselines",
        "Beside baselines on the same probes",
        "The largest budget of each run; same tasks, probes, images and seed for the baseline. Gap: ours minus the "
        "baseline's, with Newcombe's 95 % interval, which takes the two as independent.",
        frame,
        [
            ("task", "task", text),
            ("kind", "probe", text),
            ("size", "size", text),
            ("params_total", "N", whole),
            ("images_seen", "D (images)", whole),
            ("top1", "ours (%)", percent),
            ("baseline", "baseline", text),
            ("baseline_top1", "its top-1 (%)", percent),
            ("gap", "gap", percent),
            ("interval", "95 % interval", text),
            ("verdict", "ours is", text),
            ("n", "n", whole),
        ],
    )


def worked_example_table() -> PageTable:
    """The paper's 7B forecast from its three smaller models."""
    frame = pd.DataFrame([vars(forecast) for forecast in forecast_7b("params_trunk")])
    frame["interval"] = spans(frame["low"], frame["high"], number(4))
    return page_table(
        "published-forecast",
        "AIM-7B, forecast from the three smaller published models",
        f"{four_points().sentence()} N: trunk parameters; Student's t with one degree of freedom.",
        frame,
        [
            ("what", "quantity", text),
            ("by", "forecast by", text),
            ("predicted", "forecast", number(4)),
            ("interval", "95 % prediction interval", text),
            ("actual", "published", number(4)),
            ("extrapolation", "beyond fitted N (×)", number(1)),
        ],
    )


def published_tables() -> list[PageTable]:
    """AIM's sizes and Table 6, as published."""
    sizes = pd.DataFrame(
        {
            "key": s.key,
            "trunk": s.params_trunk,
            "total": s.params_total,
            "val_loss": s.val_loss,
            "last": s.in1k_last6,
            "best": s.in1k_best6,
            "lora": s.in1k_lora,
        }
        for s in PUBLISHED_SIZES
    )
    tasks = pd.DataFrame(
        {"model": f"{row.method} {row.arch}", "data": row.data, "layers": row.layers, "mean": row.mean}
        | dict(zip(TASKS, row.top1, strict=True))
        for row in BASELINES
    )
    heads: list[tuple[str, str, Formatter]] = [(task, TASK_TITLES[task], percent) for task in TASKS]
    return [
        page_table(
            "published-sizes",
            "AIM's four sizes, as published",
            f"Loss: {LOSS_SOURCE}. Accuracies: IN-1k top-1 (%), attentive probe, frozen; LoRA adapts weights.",
            sizes,
            [
                ("key", "size", text),
                ("trunk", "trunk", whole),
                ("total", "with head", whole),
                ("val_loss", "IN-1k loss", number(4)),
                ("last", "last 6 blocks", percent),
                ("best", "best 6 blocks", percent),
                ("lora", "LoRA", percent),
            ],
        ),
        page_table(
            "published-tasks",
            "Published baselines, fifteen tasks",
            f"{BASELINES[0].source}; {BASELINES[0].protocol}; accuracy in per cent.",
            tasks,
            [
                ("model", "model", text),
                ("data", "data", text),
                ("layers", "layers", text),
                ("mean", "mean", percent),
                *heads,
            ],
        ),
    ]
