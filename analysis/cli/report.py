"""`aimscale report TABLE`: one self-contained HTML page; `aimscale compare TABLE`: runs beside published models."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from aimscale.analysis.cli import options
from aimscale.analysis.errors import AnalysisError


def report(
    tables: options.Tables,
    out: Annotated[Path | None, typer.Option(help="The page; by default report.html beside the first table.")] = None,
    columns: options.Columns = None,
    where: options.Where = None,
    best_of: options.BestOf = None,
    resamples: options.Resamples = 1000,
) -> None:
    """Write one self-contained HTML page: summary, figures, laws, single changes, noise, pictures, methods.

    Several tables make one page: laws are fitted to the experiment with most sizes and budgets, the rest are contrasts.
    """
    from aimscale.analysis.report.page import write_report
    from aimscale.analysis.table.read import parse_columns

    page = write_report(
        tables, out, columns=parse_columns(columns or []), where=where or [], best=best_of or [], resamples=resamples
    )
    typer.echo(f"Report: {page.resolve()}")


def compare(
    table: Annotated[Path, typer.Argument(help="CSV or Parquet table, or a sweep's folder.")],
    run: Annotated[
        str | None, typer.Option(help="Part of a run's id: that run beside the nearest published model.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="With --run: a task as OURS=THEIRS, to put it beside a published one of another name."),
    ] = None,
    columns: options.Columns = None,
    resamples: options.Resamples = 1000,
    json: options.AsJson = False,
) -> None:
    """Task by task and by exponents; what is not comparable is named and left out."""
    from aimscale.analysis.display import plain_types
    from aimscale.analysis.published.beside import nearest_published
    from aimscale.analysis.published.comparison import compare as compare_frame
    from aimscale.analysis.table.points import complete
    from aimscale.analysis.table.read import parse_columns, probe_frame, read_tables

    called = dict(_pair(text) for text in task or [])
    if called and run is None:
        raise AnalysisError("--task goes with --run")
    frame = read_tables([table], parse_columns(columns or []))
    if run is not None:
        nearest = nearest_published(probe_frame(complete(frame)), run, called)
        plain = [plain_types(vars(each)) for each in nearest]
        blocks = ["\n".join(each.lines) for each in nearest]
        typer.echo(json_module.dumps(plain, indent=2) if json else "\n\n".join(blocks))
        return
    comparison = compare_frame(frame, resamples=resamples)
    typer.echo(comparison.to_json() if json else comparison.summary())


def _pair(text: str) -> tuple[str, str]:
    ours, equals, theirs = (part.strip() for part in text.partition("="))
    if not (ours and equals and theirs):
        raise AnalysisError(f"--task needs OURS=THEIRS, such as cifar10-10k=cifar10, not '{text}'")
    return ours, theirs
