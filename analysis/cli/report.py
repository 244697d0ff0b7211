"""`aimscale report`, `compare` and `verify`: the page, runs beside published models, a published folder checked."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aimscale import analysis
from aimscale.analysis.cli import options
from aimscale.analysis.cli.options import TableArguments, show

if TYPE_CHECKING:
    from aimscale.analysis.report.study import Study


@options.verb("columns", "where", "groups", "json")
def report(
    given: TableArguments,
    out: Annotated[Path | None, typer.Option(help="The page; by default report.html beside the first table.")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Also write each figure into this folder: SVG, PDF and PNG at a paper's width.")
    ] = None,
) -> None:
    """Write one self-contained HTML page: summary, figures, laws, single changes, methods.

    Several tables make one page: laws are fitted to the experiment with most sizes and budgets, the rest are contrasts.
    """
    from aimscale.analysis.report.page import write_page
    from aimscale.analysis.report.study import next_scales, read_study
    from aimscale.analysis.table.columns import parse_columns, parse_groups

    columns, groups = parse_columns(given.columns or []), parse_groups(given.groups or [])
    study = read_study(given.tables, columns, given.where or [], groups)
    page = write_page(study, out, figures)
    if given.json:
        return typer.echo(dumps(_answers(study, page), indent=2, allow_nan=False))
    typer.echo(f"Report: {page.resolve()}")
    if figures is not None:
        typer.echo(f"Figures: {figures.resolve()}")
    if study.get("forecast") is not None:
        scale = ",".join(f"{name}={value:.4g}" for name, value in next_scales(study)[-1].items())
        options.say_next(given.then(f"forecast --at {scale}"))


def _answers(study: Study, page: Path) -> dict[str, Any]:
    """Give the page's sentences and all of its numbers in plain types."""
    from aimscale.analysis.publication.folder import page_numbers
    from aimscale.analysis.report.summary import findings, verdict

    return {
        "page": str(page.resolve()),
        "findings": [f"{each.title}. {each.caption}" for each in findings(study)],
        "verdict": {line.question: line.answer for line in verdict(study)},
        "numbers": page_numbers(study),
    }


def compare(
    table: Annotated[Path, typer.Argument(help="CSV or Parquet table, or a sweep's folder.")],
    columns: options.Columns = None,
    json: options.AsJson = False,
) -> None:
    """Compare runs with published models and own baselines, task by task; what is not comparable is named."""
    given = TableArguments([table], columns, json=json)
    given.show(analysis.compare(given.read()), ["report"])


def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that `aimscale publish` wrote.")],
    json: options.AsJson = False,
) -> None:
    """Make page, numbers, READMEs, LaTeX and figures of a published folder again from its tables, and compare.

    All files are compared with their checksums, too; tables, configurations and weights with nothing else. By other
    versions than the publisher's only numbers are made again, on another processor all but figures; the answer says so.
    Exits with 1 when something differs.
    """
    from aimscale.analysis.publication.verification import verify as check

    verification = check(folder)
    show(verification, json)
    if not verification.is_verified:
        raise typer.Exit(1)
