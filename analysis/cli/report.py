"""`aimscale report`, `compare` and `verify`: the page, runs beside published models, a published folder checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aimscale import analysis
from aimscale.analysis.cli import options
from aimscale.analysis.cli.options import show, table_of, then


def report(
    tables: options.Tables,
    out: Annotated[Path | None, typer.Option(help="The page; by default report.html beside the first table.")] = None,
    columns: options.Columns = None,
    where: options.Where = None,
    best_of: options.BestOf = None,
    figures: Annotated[
        Path | None,
        typer.Option(help="Also write each figure into this folder: SVG, PDF, PNG at a paper's width, and its CSV."),
    ] = None,
) -> None:
    """Write one self-contained HTML page: summary, figures, laws, single changes, methods.

    Several tables make one page: laws are fitted to the experiment with most sizes and budgets, the rest are contrasts.
    """
    from aimscale.analysis.table.read import parse_columns

    named = parse_columns(columns or [])
    page = analysis.write_report(tables, out, columns=named, where=where or [], best=best_of or [], figures=figures)
    typer.echo(f"Report: {page.resolve()}")
    if figures is not None:
        typer.echo(f"Figures: {figures.resolve()}")
    options.say_next(then(["forecast --at N=SIZE,D=IMAGES"], tables, columns, where, best_of))


def compare(
    table: Annotated[Path, typer.Argument(help="CSV or Parquet table, or a sweep's folder.")],
    columns: options.Columns = None,
    json: options.AsJson = False,
) -> None:
    """Compare runs with published models and own baselines, task by task; what is not comparable is named."""
    found = analysis.compare(table_of([table], columns, None))
    show(found, json, following=then(["report"], [table], columns, None))


def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that `aimscale publish` wrote.")],
    json: options.AsJson = False,
) -> None:
    """Recompute every number of a published folder from its tables, and compare all files with their checksums.

    Exits with 1 when something differs.
    """
    from aimscale.analysis.publication.folder import verify as check

    found = check(folder)
    options.show(found, json)
    if not found.is_verified:
        raise typer.Exit(1)
