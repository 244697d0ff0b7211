"""Tables of the page: cells with a text to read, a value to sort by, and the same numbers as CSV."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from aimscale.analysis.forecasts.ahead import record, record_words
from aimscale.analysis.published.comparison import ADAPTED, Comparison
from aimscale.analysis.report.study import Study
from aimscale.analysis.table.design import DESIGN, design_columns, told_apart, varies
from aimscale.analysis.table.read import loss_unit
from aimscale.analysis.table.schema import MFU
from aimscale.analysis.words import accuracy_of, human, kind_name

MAX_ROWS = 100
"""Rows shown on the page; the CSV beside the table has all."""
CSV_DIGITS = "%.5g"
"""Digits of the numbers in a page's CSV."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes text that begins so for a formula."""
PROSE = ("note",)
"""Columns of our own words, whose formulas are set as such; names of others stay as they are."""


def percent(value: float) -> str:
    """A fraction as per cent."""
    return f"{100 * value:.1f}"


def whole(value: float) -> str:
    """An exact count."""
    return f"{value:,.0f}"


Form = str | Callable[[Any], str]
_LOSS = ".4f"
COLUMNS: dict[str, tuple[str, Form]] = {
    "kind": ("kind", ""),
    "params_total": ("N", whole),
    "images_seen": ("D (images)", whole),
    "unique_images": ("U (images)", whole),
    "flops_train": ("C (FLOP)", human),
    "val_loss": ("loss", _LOSS),
    "val_loss_se": ("SE", _LOSS),
    "train_loss": ("train loss", _LOSS),
    "images_per_s": ("images/s", human),
    **{name: (f"MFU {how} (%)", percent) for name, how in MFU.items()},
    "device_hours": ("device-hours", human),
    "num_skipped_steps": ("skipped steps", whole),
    "run_id": ("run", ""),
    "top1": ("top-1 (%)", percent),
    "interval": ("95 % interval", ""),
    "last_top1": ("on the last blocks (%)", percent),
    "chance": ("chance (%)", percent),
    "n": ("n", whole),
    "distance": ("times beyond the table", human),
    "lr": ("rate", human),
    "num_train": ("fitted", whole),
    "num_test": ("predicted", whole),
    "error": ("mean error of the law (%)", lambda v: f"{100 * v:.2g}"),
    "naive": ("of a straight line (%)", lambda v: f"{100 * v:.2g}"),
    "inside": ("inside their 95 % interval", ""),
    "low": ("low", _LOSS),
    "high": ("high", _LOSS),
    "num_run_pairs": ("pairs of runs", whole),
    "num_pairs": ("pairs of rows", whole),
    "num_sizes": ("sizes", whole),
    "degrees": ("degrees of freedom", lambda v: f"{v:.3g}"),
    "baseline_mean": ("at the baseline", _LOSS),
    "level_mean": ("at the level", _LOSS),
    "difference": ("difference", _LOSS),
    "detectable": ("detectable", _LOSS),
    "aim_7b": ("AIM-7B", percent),
    "gap_to_aim_7b": ("gap", percent),
    "best_frozen": ("best frozen", ""),
    "best_frozen_top1": ("its top-1", percent),
    "gap_to_best_frozen": ("gap to it", percent),
    "baseline_top1": ("its top-1 (%)", percent),
    "gap": ("gap", percent),
    "verdict": ("verdict", ""),
}
"""Column -> heading and how its numbers are written; another column is headed by its name, its numbers to 4 digits."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell."""

    text: str
    sort: float | str
    """What is sorted by; missing numbers sort last."""
    numeric: bool
    """Aligned right."""
    is_prose: bool = False
    """Our own words, whose formulas are set as such."""


@dataclass(frozen=True, kw_only=True)
class PageTable:
    """One table of the page."""

    key: str
    """HTML id and file name of the download."""
    title: str
    note: str
    """A line below the heading: units, source, protocol."""
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    """Cells, at most `MAX_ROWS` rows."""
    num_rows: int
    """Rows of the whole table."""
    csv_name: str
    """File name of the download: of a table that is cut it is compressed."""
    csv_uri: str
    """The whole table as a data URI."""
    sentences: tuple[str, ...]
    """What it comes to, above the table."""


