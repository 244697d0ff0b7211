"""The table of single changes in the CIFAR-10 study, from the study's own tables.

python docs/generate/directions.py    # rewrites the table in docs/study/cifar.md
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from aimscale.analysis.effects.contrasts import contrast
from aimscale.analysis.effects.gains import ASKS_OTHERWISE, Gain, gains
from aimscale.analysis.effects.result import Contrast, Contrasts
from aimscale.analysis.table.read import read_tables

PAGE = Path(__file__).parents[1] / "study/cifar.md"
RESULTS = PAGE.parent / "published/cifar/data"
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
    """Write a row per change: loss, compute at the same size, and each kind of probe."""
    rows = read_tables([RESULTS / "cifar.parquet", RESULTS / "cifar-directions.parquet"])
    rows = rows[rows["size"].isin(["w20-d2", "w52-d2"])]
    return "\n".join([*_lines(rows), ""])


def _lines(rows: pd.DataFrame) -> Iterator[str]:
    yield "| change | validation loss, % | worth in compute | linear, points | attentive | k-NN |"
    yield "|---|---|---|---|---|---|"
    ignored = {"data_fingerprint": ["unique_images"]}
    contrasts = {by: contrast(rows, by=by, ignore=ignored.get(by, [])) for _, by, _ in CHANGES}
    for words, by, level in CHANGES:
        found = {each.measure.name: each for each in contrasts[by].contrasts if each.level == level}
        by_kind = {name.rsplit(":", 1)[-1]: each for name, each in found.items() if name != "val_loss"}
        loss = found.get("val_loss")
        cells = [
            "another question" if by in ASKS_OTHERWISE else _ratio(loss),
            _worth(contrasts[by], level),
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


def _worth(found: Contrasts, level: str) -> str:
    gain = next((each for each in gains(found) if isinstance(each, Gain) and each.level == level), None)
    if gain is None:
        return "–"
    text = f"{gain.factor:.2f} [{gain.low:.2f}, {gain.high:.2f}]"
    return f"**{text}**" if gain.low > 1 or gain.high < 1 else text


def rewrite(page: str) -> str:
    """Return the page with the table between the marks."""
    before, after = (re.escape(mark) for mark in MARKS)
    return re.sub(f"(?<={before}\n\n).*?(?=\n{after})", lambda _: table(), page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(rewrite(PAGE.read_text()))
