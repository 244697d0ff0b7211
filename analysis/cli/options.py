"""Arguments that the analysis verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Tables = Annotated[
    list[Path], typer.Argument(help="CSV or Parquet tables, or sweeps' folders; several are read as one.")
]
Columns = Annotated[list[str] | None, typer.Option(help="Foreign columns as ours=theirs, e.g. N=num_params.")]
Where = Annotated[
    list[str] | None,
    typer.Option(
        help="Only rows that meet a condition, e.g. prefix=paired, 'D>=8000', size!=rung-16; may be repeated."
    ),
]
Main = Annotated[
    bool, typer.Option("--main", help="Of a table that mixes experiments, only the one with most sizes and budgets.")
]
FigurePath = Annotated[Path | None, typer.Option(help="Also draw FIGURE.svg and FIGURE.png.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def table_of(
    tables: list[Path], columns: list[str] | None, where: list[str] | None, main: bool = False, fresh: bool = False
) -> pd.DataFrame:
    """The tables of a verb as one frame; with `main` the largest experiment alone, with `fresh` its largest pool."""
    from aimscale.analysis.tables.design import fresh_part, main_part
    from aimscale.analysis.tables.inputs import read_tables
    from aimscale.analysis.tables.results import parse_columns

    frame = read_tables(tables, parse_columns(columns or []), where=where or [])
    frame = main_part(frame).rows if main else frame
    return fresh_part(frame).rows if main and fresh else frame


def draw(figure: Figure, path: Path) -> None:
    """Write a figure as SVG and PNG."""
    from aimscale.analysis.plots.style import save

    save(figure, path)