def page_table(
    key: str,
    title: str,
    note: str,
    frame: pd.DataFrame,
    columns: Iterable[str],
    heads: Mapping[str, str] | None = None,
    sentences: Iterable[str] = (),
) -> PageTable:
    """Lay out a data frame.

    Args:
        columns: columns of the frame; those that it lacks or that are all missing are left out.
        heads: headings other than those of `COLUMNS`.
    """
    shown = [name for name in columns if name in frame and frame[name].notna().any()]
    known = {name: COLUMNS.get(name, (name.replace("_", " "), ".4g")) for name in shown}
    rows = [
        tuple(_cell(value, known[name][1], name in PROSE) for name, value in zip(shown, values, strict=True))
        for values in frame[shown].head(MAX_ROWS).itertuples(index=False, name=None)
    ]
    return PageTable(
        key=key,
        title=title,
        note=note,
        headers=tuple((heads or {}).get(name, known[name][0]) for name in shown),
        rows=tuple(rows),
        num_rows=len(frame),
        csv_name=f"{key}.csv{'.gz' if len(frame) > MAX_ROWS else ''}",
        csv_uri=csv_uri(frame[shown]),
        sentences=tuple(sentences),
    )


def _cell(value: Any, form: Form, is_prose: bool) -> Cell:
    if value is None or (isinstance(value, (float, np.floating)) and not np.isfinite(value)):
        return Cell(text="–", sort="", numeric=bool(form))
    if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
        return Cell(text=form(value) if callable(form) else f"{value:{form}}", sort=float(value), numeric=True)
    return Cell(text=str(value), sort=str(value), numeric=False, is_prose=is_prose)


def csv_uri(frame: pd.DataFrame) -> str:
    """A data frame as a `data:` URI of CSV, compressed beyond `MAX_ROWS` rows; cells that a spreadsheet would run as a
    formula are quoted with '."""
    texts = frame.select_dtypes(exclude="number")
    safe = texts.map(lambda v: f"'{v}" if isinstance(v, str) and v.startswith(FORMULA) else v)
    whole = {
        name: "Int64"
        for name, values in frame.select_dtypes("float").items()
        if (values.dropna() % 1 == 0).all() and values.abs().max() < 2**53
    }
    content = frame.assign(**safe).astype(whole).to_csv(index=False, float_format=CSV_DIGITS).encode()
    if len(frame) <= MAX_ROWS:
        return data_uri("text/csv", content)
    return data_uri("application/gzip", gzip.compress(content, mtime=0))


def data_uri(mime: str, content: bytes) -> str:
    """Content that travels inside the page."""
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def _spans(lows: Iterable[float], highs: Iterable[float], form: Callable[[float], str]) -> list[str]:
    """Intervals in words, `low to high`."""
    ends = zip(lows, highs, strict=True)
    return [f"{form(low)} to {form(high)}" if np.isfinite([low, high]).all() else "–" for low, high in ends]


def results_page_table(study: Study) -> PageTable:
    """Every row of the table."""
    frame = study.frame
    if "num_skipped_steps" in frame and not frame["num_skipped_steps"].any():
        frame = frame.drop(columns="num_skipped_steps")
    unit = loss_unit(study.usable)
    words = f" Loss: {unit} per scored target on held-out images." if unit else ""
    return page_table(
        "results",
        "Every measurement",
        f"One row per run and data budget.{words}",
        frame,
        (
            *("size", "params_total", "images_seen", "unique_images", "flops_train", "val_loss", "val_loss_se"),
            *("train_loss", "status", "seed", *[name for name in design_columns(study.frame) if name in DESIGN]),
            *("images_per_s", *MFU, "device_hours", "num_skipped_steps", "run_id"),
        ),
        {"images_seen": f"D ({study.samples})", "unique_images": f"U ({study.samples})"},
    )


def law_tables(study: Study) -> list[PageTable]:
    """The parameters of every fit."""
    whose = f" {study.whose}" if study.whose else ""
    return [
        page_table(
            f"law-{key}",
            f"{fit.law.formula}, fitted to {fit.num_points} points",
            f"Rows{whose}{' that no cheaper row beats' * (key == 'C')}. Intervals: {fit.interval_method}.",
            fit.table.assign(
                shown=[fit.shown(name) for name in fit.params],
                note=fit.table["note"].where(fit.table["note"] != "", None),
            ),
            ("parameter", "shown", "note"),
            {"shown": "value [95 % interval]"},
        )
        for key, fit in study.fits.items()
    ]


