"""`aimscale report TABLE`: one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Write one self-contained HTML page from a table.", add_completion=False)


@app.command()
def report(
    table: Annotated[Path, typer.Argument(help="CSV or Parquet table, or a sweep's folder.")],
    out: Annotated[Path | None, typer.Option(help="The page; by default report.html beside the table.")] = None,
    columns: Annotated[
        list[str] | None, typer.Option(help="Foreign columns as ours=theirs, e.g. N=num_params.")
    ] = None,
    resamples: Annotated[int, typer.Option(min=20, help="Bootstrap resamples of every interval.")] = 1000,
) -> None:
    """Write one self-contained HTML page: summary, figures, laws, pictures, tables, methods, provenance."""
    from analysis.report import write_report
    from analysis.table import parse_columns

    page = write_report(table, out, columns=parse_columns(columns or []), resamples=resamples)
    typer.echo(f"Report: {page.resolve()}")
