"""Tables of the page: the cells of a result or of a data frame as a reader sees them, and its numbers as CSV."""

from __future__ import annotations

import base64
import gzip
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pandas as pd

from aimscale.analysis.display import Result
from aimscale.analysis.effects.result import Contrasts
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.forecasts.forecast import scale_words
from aimscale.analysis.published.comparison import ADAPTED, Comparison, share_cells
from aimscale.analysis.published.published import beside_paper, in_words
from aimscale.analysis.report.study import Study
from aimscale.analysis.table.design import DESIGN, design_columns, told_apart, varies
from aimscale.analysis.table.read import loss_unit
from aimscale.analysis.table.schema import MFU
from aimscale.analysis.words import accuracy_of, flag_words, human, kind_name, percent

MAX_ROWS = 100
"""Rows shown on the page; the CSV beside the table has all."""
CSV_DIGITS = "%.5g"
"""Digits of the numbers in a page's CSV."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes text that begins so for a formula."""
LEAST_NOISE = 5e-6
"""Fraction of the loss below which a source of spread would be printed as zero."""
LETTERS = {"k": 1e3, "M": 1e6, "B": 1e9, "": 1.0}
"""Letters behind a number, as `words.human` writes them."""
PLAIN = str.maketrans("−⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "--0123456789")


@dataclass(frozen=True, kw_only=True)
class PageTable:
    """One table of the page."""

    key: str
    """HTML id and file name of the download."""
    title: str
    note: str
    """Line below the heading: units, source, protocol."""
    rows: tuple[dict[str, str], ...]
    """Cells by their head, at most `MAX_ROWS` rows, without columns that are blank."""
    num_rows: int
    """Rows of the whole table."""
    csv_uri: str
    """The whole table as a data URI."""
    facts: tuple[tuple[str, str], ...] = ()
    """What stands above it, as key and value."""
    sentences: tuple[str, ...] = ()
    """What it comes to."""

    @property
    def csv_name(self) -> str:
        """File name of the download: of a table that is cut it is compressed."""
        return f"{self.key}.csv{'.gz' if self.num_rows > MAX_ROWS else ''}"

    @cached_property
    def numeric(self) -> frozenset[str]:
        """Heads of the columns of numbers, which stand to the right."""
        heads = self.rows[0] if self.rows else ()
        return frozenset(h for h in heads if all(row[h] == "–" or number_of(row[h]) is not None for row in self.rows))


def page_table(key: str, title: str, note: str, found: Result | pd.DataFrame, **options: Any) -> PageTable:
    """Lay out a result, or a data frame of it.

    Args:
        options: cells of the rows, if not the result's own; and `facts` and `sentences`.
    """
    frame = found.table if isinstance(found, Result) else found
    rows = options.pop("cells", None) or (found.cells() if isinstance(found, Result) else [])
    heads = [head for head in (rows[0] if rows else ()) if any(row[head] not in ("", "–") for row in rows)]
    shown = tuple({head: row[head] or "–" for head in heads} for row in rows[:MAX_ROWS])
    return PageTable(key=key, title=title, note=note, rows=shown, num_rows=len(rows), csv_uri=csv_uri(frame), **options)


def number_of(text: str) -> float | None:
    """Read the number that a cell begins with, as `words.human` and `words.power_of_ten` write it."""
    plain = re.sub(r"(×?)10([⁻⁰¹²³⁴-⁹]+)", lambda m: f"{'' if m[1] else 1}e{m[2]}", text).translate(PLAIN)
    found = re.match(r"\[?([-+]?(?:\d[\d,]*)?\.?\d+(?:e-?\d+)?)([kMB]?)(?![\w.])", plain)
    return float(found[1].replace(",", "")) * LETTERS[found[2]] if found else None


def sort_key(text: str) -> float | str:
    """Return what a cell is sorted by: its number, else its text; a missing one is empty."""
    number = number_of(text)
    return text.strip("–") if number is None else number


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


HEADS = {
    "params_total": "N", "images_seen": "D", "unique_images": "U", "flops_train": "C (FLOP)", "val_loss": "loss",
    "val_loss_se": "SE", "run_id": "run", **{name: f"MFU {how} (%)" for name, how in MFU.items()},
}  # fmt: skip
"""Column of a results table -> its head on the page, where that is not its name."""
COUNTS = ("params_total", "images_seen", "unique_images", "num_skipped_steps", "seed")


def _cell(name: str, value: Any) -> str:
    """Write one number of a results table."""
    if pd.isna(value):
        return "–"
    if isinstance(value, str):
        return value
    if name in COUNTS:
        return f"{value:,.0f}"
    return f"{value:.4f}" if "loss" in name else f"{100 * value:.1f}" if name in MFU else human(value)


def results_table(study: Study) -> PageTable:
    """Lay out every row of the table."""
    frame = study.frame
    if "num_skipped_steps" in frame and not frame["num_skipped_steps"].any():
        frame = frame.drop(columns="num_skipped_steps")
    names = (
        *("size", "params_total", "images_seen", "unique_images", "flops_train", "val_loss", "val_loss_se"),
        *("train_loss", "status", "seed", *(name for name in design_columns(study.frame) if name in DESIGN)),
        *("images_per_s", *MFU, "device_hours", "num_skipped_steps", "run_id"),
    )
    frame = frame[[name for name in dict.fromkeys(names) if name in frame and frame[name].notna().any()]]
    cells = [
        {HEADS.get(str(name), str(name).replace("_", " ")): _cell(str(name), value) for name, value in row.items()}
        for row in frame.to_dict("records")
    ]
    unit = loss_unit(study.usable)
    note = f"D counts {study.samples}." + (f" Loss: {unit} per scored target on held-out images." if unit else "")
    return page_table("results", "Every measurement", f"One row per run and data budget. {note}", frame, cells=cells)


def law_tables(study: Study) -> Iterator[PageTable]:
    """Lay out the parameters of every fit, with how it was made and what to be careful about."""
    for key, fit in study.fits.items():
        whose = f" {study.whose}" if study.whose else ""
        title = f"{fit.law.formula}, fitted to {fit.num_points} points"
        note = f"Rows{whose}{' that no cheaper row beats' * (key == 'C')}." if whose or key == "C" else ""
        told = ("law", *(f"held out {test.variable}" for test in fit.heldout))  # elsewhere on the page
        facts = [(name, fact) for name, fact in fit.facts() if name not in told]
        yield page_table(f"law-{key}", title, note, fit, facts=tuple(facts))


def law_section(study: Study) -> list[PageTable]:
    """Lay out the forecasts, the left-out scales and the laws."""
    joint = study.fits.get("ND")
    tested = [heldout_table(joint)] if joint is not None and joint.heldout else []
    return [*forecast_tables(study), *tested, *law_tables(study)]


def heldout_table(joint: Fit) -> PageTable:
    """Lay out the extrapolation tests of the joint law; the CSV has every left-out point."""
    cells = [
        {
            "left out": f"largest {test.variable} ({', '.join(told_apart(test.values, human, 3))})",
            "fitted": str(test.num_train),
            "predicted": str(test.num_test),
            "mean error of the law": percent(test.mean_abs_relative_error),
            "of a straight line": percent(test.naive_mean_abs_relative_error),
            "inside their 95 % interval": f"{test.num_inside} of {test.num_test}",
            "not identified without it": ", ".join(sorted(test.not_identified)),
        }
        for test in joint.heldout
    ]
    points = pd.concat([test.predictions.assign(left_out=test.variable) for test in joint.heldout], ignore_index=True)
    note = "Fitted without the largest scale, then compared with it; so is a straight line in log-log."
    return page_table("heldout", "Does the law extrapolate?", note, points, cells=cells)


def forecast_tables(study: Study) -> Iterator[PageTable]:
    """Lay out loss and accuracies at the scales that the page forecasts at, accuracies as fractions."""
    found = study.ahead
    if found is None:
        return
    cells = []
    for row in found.table.to_dict("records"):
        task, _, kind = row["quantity"].partition(":")
        ends = {name: human(row[name]) for name in ("pi_lo", "pi_hi", "rival_lo", "rival_hi")}
        cells.append(
            {
                "quantity": f"{accuracy_of(kind)} on {task}" if kind else "loss",
                "of a run at": scale_words(found.scales[row["at"]]),
                "value": human(row["value"], 4),
                "95 % interval": f"{ends['pi_lo']} to {ends['pi_hi']}",
                "times beyond the table": human(row["distance"]),
                "single laws": f"{ends['rival_lo']} to {ends['rival_hi']}",
            }
        )
    fared = dict.fromkeys(words for each in found.table["distance"].unique() for words in found.record(float(each)))
    facts = tuple(found.loss.facts())
    yield page_table(
        "forecasts", "Forecasts", "".join(f"{words}. " for words in fared), found.table, cells=cells, facts=facts
    )


PROBE_NOTE = (
    "Top-1 in per cent on the test split, scored once. Blocks and learning rates were chosen on a hold-out of the "
    "training split."
)
LORA_NOTE = " LoRA adapts the backbone and uses the last blocks; all other kinds read frozen features."


def probe_table(study: Study) -> PageTable | None:
    """Lay out every frozen-feature result."""
    if study.probes.empty:
        return None
    frame = study.probes.copy()
    is_adapted = frame["kind"].eq(ADAPTED).any()
    frame["kind"] = frame["kind"].map(kind_name)
    frame["blocks"] = frame["blocks"].map(lambda blocks: ", ".join(map(str, blocks)), na_action="ignore")
    if len(known := set(frame["blocks"].dropna())) == 1 and "," not in known.pop():  # there was nothing to choose
        frame = frame.drop(columns=["blocks", "last_top1"])
    names = ("task", "kind", "size", "params_total", "images_seen", "val_loss", "top1", "top1_lo95", "top1_hi95")
    title = "Frozen-feature accuracy" if study.is_ours else "Accuracy"
    note = f"{PROBE_NOTE}{LORA_NOTE if is_adapted else ''}" if study.is_ours else "Top-1 in per cent."
    return _share_table("probes", title, note, frame, (*names, "last_top1", "chance", "ideal", "n", "blocks", "lr"))


def _share_table(key: str, title: str, note: str, frame: pd.DataFrame, names: Sequence[str]) -> PageTable:
    """Lay out columns of a frame whose shares are told in per cent."""
    frame = frame[[name for name in dict.fromkeys(names) if name in frame and frame[name].notna().any()]]
    cells = [
        {HEADS.get(head, head.replace("_", " ")): cell for head, cell in row.items()} for row in share_cells(frame)
    ]
    return page_table(key, title, note, frame, cells=cells)


def comparison_tables(comparison: Comparison) -> Iterator[PageTable]:
    """Lay out ours beside AIM-7B and the best frozen model on the same tasks, and beside the table's own baselines."""
    if len(tasks := comparison.tasks):
        names = [str(name) for name in tasks if name not in ("top1_lo95", "top1_hi95")]
        note = (
            "Attentive probe on frozen features, top-1 in per cent; gaps are ours minus theirs. The last six blocks "
            "stand beside AIM-7B's last six, chosen ones beside its best six."
        )
        yield _share_table("compare", "The same tasks, ours and theirs", note, tasks, ["task", *names])
    if len(frame := comparison.baselines):
        frame = frame.sort_values(["params_total", "task", "kind"], ascending=[False, True, True])
        frame["kind"] = frame["kind"].map(kind_name)
        seen = ["images_seen"] if varies(frame["images_seen"]) else []
        names = ["task", "kind", "size", "params_total", *seen, "n", "top1", "baseline", "baseline_top1", "gap"]
        note = (
            "Each run at its largest budget and every baseline, on the same images, top-1 in per cent. Gap: ours minus "
            "the baseline's, with a 95 % interval over test images, not over seeds. It is paired where hits were kept "
            "(p: McNemar's exact test). Detectable: the minimum detectable gap at 80 % power."
        )
        ends = ("gap_lo95", "gap_hi95", "p", "detectable", "verdict")
        yield _share_table("baselines", "Beside baselines on the same probes", note, frame, [*names, *ends])


def findings(study: Study) -> dict[str, list[PageTable]]:
    """Lay out what repeats, single changes and noise come to, by section of the page."""
    repeats, noise = study.repeats, study.noise
    tables: dict[str, list[PageTable]] = {"laws": [], "noise": []}
    if repeats is not None:
        title = f"What repeated {repeats.sample}s are worth"
        note = f"{repeats.fit.law.formula}. Worth of pass k, and of all k passes, in passes over new {repeats.sample}s."
        tables["laws"] = [page_table("repeats", title, note, repeats, sentences=tuple(repeats.sentences()))]
    if noise is not None and len(seen := noise.table[noise.table["value"] > LEAST_NOISE]):
        noise = replace(noise, table=seen)  # sources that come to nothing are none
        note = (
            "Standard deviation of the loss by source, as fractions of the loss, with 95 % intervals or ranges. What "
            "sizes share counts as their error in a law's intervals; it may be the law's misfit."
        )
        cells = [{head: cell for head, cell in row.items() if head != "kind"} for row in noise.cells()]
        said = tuple(noise.sentences())
        tables["noise"] = [page_table("noise-parts", "Sources of spread", note, noise, cells=cells, sentences=said)]
    return {**tables, "changes": [_change(name, found) for name, found in study.contrasts.items()]}


def _change(name: str, found: Contrasts) -> PageTable:
    note = f"Against {found.baseline}. Equal within pairs: {', '.join(found.equal) or 'all else'}."
    said = (*change_words(found), *in_words(beside_paper(found)))
    return page_table(html_id("contrast", name), f"Effect of {name}", note, found, sentences=said)


def change_words(found: Contrasts) -> Iterator[str]:
    """Say each loss and each accuracy that differs, how many others do not, and what to be careful about."""
    told = [each for each in found.contrasts if not each.measure.is_accuracy or each.is_significant]
    yield from (each.sentence() for each in told)
    if rest := len(found.contrasts) - len(told):
        yield f"Not significant: {rest} of {len(found.contrasts)} differences; the table has all."
    yield from flag_words(found.flags)


def html_id(what: str, name: str) -> str:
    """HTML id of what bears a name of the table's own."""
    return f"{what}-{''.join(c if c.isalnum() else '-' for c in name)}"
