"""The report's tables: cells with a text to read, a value to sort by, and the same numbers as CSV."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.baselines.comparison import Comparison
from aimscale.analysis.baselines.published import BASELINES, LOSS_SOURCE, PUBLISHED_SIZES, TASK_TITLES, TASKS
from aimscale.analysis.baselines.worked_example import forecast_frame, four_points
from aimscale.analysis.fitting.sentences import kind_name
from aimscale.analysis.plots.style import human
from aimscale.analysis.report.study import Study, accuracy_forecasts, forecasts
from aimscale.analysis.tables.design import DESIGN, design_columns
from aimscale.analysis.tables.results import loss_unit

MAX_ROWS = 400
"""Rows shown on the page; the CSV beside the table has all."""
MAX_CSV_BYTES = 3_000_000
"""Larger CSV is not put into the page."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell."""

    text: str
    """What is read."""
    sort: float | str
    """What is sorted by; missing numbers sort last."""
    numeric: bool
    """Aligned right."""


@dataclass(frozen=True, kw_only=True)
class PageTable:
    """One table of the page."""

    key: str
    """HTML id and file name of the download."""
    title: str
    """Heading."""
    note: str
    """A line below the heading: units, source, protocol."""
    headers: tuple[str, ...]
    """Column headings."""
    rows: tuple[tuple[Cell, ...], ...]
    """Cells, at most `MAX_ROWS` rows."""
    num_rows: int
    """Rows of the whole table."""
    csv_uri: str | None
    """The whole table as a data URI, or None when it is too large."""


Formatter = Callable[[Any], str]


def number(digits: int = 3) -> Formatter:
    """A plain number, e.g. a loss."""
    return lambda value: f"{value:.{digits}f}"


def percent(value: Any) -> str:
    """A fraction as per cent."""
    return f"{100 * value:.1f}"


def whole(value: Any) -> str:
    """An exact count."""
    return f"{value:,.0f}"


def text(value: Any) -> str:
    """A name as it is."""
    return str(value)


def spans(lows: Iterable[Any], highs: Iterable[Any], as_text: Formatter) -> list[str]:
    """Intervals in words, `low to high`."""
    return [f"{as_text(low)} to {as_text(high)}" for low, high in zip(lows, highs, strict=True)]


def page_table(
    key: str, title: str, note: str, frame: pd.DataFrame, columns: Sequence[tuple[str, str, Formatter]]
) -> PageTable:
    """Lay out a data frame.

    Args:
        key: HTML id.
        title: heading.
        note: line below it.
        frame: the numbers.
        columns: (column of the frame, heading, formatter); columns that the frame lacks or that are all missing
            are left out.
    """
    shown = [(name, head, form) for name, head, form in columns if name in frame and frame[name].notna().any()]
    rows = [
        tuple(_cell(value, form) for value, (_, _, form) in zip(values, shown, strict=True))
        for values in frame[[name for name, _, _ in shown]].head(MAX_ROWS).itertuples(index=False, name=None)
    ]
    return PageTable(
        key=key,
        title=title,
        note=note,
        headers=tuple(head for _, head, _ in shown),
        rows=tuple(rows),
        num_rows=len(frame),
        csv_uri=csv_uri(frame[[name for name, _, _ in shown]]),
    )


def _cell(value: Any, form: Formatter) -> Cell:
    if value is None or (isinstance(value, (float, np.floating)) and not np.isfinite(value)):
        return Cell(text="–", sort="", numeric=form is not text)
    if isinstance(value, str) or form is text:
        return Cell(text=str(value), sort=str(value), numeric=False)
    return Cell(text=form(value), sort=float(value), numeric=True)


