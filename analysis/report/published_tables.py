"""AIM's published numbers, and ours beside them and beside baselines."""

from __future__ import annotations

from aimscale.analysis.fitting.sentences import kind_name
from aimscale.analysis.published.comparison import Comparison
from aimscale.analysis.published.published import LOSS_SOURCE, PAPER, TASK_TITLES, TASKS, published_frame, table6
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


def published_tables() -> list[PageTable]:
    """AIM's sizes and Table 6, as published."""
    tasks = table6().assign(model=table6()["method"] + " " + table6()["arch"])
    heads: list[tuple[str, str, Formatter]] = [(task, TASK_TITLES[task], percent) for task in TASKS]
    return [
        page_table(
            "published-sizes",
            "AIM's four sizes, as published",
            f"Loss: {LOSS_SOURCE}. Accuracies: IN-1k top-1 (%), attentive probe, frozen; LoRA adapts weights.",
            published_frame(),
            [
                ("size", "size", text),
                ("params_trunk", "trunk", whole),
                ("params_total", "with head", whole),
                ("val_loss", "IN-1k loss", number(4)),
                ("in1k_last6", "last 6 blocks", percent),
                ("in1k_best6", "best 6 blocks", percent),
                ("in1k_lora", "LoRA", percent),
            ],
        ),
        page_table(
            "published-tasks",
            "Published baselines, fifteen tasks",
            f"{PAPER}, Table 6; frozen trunk, attentive probe, test split of each benchmark; accuracy in per cent.",
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
