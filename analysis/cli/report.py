"""`aimscale report`, `compare` and `verify`: the page, runs beside published models, a published folder checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aimscale import analysis
from aimscale.analysis.cli import options
from aimscale.analysis.cli.options import TableArguments, show


def report(
    tables: options.Tables,
    out: Annotated[Path | None, typer.Option(help="The page; by default report.html beside the first table.")] = None,
    columns: options.Columns = None,
    where: options.Where = None,
    figures: Annotated[
        Path | None, typer.Option(help="Also write each figure into this folder: SVG, PDF and PNG at a paper's width.")
    ] = None,
) -> None:
    """Write one self-contained HTML page: summary, figures, laws, single changes, methods.

    Several tables make one page: laws are fitted to the experiment with most sizes and budgets, the rest are contrasts.
    """
    from aimscale.analysis.report.page import write_page
    from aimscale.analysis.report.study import next_scales, read_study
    from aimscale.analysis.table.read import parse_columns

    study = read_study(tables, parse_columns(columns or []), where or [])
    page = write_page(study, out, figures)
    typer.echo(f"Report: {page.resolve()}")
    if figures is not None:
        typer.echo(f"Figures: {figures.resolve()}")
    if study.get("forecast") is not None:
        scale = ",".join(f"{name}={value:.4g}" for name, value in next_scales(study)[-1].items())
        options.say_next(TableArguments(tables, columns, where).then(f"forecast --at {scale}"))


def compare(
    table: Annotated[Path, typer.Argument(help="CSV or Parquet table, or a sweep's folder.")],
    columns: options.Columns = None,
    json: options.AsJson = False,
) -> None:
    """Compare runs with published models and own baselines, task by task; what is not comparable is named."""
    arguments = TableArguments([table], columns)
    show(analysis.compare(arguments.read()), json, following=arguments.then("report"))


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
