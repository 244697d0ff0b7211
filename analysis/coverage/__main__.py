"""Print the coverage of every interval on simulated tables, as Markdown.

python -m aimscale.analysis.coverage --tables 400 --keep coverage.csv > coverage.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd

from aimscale.analysis.coverage.designs import Design
from aimscale.analysis.coverage.frontiers import envelope_coverage, interpolated_coverage, isoflop_coverage
from aimscale.analysis.coverage.laws import fit_coverage, held_out_coverage, verdict_coverage
from aimscale.analysis.coverage.others import (
    contrast_coverage,
    correlation_coverage,
    forecast_coverage,
    noise_coverage,
    repeats_coverage,
)
from aimscale.analysis.coverage.record import Record

GRIDS = tuple(
    Design(sizes=sizes, budgets=budgets, seeds=seeds, errors=errors)
    for sizes, budgets in ((5, 4), (7, 5))
    for seeds, errors in ((1, "independent"), (1, "run"), (3, "independent"), (3, "run"), (3, "size"))
)
"""Grids of N and D. With one seed a run is a size, so their errors are the same."""
STUDIES: dict[str, tuple[tuple[Design, ...], Callable[[Design, int], Record]]] = {
    "correlation": (GRIDS, correlation_coverage),
    "contrast": (GRIDS, contrast_coverage),
    "fit": (GRIDS, fit_coverage),
    "held-out": (GRIDS, held_out_coverage),
    "approach-2": (tuple(replace(each, isoflop=True) for each in GRIDS), isoflop_coverage),
    "approach-2-interpolated": (tuple(each for each in GRIDS if each.sizes > 5), interpolated_coverage),
    "approach-1": (GRIDS, envelope_coverage),
    "noise": (tuple(each for each in GRIDS if each.seeds > 1), noise_coverage),
    "forecast": (GRIDS, forecast_coverage),
    "repeats": (GRIDS, repeats_coverage),
}
"""What is measured, on which designs, from cheapest to most expensive. (Five sizes interpolated to budgets are
refused: fewer than four share one.)"""

KEY = ["study", "design", "asked"]
"""What a kept cell is known by: its study, its design, and of how many tables it was asked to be."""


def cells(names: list[str], tables: int, keep: Path | None) -> pd.DataFrame:
    """Rows study, design, interval, tables, coverage, width; what `keep` holds for as many tables is taken from it."""
    known = pd.read_csv(keep) if keep is not None and keep.exists() else pd.DataFrame(columns=KEY)
    for name in names:
        designs, study = STUDIES[name]
        for design in designs:
            cell = (name, design.words, tables)
            if (known[KEY] == list(cell)).all(axis=1).any():
                continue
            found = study(design, tables).table()
            for column, value in zip(reversed(KEY), reversed(cell), strict=True):
                found.insert(0, column, value)
            known = pd.concat([known, found], ignore_index=True) if len(known) else found
            if keep is not None:
                known.to_csv(keep, index=False)
    return known[known["study"].isin(names) & (known["asked"] == tables)]


def coverage_table(found: pd.DataFrame) -> pd.DataFrame:
    """One row per interval: how many tables a design has, and a column per design, each "coverage % / width"."""
    rows: dict[str, dict[str, object]] = {}
    for row in found.to_dict("records"):
        shown = rows.setdefault(row["interval"], {"interval": row["interval"], "tables": row["tables"]})
        width = "" if pd.isna(row["width"]) else f" / {row['width']:.2f}"
        shown[row["design"]] = f"{100 * row['coverage']:.0f}{width}"
    return pd.DataFrame(list(rows.values())).fillna("")


def as_markdown(table: pd.DataFrame) -> str:
    """A table as Markdown."""
    rows = [list(map(str, table.columns)), ["---"] * table.shape[1], *table.map(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Print the table of each study, and how often verdicts on hopeless designs are right."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--tables", type=int, default=400, help="simulated tables per design")
    parser.add_argument("--only", choices=list(STUDIES), nargs="*", default=list(STUDIES))
    parser.add_argument(
        "--keep", type=Path, help="CSV that gets every design as it is done; what it holds is not measured again"
    )
    options = parser.parse_args()
    for name in options.only:
        print(f"\n{as_markdown(coverage_table(cells([name], options.tables, options.keep)))}", flush=True)
    print(f"\n{as_markdown(verdict_coverage(max(10, options.tables // 4)).table().round(3))}")


if __name__ == "__main__":
    main()
