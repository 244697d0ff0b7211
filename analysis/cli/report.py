"""`aimscale report TABLE`: one self-contained HTML page; `aimscale compare TABLE`: runs beside published models."""

from __future__ import annotations

import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from aimscale.analysis.cli import options

PLAIN_EVERY_S = 30.0
"""Seconds between two lines where there is no terminal."""


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
    """Write one self-contained HTML page: summary, figures, laws, single changes, noise, pictures, methods.

    Several tables make one page: laws are fitted to the experiment with most sizes and budgets, the rest are contrasts.
    """
    from aimscale.analysis.report.page import write_report
    from aimscale.analysis.table.read import parse_columns

    with _bar() as progress:
        page = write_report(
            tables,
            out,
            columns=parse_columns(columns or []),
            where=where or [],
            best=best_of or [],
            figures=figures,
            progress=progress,
        )
    typer.echo(f"Report: {page.resolve()}")
    if figures is not None:
        typer.echo(f"Figures: {figures.resolve()}")
    options.say_next(options.then(["forecast --at N=SIZE,D=IMAGES"], tables, columns, where))


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[str, float], None]]:
    """Where the page stands, on the standard error: a bar on a terminal, elsewhere a line every half minute."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console, started = Console(stderr=True), time.monotonic()
    is_live, told = sys.stderr.isatty() and not console.is_dumb_terminal, started
    columns = TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn(), TextColumn("{task.fields[left]}")
    bar = Progress(*columns, console=console, transient=True, redirect_stdout=False, disable=not is_live)
    task = bar.add_task("tables", total=1.0, left="")

    def progress(what: str, share: float) -> None:
        nonlocal told
        now = time.monotonic()
        left = datetime.timedelta(seconds=round((now - started) * (1 - share) / share)) if share else None
        text = "" if left is None else f"about {left} left"
        bar.update(task, description=what, completed=share, left=text)
        if not is_live and now - told >= PLAIN_EVERY_S:
            print(f"{what}: {100 * share:.0f} % done, {text}", file=sys.stderr, flush=True)
            told = now

    with bar:
        yield progress


def compare(
    table: Annotated[Path, typer.Argument(help="CSV or Parquet table, or a sweep's folder.")],
    columns: options.Columns = None,
    json: options.AsJson = False,
) -> None:
    """Compare runs with published models, by task and by exponents; what is not comparable is named."""
    from aimscale.analysis.published.comparison import compare as compare_frame

    comparison = compare_frame(options.table_of([table], columns, None))
    options.show(comparison, json, following=options.then(["report"], [table], columns, None))
