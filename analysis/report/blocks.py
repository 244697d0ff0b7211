"""Parts of a page: figures, blocks of sentences, facts and a table, which sorts and leaves as CSV; and the finding
about loss and features, of which what leads is decided before the data, and every task is counted."""

from __future__ import annotations

import base64
import gzip
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from aimscale.analysis.correlation import Correlation
from aimscale.analysis.display import PROBES, SUFFIXES, Result, accuracy_of, capital, percent
from aimscale.analysis.plots.accuracy import plot_loss_accuracy
from aimscale.analysis.plots.style import inline_svg
from aimscale.analysis.published import ADAPTED, PROTOCOL, TASKS, best_frozen, read_baselines, table6
from aimscale.analysis.report.study import CORRELATION, LINK, Study
from aimscale.analysis.table.schema import frame_cells

MAX_ROWS = 100
"""Rows shown on the page; the CSV beside the table has all."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes text that begins so for a formula."""
PLAIN = str.maketrans("−⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "--0123456789")
FLOORS = {"random-": "random weights of the same network", "raw-pixels": "raw pixels"}
"""Beginning of a baseline's name -> its name in a sentence: first what training adds to, then what features are of."""


@dataclass(frozen=True)
class PageFigure:
    """A figure of the page and of a paper, drawn when it is asked for."""

    key: str
    """HTML id, and name of its files."""
    title: str
    caption: str
    draw: Callable[[], Figure]

    @cached_property
    def figure(self) -> Figure:
        """The drawing."""
        return self.draw()

    @property
    def is_wide(self) -> bool:
        """Whether it takes two columns of a paper."""
        return self.figure.get_figwidth() > 5

    @property
    def svg(self) -> str:
        """Inline SVG."""
        return inline_svg(self.figure, self.key, f"{self.title}. {self.caption}")


@dataclass(frozen=True)
class Block:
    """A result on the page: sentences, facts and a table, any of which may be empty."""

    key: str
    """HTML id and file name of the download."""
    title: str
    frame: pd.DataFrame | None = None
    """The whole table."""
    cells: Sequence[dict[str, str]] | None = None
    """Its rows as a reader sees them; None: as the schema of the results table writes them."""
    note: str = ""
    """Line below the title: units, source, protocol."""
    lines: Sequence[str] = ()
    """Sentences; a table below some is closed."""
    facts: Sequence[tuple[str, str]] = ()
    """Keys and values above the table."""
    is_open: bool = True

    @cached_property
    def rows(self) -> list[dict[str, str]]:
        """Cells by their head, at most `MAX_ROWS` rows, without columns that are blank."""
        if self.frame is None:
            return []
        cells = frame_cells(self.frame.head(MAX_ROWS)) if self.cells is None else self.cells[:MAX_ROWS]
        heads = [head for head in (cells[0] if cells else ()) if any(row[head] not in ("", "–") for row in cells)]
        return [{head: row[head] or "–" for head in heads} for row in cells]

    @cached_property
    def numeric(self) -> list[str]:
        """Heads of the columns of numbers, which stand to the right."""
        heads = self.rows[0] if self.rows else ()
        return [h for h in heads if all(row[h] == "–" or isinstance(sort_key(row[h]), float) for row in self.rows)]

    @property
    def csv_name(self) -> str:
        """File name of the download; of a table that is cut on the page it is compressed."""
        return f"{self.key}.csv{'.gz' if self.frame is not None and len(self.frame) > MAX_ROWS else ''}"

    @property
    def csv_uri(self) -> str:
        """The whole table as a `data:` URI; cells that a spreadsheet would run as a formula are quoted with '."""
        if self.frame is None:
            return ""
        texts = self.frame.select_dtypes(exclude="number")
        safe = texts.map(lambda v: f"'{v}" if isinstance(v, str) and v.startswith(FORMULA) else v)
        floats = self.frame.select_dtypes("float")
        is_whole = ((floats % 1 == 0) & (floats.abs() < 2**63)) | floats.isna()
        whole = floats.loc[:, is_whole.all()].astype("Int64")
        content = self.frame.assign(**safe, **whole).to_csv(index=False, float_format="%.5g").encode()
        mime = "text/csv"
        if self.csv_name.endswith(".gz"):
            mime, content = "application/gzip", gzip.compress(content, mtime=0)
        return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def result_block(
    key: str, title: str, result: Result, *, facts: Sequence[tuple[str, str]] | None = None, **parts: Any
) -> Block:
    """Lay out a result by its facts and its table."""
    return Block(key, title, result.table, result.cells(), facts=result.facts() if facts is None else facts, **parts)


def sort_key(text: str) -> float | str:
    """Return what a cell is sorted by: the number that it begins with, as `words` writes numbers, else its text; a
    missing one is empty."""
    plain = re.sub(r"(×?)10([⁻⁰¹²³⁴-⁹]+)", lambda m: f"{'' if m[1] else 1}e{m[2]}", text).translate(PLAIN)
    match = re.match(r"\[?([-+]?(?:\d[\d,]*)?\.?\d+(?:e-?\d+)?)([kMB]?)(?![\w.])", plain)
    return float(match[1].replace(",", "")) * SUFFIXES.get(match[2], 1.0) if match else text.strip("–")


def html_id(what: str, name: str) -> str:
    """Make the HTML id of what bears a name of the table's own."""
    return f"{what}-{''.join(c if c.isalnum() else '-' for c in name)}"


def feature_finding(study: Study) -> PageFigure | None:
    """Tell how loss and accuracy go together at equal compute, over all tasks of the kind that most rows have; None
    without a correlation. The coefficients over all rows, where both follow compute, stand in the caption."""
    kind = next((kind for kind in study.kinds if study.by_task(CORRELATION, kind)), None)
    if kind is None:
        return None
    probes, correlations = study.probes.frame.dropna(subset="top1"), study.by_task(CORRELATION, kind)
    rows = {str(task): part for task, part in probes[probes["kind"] == kind].groupby("task", sort=False)}
    pearson = {task: [c for c in each if c.method == "pearson"] for task, each in correlations.items()}
    beside = {task: levels(study, kind, rows[task]) for task in pearson}
    leading, pooled = ({task: c[i] for task, c in pearson.items() if len(c) > i} for i in range(2))
    details = [f"{capital(_coefficients(leading))}."] if len(rows) > 1 else []
    details += [f"Not tested: {', '.join(lost)}."] if (lost := [task for task in rows if task not in pearson]) else []
    reached = "; ".join(_reached(task, rows[task], beside[task]) for task in pearson)
    details.append(f"The {accuracy_of(kind)} is {reached}.")
    details += [f"Both follow compute: {_coefficients(pooled)}."] if pooled else []
    first = next(iter(pearson))
    links = {task: each for task, each in study.by_task(LINK, kind).items() if task == first}
    draw = partial(
        plot_loss_accuracy, study.probes.with_rows(rows[first]), {first: pearson[first]}, links, beside[first]
    )
    return PageFigure("finding-accuracy", feature_words(kind, leading, len(rows)), " ".join(details), draw)


def feature_words(kind: str, leading: Mapping[str, Correlation], num_tasks: int = 1) -> str:
    """Say on how many tasks lower loss goes with higher accuracy of a kind at equal compute, and on how many with
    lower; of a single task with its coefficient."""
    better = "better features" if kind in PROBES and kind != ADAPTED else "higher accuracy"
    # over all rows both follow compute; where all accuracies are those of guessing nothing is above it
    significant = [c for c in leading.values() if c.partial_on and c.is_significant and c.chance is None]
    num_better = sum(c.value < 0 for c in significant)
    counts = {better: num_better, "LOWER accuracy": len(significant) - num_better}
    of_tasks = f" of {num_tasks} tasks" * (num_tasks > 1)
    told = [what + f" on {num}{of_tasks}" * (num_tasks > 1) for what, num in counts.items() if num]
    claim = f"Lower loss, {' and '.join(told)}" if told else f"Not known whether lower loss means {better}"
    if num_tasks > 1:
        none = "" if told else f": on 0{of_tasks}"
        return f"{claim}{none} ({accuracy_of(kind)}, significant at equal compute)"
    return f"{claim}: {_coefficients(leading)} ({accuracy_of(kind)})"


def _coefficients(of_tasks: Mapping[str, Correlation]) -> str:
    """Write a coefficient with its interval for every task."""
    return "; ".join(
        f"{'at equal compute' if c.partial_on else 'over all rows'} r = {c.value:.2f} [{c.low:.2f}, {c.high:.2f}] "
        f"on {task}{' (all at chance)' * (c.chance is not None)}"
        for task, c in of_tasks.items()
    )


def _reached(task: str, rows: pd.DataFrame, beside: pd.DataFrame) -> str:
    """Write the range of accuracies on a task, and what random weights and raw pixels reach."""
    top1 = beside.set_index("name")["top1"]
    floors = [
        f"{words} give {percent(float(top1[name]))}"
        for start, words in FLOORS.items()
        for name in top1.index
        if name.startswith(start)
    ]
    told = f" ({', '.join(floors)})" if floors else ""
    ends = dict.fromkeys(percent(end).removesuffix(" %") for end in (rows["top1"].min(), rows["top1"].max()))
    return f"{' to '.join(ends)} % on {task}{told}"


def levels(study: Study, kind: str, rows: pd.DataFrame) -> pd.DataFrame:
    """List what accuracies of a kind may be compared with: the table's own baselines, and on its tasks the paper."""
    same, theirs = rows[["task", "n"]].drop_duplicates(), read_baselines(study.runs)
    theirs = theirs[theirs["kind"].eq(kind) & (kind != ADAPTED)].rename(columns={"size": "name"})
    published = theirs.merge(same, on=["task", "n"]).reindex(columns=["task", "name", "top1"])
    published = published.drop_duplicates(["task", "name"]).sort_values("top1")
    paper = [
        {"task": task, "name": f"{key}, published", "top1": table6().loc[key, task]}
        for task in (same["task"].unique() if kind == PROTOCOL and study.is_ours else ())
        if task in TASKS
        for key in dict.fromkeys(("aim-7B", best_frozen(task)))
    ]
    return pd.concat([published, pd.DataFrame(paper, columns=published.columns)], ignore_index=True)