def csv_uri(frame: pd.DataFrame) -> str | None:
    """A data frame as a `data:` URI of CSV; cells that a spreadsheet would run as a formula are quoted with '."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(frame.columns)
    for values in frame.itertuples(index=False, name=None):
        writer.writerow([f"'{v}" if isinstance(v, str) and v[:1] in ("=", "+", "-", "@") else v for v in values])
    encoded = base64.b64encode(buffer.getvalue().encode()).decode()
    return f"data:text/csv;base64,{encoded}" if len(encoded) <= MAX_CSV_BYTES else None


def ladder_table(study: Study) -> PageTable:
    """One row per size: what it is and what it cost."""
    frame = study.frame
    frame = frame.assign(size=_size_of(frame))
    keep = [c for c in ("params_trunk", "params_head", "params_total", "flops_per_image") if c in frame]
    ladder = frame.groupby("size", sort=False)[keep].first()
    groups = frame.groupby("size", sort=False)
    if "run_id" in frame:
        ladder["num_runs"] = groups["run_id"].nunique()
    for name in ("images_per_s", "mfu"):
        if name in frame:
            ladder[name] = groups[name].median()
    if "device_hours" in frame:
        ladder["device_hours"] = groups["device_hours"].sum(min_count=1)
    if "val_loss" in frame:
        ladder["best_loss"] = study.usable.groupby(_size_of(study.usable))["val_loss"].min()
    ladder = ladder.reset_index()
    if "params_total" in ladder:
        ladder = ladder.sort_values("params_total")
    return page_table(
        "ladder",
        "The sizes",
        "Parameters; training FLOPs per image (3 × forward, head and attention counted); median throughput and MFU "
        "(share of the measured matrix-multiplication peak); device time of all budgets.",
        ladder,
        [
            ("size", "size", text),
            ("params_trunk", "trunk", whole),
            ("params_head", "pixel head", whole),
            ("params_total", "all parameters", whole),
            ("flops_per_image", "FLOP/image", human),
            ("num_runs", "runs", whole),
            ("images_per_s", "images/s", human),
            ("mfu", "MFU (%)", percent),
            ("device_hours", "device-hours", human),
            ("best_loss", "lowest loss", number(4)),
        ],
    )


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
        f"One row per run and data budget.{_loss_words(study)} SE: standard error of the loss over validation images.",
        study.frame,
        [
            ("size", "size", text),
            ("params_total", "N", whole),
            ("images_seen", "D (images)", whole),
            ("unique_images", "U (images)", whole),
            ("flops_train", "C (FLOP)", human),
            ("val_loss", "loss", number(4)),
            ("val_loss_se", "SE", number(4)),
            ("train_loss", "train loss", number(4)),
            ("status", "status", text),
            ("seed", "seed", whole),
            *[(name, name.replace("_", " "), text) for name in design_columns(study.frame) if name in DESIGN],
            ("images_per_s", "images/s", human),
            ("mfu", "MFU (%)", percent),
            ("wall_s", "wall (s)", number(1)),
            ("num_skipped_steps", "skipped steps", whole),
            ("run_id", "run", text),
        ],
    )


def _loss_words(study: Study) -> str:
    """What a loss is, where the table says so."""
    unit = loss_unit(study.usable)
    return f" Loss: {unit} per scored target on held-out images." if unit else ""


def law_tables(study: Study) -> list[PageTable]:
    """The parameters of every fit."""
    tables = []
    for key, fit in study.fits.items():
        frame = fit.table
        frame["shown"] = [fit.shown(name) for name in fit.params]
        numeric = [None if isinstance(v, str) else float(v) for v in frame["value"]]
        frame["value"] = pd.Series(numeric, dtype="float64")
        tables.append(
            page_table(
                f"law-{key}",
                f"{fit.law.formula}, fitted to {fit.num_points} points",
                f"Rows: {study.selections.get(key, 'all')}. {fit.interval_method.capitalize()}.",
                frame,
                [
                    ("parameter", "parameter", text),
                    ("shown", f"value [{100 * fit.confidence:.0f} % interval]", text),
                    ("low", "low", human),
                    ("high", "high", human),
                    ("note", "note", text),
                ],
            )
        )
    return tables


def forecast_table(study: Study) -> PageTable | None:
    """What the joint law expects beyond the table."""
    frame = forecasts(study)
    if frame.empty:
        return None
    frame["scale"] = [f"{n:g} × N, {d:g} × D" for n, d in zip(frame["times_n"], frame["times_d"], strict=True)]
    frame["interval"] = spans(frame["pi_lo"], frame["pi_hi"], number(4))
    return page_table(
        "forecast",
        "What the joint law expects beyond this table",
        "From the largest size and budget. The interval is for one new measurement; it assumes that the law holds "
        "there, which the last column says how far nobody has checked.",
        frame,
        [
            ("scale", "scale", text),
            ("N", "N", human),
            ("D", "D (images)", human),
            ("value", "expected loss", number(4)),
            ("interval", "95 % prediction interval", text),
            ("beyond_range", "beyond range (×)", number(1)),
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
        "Two steps: scale to loss by the joint law, loss to accuracy by a sigmoid above chance; the interval carries "
        "the errors of both and the scatter of one measurement. Loss alone may not decide accuracy: see the figure.",
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


def heldout_table(study: Study) -> PageTable | None:
    """Extrapolation tests of the joint law."""
    joint = study.fits.get("ND")
    if joint is None or not joint.heldout:
        return None
    frame = pd.DataFrame(
        {
            "variable": f"largest {test.variable} ({', '.join(map(human, test.values))})",
            "num_train": test.num_train,
            "num_test": test.num_test,
            "error": test.mean_abs_relative_error,
            "naive": test.naive_mean_abs_relative_error,
            "inside": f"{test.num_inside} of {test.num_test}",
        }
        for test in joint.heldout
    )
    return page_table(
        "heldout",
        "Does the law extrapolate?",
        f"Fitted without the largest scale, then compared with it. The baseline is {joint.heldout[0].naive}.",
        frame,
        [
            ("variable", "left out", text),
            ("num_train", "fitted", whole),
            ("num_test", "predicted", whole),
            ("error", "mean error of the law (%)", lambda v: f"{100 * v:.2f}"),
            ("naive", "of the baseline (%)", lambda v: f"{100 * v:.2f}"),
            ("inside", "inside their 95 % interval", text),
        ],
    )


def frontier_table(study: Study) -> PageTable | None:
    """Exponents of N*(C) by each approach."""
    if study.approaches is None or not study.approaches.frontiers:
        return None
    return page_table(
        "frontiers",
        "Compute-optimal size, by approach",
        "N* grows as a power of C; 1: envelope of training curves, 2: a parabola at each compute, 3: the joint law.",
        study.approaches.table,
        [
            ("approach", "approach", whole),
            ("exponent", "exponent", number(3)),
            ("low", "low", number(3)),
            ("high", "high", number(3)),
            ("method", "method", text),
            ("refused", "budgets refused", whole),
        ],
    )


def worked_example_table() -> PageTable:
    """The paper's 7B forecast from its three smaller models."""
    frame = forecast_frame()
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
        "−1: whoever has the lower loss always has the higher accuracy. At equal compute: log compute is regressed "
        "out of both first; within a size: less the mean of each size.",
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
