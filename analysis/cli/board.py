"""`aimscale board`: public tables cut at a fraction of their compute, forecast, and scored on what was cut off."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def board(
    tables: Annotated[
        list[Path],
        typer.Argument(help="Folders of tables with their provenance (CSV), such as tests/board, or tables."),
    ],
    to: Annotated[Path, typer.Option(help="Page to write; the scores of every table go beside it as CSV.")] = Path(
        "board.md"
    ),
    record: Annotated[
        Path | None, typer.Option(help="Also write the record by distance that forecasts are told with (CSV).")
    ] = None,
) -> None:
    """Judge forecasts on tables of real runs: cut each at 1/3 to 1/100 of its compute, forecast and score the rest.

    Takes minutes.
    """
    import pandas as pd

    from aimscale.analysis.errors import AnalysisError
    from aimscale.analysis.forecasts.board import (
        MIN_RANGE,
        MIN_ROWS,
        MIN_SIZES,
        left_out,
        page,
        play,
        read_board,
        record_table,
        scores,
        summary,
    )  # fmt: skip

    found = read_board(tables)
    parts = []
    for name, rows in play(found, os.cpu_count() or 1):
        cuts = ", ".join(f"1/{cut:.0f}" for cut in sorted(rows["cut"].unique()))
        typer.echo(f"{name}: {f'cut at {cuts}' if cuts else 'too small for any cut'}")
        parts.append(rows)
    together = pd.concat(parts, ignore_index=True)
    if together.empty:
        raise AnalysisError(
            f"No table leaves {MIN_ROWS} rows, {MIN_SIZES} sizes and a range of {MIN_RANGE:g} in compute below a cut; "
            "give larger ones."
        )
    points = left_out(together)
    scored = scores(points)
    to.write_text(page(found, points, scored))
    scored.to_csv(to.with_suffix(".csv"), index=False, float_format="%.5g")
    if record is not None:
        record_table(points).to_csv(record, index=False, float_format="%.4g")
    typer.echo(f"\n{summary(scored).to_string(index=False)}\n\nwrote {to} and {to.with_suffix('.csv')}")
