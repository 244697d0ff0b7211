"""Print the coverage of every interval on simulated tables, as Markdown.

python -m aimscale.analysis.coverage --tables 400 > coverage.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

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
    "fit": (GRIDS, fit_coverage),
    "held-out": (GRIDS, held_out_coverage),
    "approach-1": (GRIDS, envelope_coverage),
    "approach-2": (tuple(replace(each, isoflop=True) for each in GRIDS), isoflop_coverage),
    "approach-2-interpolated": (GRIDS, interpolated_coverage),
    "correlation": (GRIDS, correlation_coverage),
    "contrast": (GRIDS, contrast_coverage),
    "noise": (tuple(each for each in GRIDS if each.seeds > 1), noise_coverage),
    "repeats": (GRIDS, repeats_coverage),
    "forecast": (GRIDS, forecast_coverage),
}
"""What is measured, on which designs."""


def coverage_table(names: list[str], tables: int) -> pd.DataFrame:
    """One row per interval and a column per design, each "coverage % / width"."""
    columns: dict[str, dict[str, str]] = {}
    for name in names:
        designs, study = STUDIES[name]
        for design in designs:
            found = study(design, tables).table()
            shown = columns.setdefault(design.words, {})
            for interval, coverage, width in found[["interval", "coverage", "width"]].to_numpy():
                shown[interval] = f"{100 * coverage:.0f}" + ("" if pd.isna(width) else f" / {width:.2f}")
    return pd.DataFrame(columns).fillna("").rename_axis("interval").reset_index()


def as_markdown(table: pd.DataFrame) -> str:
    """A table as Markdown."""
    rows = [list(map(str, table.columns)), ["---"] * table.shape[1], *table.map(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Print the table of each study, and how often verdicts on hopeless designs are right."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--tables", type=int, default=400, help="simulated tables per design")
    parser.add_argument("--only", choices=list(STUDIES), nargs="*", default=list(STUDIES))
    options = parser.parse_args()
    for name in options.only:
        print(f"\n{as_markdown(coverage_table([name], options.tables))}", flush=True)
    print(f"\n{as_markdown(verdict_coverage(max(10, options.tables // 4)).table().round(3))}")


if __name__ == "__main__":
    main()