def heldout_table(study: Study) -> PageTable | None:
    """Extrapolation tests of the joint law."""
    joint = study.fits.get("ND")
    if joint is None or not joint.heldout:
        return None
    frame = pd.DataFrame(
        {
            "left out": f"largest {test.variable} ({', '.join(told_apart(test.values, human, 3))})",
            "num_train": test.num_train,
            "num_test": test.num_test,
            "error": test.mean_abs_relative_error,
            "naive": test.naive_mean_abs_relative_error,
            "inside": f"{test.num_inside} of {test.num_test}",
        }
        for test in joint.heldout
    )
    note = "Fitted without the largest scale, then compared with it; so is a straight line in log-log."
    return page_table("heldout", "Does the law extrapolate?", note, frame, frame.columns)


def forecast_table(study: Study) -> PageTable | None:
    """Loss and accuracies at the scales that the page forecasts at, accuracies as fractions."""
    if study.ahead is None:
        return None
    found = study.ahead
    rows = []
    for row in found.table.to_dict("records"):
        task, _, kind = row["quantity"].partition(":")
        at = found.scales[row["at"]]
        shown = {name: human(row[name]) for name in ("value", "pi_lo", "pi_hi", "rival_lo", "rival_hi")}
        rows.append(
            {
                "quantity": f"{accuracy_of(kind)} on {task}" if kind else "loss",
                "at": f"N = {human(at['N'])}, D = {human(at['D'])}",
                "value": row["value"],
                "interval": f"{shown['pi_lo']} to {shown['pi_hi']}",
                "distance": row["distance"],
                "rivals": f"{shown['rival_lo']} to {shown['rival_hi']}",
            }
        )
    fared = record_words(record(float(found.table["distance"].max())), accuracies=len(found.forecasters) > 1)
    heads = {"at": "of a run at", "rivals": "rival laws"}
    frame = pd.DataFrame(rows)
    return page_table("forecasts", "Forecasts", " ".join(fared), frame, frame.columns, heads)


PROBE_NOTE = (
    "Top-1 on the test split, scored once. Blocks and learning rates were chosen on a hold-out of the training split."
)
LORA_NOTE = " LoRA adapts the backbone and uses the last blocks; all other kinds read frozen features."


def probe_table(study: Study) -> PageTable | None:
    """Every frozen-feature result."""
    if study.probes.empty:
        return None
    frame = study.probes.copy()
    is_adapted = frame["kind"].eq(ADAPTED).any()
    frame["kind"] = frame["kind"].map(kind_name)
    frame["interval"] = _spans(frame["top1_lo95"], frame["top1_hi95"], percent)
    frame["blocks"] = frame["blocks"].map(lambda blocks: ", ".join(map(str, blocks)), na_action="ignore")
    if len(known := set(frame["blocks"].dropna())) == 1 and "," not in known.pop():  # there was nothing to choose
        frame = frame.drop(columns=["blocks", "last_top1"])
    return page_table(
        "probes",
        "Frozen-feature accuracy" if study.is_ours else "Accuracy",
        f"{PROBE_NOTE}{LORA_NOTE if is_adapted else ''}" if study.is_ours else "As the table has it.",
        frame,
        (
            *("task", "kind", "size", "params_total", "images_seen", "val_loss", "top1", "interval", "last_top1"),
            *("chance", "ideal", "n", "blocks", "lr"),
        ),
        {"images_seen": f"D ({study.samples})"},
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
        (
            *("task", "size", "params_total", "images_seen", "blocks", "top1", "aim_7b", "gap_to_aim_7b"),
            *("best_frozen", "best_frozen_top1", "gap_to_best_frozen"),
        ),
        {"top1": "ours"},
    )


def baseline_table(comparison: Comparison) -> PageTable | None:
    """Ours beside raw pixels, random weights and other models that were probed on the same tasks."""
    if comparison.baselines.empty:
        return None
    frame = comparison.baselines.sort_values(["params_total", "task", "kind"], ascending=[False, True, True])
    seen = ["images_seen"] if varies(frame["images_seen"]) else []
    frame["kind"] = frame["kind"].map(kind_name)
    frame["interval"] = _spans(frame["gap_lo95"], frame["gap_hi95"], percent)
    frame["detectable"] = frame["detectable"].map(percent)
    return page_table(
        "baselines",
        "Beside baselines on the same probes",
        "Each run at its largest budget and every baseline, on the same images. Gap: ours minus the baseline's, with a "
        "95 % interval over test images, not over seeds. It is paired where hits were kept (p: McNemar's exact test). "
        "Detectable: the minimum detectable gap at 80 % power.",
        frame,
        (
            *("task", "kind", "size", "params_total", *seen, "n", "top1", "baseline", "baseline_top1", "gap"),
            *("interval", "p", "detectable", "verdict"),
        ),
        {"top1": "ours (%)", "verdict": "verdict"},
    )
