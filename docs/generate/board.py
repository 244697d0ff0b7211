"""The forecasts' record in docs/forecasts.md, between its marks: from `docs/board.csv` and tests/board.

`tests/experiments/board.py` writes the scores, `python docs/generate/board.py` the page's part; a test compares them.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from aimscale.analysis.forecasts.forecast import records

ROOT = Path(__file__).parents[2]
SCORES = ROOT / "docs/board.csv"
TABLES = ROOT / "tests/board"
PAGE = ROOT / "docs/forecasts.md"
BEGIN, END = "<!-- record: written by docs/generate/board.py -->\n", "<!-- record: end -->"
LOSS, STACK = "val_loss", "stack"
CUT = 10
"""At which methods are compared."""


def markdown() -> str:
    """Write the record by distance and by method, and where the tables come from."""
    scored = pd.read_csv(SCORES)
    of_stack = scored[(scored["method"] == STACK) & (scored["quantity"] == LOSS)]
    parts = [
        f"{scored['table'].nunique()} tables of {scored['family'].nunique()} families, "
        f"{of_stack['num_points'].sum():,} forecasts of a loss. Tables count alike; "
        "by distance, families do. `stack` is what `forecast` does.",
        "### By distance",
        _table(_by_distance()),
        "### By method",
        f"Per cent of the loss, tables cut at 1/{CUT}, best Winkler score first; `docs/board.csv` has all cuts.",
        _table(_by_method(scored)),
        "### Where the tables come from",
        "Each file in `tests/board` names licence, commit and file, and who split it or read it off a figure.",
        "\n".join(_sources(set(scored["table"]))),
    ]
    return "\n\n".join(parts) + "\n"


def _by_distance() -> pd.DataFrame:
    """Return what `aimscale forecast` prints beside a forecast."""
    rows = [
        {
            "times beyond the table": f"{each['low']:g} to {each['high']:g}",
            "families": each["num_families"],
            "losses inside, %": f"{100 * each['inside']:.0f}",
            "error, %": f"{100 * each['error']:.1f}",
            "accuracies inside, %": f"{100 * each['accuracy_inside']:.0f}",
            "error, points": f"{100 * each['accuracy_error']:.1f}",
        }
        for each in records().to_dict("records")
    ]
    return pd.DataFrame(rows)


def _by_method(scored: pd.DataFrame) -> pd.DataFrame:
    """Means over tables of the losses, one row a method; the best score over all cuts first."""
    losses = scored[scored["quantity"] == LOSS]
    order = np.log(losses["score"]).groupby(losses["method"]).mean().sort_values().index
    compared = dict(iter(losses[losses["cut"] == CUT].groupby("method")))
    rows = [
        {
            "method": method,
            "inside": f"{100 * group['inside'].mean():.1f}",
            "error": f"{100 * group['error'].mean():.2f}",
            "half width": f"{100 * group['half_width'].mean():.1f}",
        }
        for method, group in ((method, compared[method]) for method in order if method in compared)
    ]
    return pd.DataFrame(rows)


def _sources(used: set[str]) -> list[str]:
    """Write a line per family: the source of its first table, which has the licence, the commit and the file."""
    found: dict[str, str] = {}
    for path in sorted(TABLES.glob("*.csv")):
        lines = [line[2:].partition(": ") for line in path.read_text().splitlines() if line.startswith("# ")]
        notes = {key: value.strip() for key, _, value in lines}
        if path.stem in used:
            source = re.split(r"; |, github| \(github|, wandb", notes["source"])[0]
            found.setdefault(notes.get("family", path.stem), f"{source}.")
    return [f"- **{family}**: {found[family]}" for family in sorted(found)]


def _table(frame: pd.DataFrame) -> str:
    rows = [list(map(str, frame.columns)), ["---"] * frame.shape[1], *frame.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def page_with_record() -> str:
    """Return docs/forecasts.md with the record of today."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return before + BEGIN + markdown() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page_with_record())
