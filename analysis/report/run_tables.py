"""What was run and what it cost."""

from __future__ import annotations

import pandas as pd

from aimscale.analysis.plots.style import human
from aimscale.analysis.report.cells import Formatter, PageTable, number, page_table, percent, text, whole
from aimscale.analysis.report.study import Study
from aimscale.analysis.table.design import DESIGN, design_columns
from aimscale.analysis.table.names import their_name
from aimscale.analysis.table.points import usable_rows
from aimscale.analysis.table.read import loss_unit
from aimscale.analysis.table.schema import MFU

MFU_COLUMNS: list[tuple[str, str, Formatter]] = [(name, f"MFU {how} (%)", percent) for name, how in MFU.items()]


def last_of_runs(frame: pd.DataFrame, column: str) -> pd.Series:
    """A cost at the largest budget of each run: the row of a budget counts what the smaller ones trained, too."""
    if "run_id" not in frame:
        return frame[column]
    known = frame.dropna(subset=column)
    return known.loc[known.groupby("run_id")[column].idxmax(), column]


def ladder_table(study: Study) -> PageTable:
    """One row per size: what it is and what it cost."""
    frame = study.frame
    frame = frame.assign(size=_size_of(frame))
    keep = [c for c in ("params_trunk", "params_head", "params_total", "flops_per_image") if c in frame]
    ladder = frame.groupby("size", sort=False)[keep].first()
    groups = frame.groupby("size", sort=False)
    if "run_id" in frame:
        ladder["num_runs"] = groups["run_id"].nunique()
    for name in ("images_per_s", *MFU):
        if name in frame:
            ladder[name] = groups[name].median()
    if "device_hours" in frame:
        ladder["device_hours"] = last_of_runs(frame, "device_hours").groupby(frame["size"]).sum(min_count=1)
    if "val_loss" in frame:
        main = usable_rows(study.main).rows
        ladder["best_loss"] = main.groupby(_size_of(main))["val_loss"].min()
    ladder = ladder.reset_index()
    if "params_total" in ladder:
        ladder = ladder.sort_values("params_total")
    return page_table(
        "ladder",
        "The sizes",
        _sentence(
            ladder,
            params_total="parameters",
            flops_per_image="training FLOPs per image (3 × forward, head and attention counted)",
            images_per_s="median throughput and MFU (FLOPs by the published formula or as executed, over the device's "
            "nominal or measured peak)",
            device_hours="device time of training to the largest budget of each run",
        ),
        ladder,
        [
            ("size", "size", text),
            ("params_trunk", "trunk", whole),
            ("params_head", "pixel head", whole),
            ("params_total", "all parameters" if study.is_ours else their_name(frame, "params_total"), whole),
            ("flops_per_image", "FLOP/image", human),
            ("num_runs", "runs", whole),
            ("images_per_s", "images/s", human),
            *MFU_COLUMNS,
            ("device_hours", "device-hours", human),
            ("best_loss", "lowest loss", number(4)),
        ],
    )


def _sentence(frame: pd.DataFrame, **words: str) -> str:
    """What the columns are that the frame has, by their name."""
    text = "; ".join(word for name, word in words.items() if name in frame and frame[name].notna().any())
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _size_of(frame: pd.DataFrame) -> pd.Series:
    """Name of each row's size, or its parameters."""
    if "size" in frame:
        return frame["size"]
    named = frame["params_total"].map(human) if "params_total" in frame else pd.Series("all", index=frame.index)
    return named.rename("size")


def results_page_table(study: Study) -> PageTable:
    """Every row of the table."""
    return page_table(
        "results",
        "Every measurement",
        f"One row per run and data budget.{_loss_words(study)} SE: standard error of the loss.",
        study.frame,
        [
            ("size", "size", text),
            ("params_total", "N", whole),
            ("images_seen", f"D ({study.samples})", whole),
            ("unique_images", f"U ({study.samples})", whole),
            ("flops_train", "C (FLOP)", human),
            ("val_loss", "loss", number(4)),
            ("val_loss_se", "SE", number(4)),
            ("train_loss", "train loss", number(4)),
            ("status", "status", text),
            ("seed", "seed", whole),
            *[(name, name.replace("_", " "), text) for name in design_columns(study.frame) if name in DESIGN],
            ("images_per_s", "images/s", human),
            *MFU_COLUMNS,
            ("wall_s", "wall (s)", number(1)),
            ("num_skipped_steps", "skipped steps", whole),
            ("run_id", "run", text),
        ],
    )


def _loss_words(study: Study) -> str:
    """What a loss is, where the table says so."""
    unit = loss_unit(study.usable)
    return f" Loss: {unit} per scored target on held-out images." if unit else ""
