"""Arguments that the analysis verbs share, how they read their tables and how they print a result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from aimscale.analysis.display import Result

Tables = Annotated[
    list[Path],
    typer.Argument(help="CSV, TSV, Parquet or JSON-lines tables, or sweeps' folders; several are read as one."),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(help="Foreign columns as ours=theirs, e.g. N=num_params, or a formula: C=6*N*D, L=1-acc."),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        help="Only rows that meet a condition, e.g. prefix=paired, 'D>=8000', size!=rung-16; may be repeated."
    ),
]
BestOf = Annotated[
    list[str] | None,
    typer.Option(help="Where rows differ in these tuned columns only (e.g. lr), keep the best; may be repeated."),
]
Main = Annotated[
    bool, typer.Option("--main", help="Where a table mixes experiments, keep the one with the most sizes and budgets.")
]
FigurePath = Annotated[Path | None, typer.Option(help="Also draw FIGURE.svg and FIGURE.png.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Objective = Annotated[str, typer.Option(help="What to minimise.")]
LossColumn = Annotated[str, typer.Option(help="Loss column.")]
Resamples = Annotated[int, typer.Option(min=20, help="Draws that every interval is read from.")]


class WhatN(StrEnum):
    """What N counts."""

    total = "total"
    trunk = "trunk"
    head = "head"


class WhatC(StrEnum):
    """How C is counted."""

    measured = "measured"
    sixnd = "6nd"
    executed = "executed"


CountOfN = Annotated[WhatN, typer.Option(help="What N counts.")]
CountOfC = Annotated[WhatC, typer.Option(help="C as counted FLOPs, as 6ND, or as executed.")]


def variable_columns(present: Iterable[str], n: WhatN, c: WhatC) -> dict[str, str]:
    """Columns of N and C by the user's choice, as far as the table is a results table."""
    flops = {WhatC.measured: "flops_train", WhatC.sixnd: "flops_6nd", WhatC.executed: "flops_executed"}
    wanted = {"N": f"params_{n.value}", "C": flops[c]}
    present = set(present)
    chosen = {"N": n != WhatN.total, "C": c != WhatC.measured}
    return {v: name for v, name in wanted.items() if name in present or chosen[v]}


def table_of(
    tables: list[Path],
    columns: list[str] | None,
    where: list[str] | None,
    main: bool = False,
    fresh: bool = False,
    best: list[str] | None = None,
    y: str = "val_loss",
) -> pd.DataFrame:
    """The tables of a verb as one frame; with `main` the largest experiment alone, with `fresh` its largest pool."""
    from aimscale.analysis.table.read import parse_columns, read_tables
    from aimscale.analysis.table.select import fresh_part, main_part

    frame = read_tables(tables, parse_columns(columns or []), where=where or [], best=best or [], y=y)
    frame = main_part(frame).rows if main else frame
    return fresh_part(frame).rows if main and fresh else frame


def show(result: Result, json: bool, figure: Path | None = None, *, after: Sequence[str] = ()) -> None:
    """Draw a result where a figure is asked for, and print it as JSON or in words, with the lines of `after`."""
    if figure is not None:
        draw(result.plot(), figure)
    typer.echo(result.to_json() if json else "\n".join([result.summary(), *after]))


def draw(figure: Figure, path: Path) -> None:
    """Write a figure as SVG and PNG."""
    from aimscale.analysis.plots.style import save

    save(figure, path)
