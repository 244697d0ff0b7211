"""The table of single changes in the CIFAR-10 study, from the study's own tables.

python docs/generate/directions.py    # rewrites the table in docs/study/cifar.md
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from aimscale.analysis.effects.contrasts import contrast
from aimscale.analysis.effects.result import Contrast
from aimscale.analysis.table.read import read_tables

PAGE = Path(__file__).parents[1] / "study/cifar.md"
RESULTS = PAGE.parent / "results"
MARKS = "<!-- directions: written by docs/generate/directions.py -->", "<!-- directions: end -->"
CHANGES = (
    ("causal attention instead of a prefix", "prefix", "none"),
    ("no pixel head instead of one block", "head_depth", "0"),
    ("four blocks of head instead of one", "head_depth", "4"),
    ("twelve blocks of head instead of one", "head_depth", "12"),
    ("the authors' spiral instead of raster", "patch_order", "outward_spiral"),
    ("the authors' checkerboard instead of raster", "patch_order", "checkerboard"),
    ("a fixed random order, `hashed`, instead of raster", "patch_order", "hashed"),
    ("raw instead of normalised targets", "target", "raw"),
    ("a fifth of the images crops of other photographs", "data_fingerprint", "666a9a216cd70445"),
    ("Muon instead of AdamW, at AdamW's rate", "optimiser.name", "muon"),
)
"""Name for a reader, column, level."""
KINDS = ("linear", "attentive", "knn")


def table() -> str:
    """Write a row per change: loss, compute, and each kind of probe."""
    rows = read_tables([RESULTS / "cifar.parquet", RESULTS / "cifar-directions.parquet"])
    rows = rows[rows["size"].isin(["w20-d2", "w52-d2"])]
    return "\n".join([*_lines(rows), ""])


def _lines(rows: pd.DataFrame) -> Iterator[str]:
    yield "| change | validation loss, % | FLOPs, % | linear, points | attentive | k-NN |"
    yield "|---|---|---|---|---|---|"
    ignored = {"data_fingerprint": ["unique_images"]}
    contrasts = {by: contrast(rows, by=by, ignore=ignored.get(by, [])) for _, by, _ in CHANGES}
    for words, by, level in CHANGES:
        found = {each.measure.name: each for each in contrasts[by].contrasts if each.level == level}
        by_kind = {name.rsplit(":", 1)[-1]: each for name, each in found.items() if name != "val_loss"}
        loss = found.get("val_loss")
        cells = [
            "another question" if by == "patch_order" else _ratio(loss),
            _flops(rows, by, level),
            *(_points(by_kind[kind]) for kind in KINDS),
        ]
        yield f"| {words} | {' | '.join(cells)} |"


def _ratio(loss: Contrast | None) -> str:
    if loss is None:
        return "another unit"
    return _bold(loss, *(100 * (each - 1) for each in (loss.ratio, loss.ratio_low, loss.ratio_high)))


def _points(accuracy: Contrast) -> str:
    return _bold(accuracy, *(100 * each for each in (accuracy.difference, accuracy.low, accuracy.high)))


def _bold(found: Contrast, value: float, low: float, high: float) -> str:
    """Write a difference with its interval, bold where that misses zero."""
    text = f"{value:+.1f} [{low:.1f}, {high:.1f}]"
    return text if not found.is_significant else f"**{text}**"


def _flops(rows: pd.DataFrame, by: str, level: str) -> str:
    ignored = ["unique_images"] if by == "data_fingerprint" else []
    found = contrast(rows, by=by, ignore=ignored, measures=["flops_train"]).contrasts
    ratio = next(each.ratio for each in found if each.level == level)
    return f"{100 * (ratio - 1):+.0f}"


def rewrite(page: str) -> str:
    """Return the page with the table between the marks."""
    before, after = (re.escape(mark) for mark in MARKS)
    return re.sub(f"(?<={before}\n\n).*?(?=\n{after})", lambda _: table(), page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(rewrite(PAGE.read_text()))
