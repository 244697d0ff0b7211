"""`aimscale frontier TABLE`: compute-optimal size and data by three approaches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from analysis.cli_fit import WhatC, WhatN, variable_columns

app = typer.Typer(help="Compute-optimal size and data by approaches 1, 2 and 3.", add_completion=False)


@app.command()
def frontier_table(
    table: Annotated[Path, typer.Argument(help="CSV or Parquet table, or a sweep's folder.")],
    y: Annotated[str, typer.Option(help="Loss column.")] = "val_loss",
    columns: Annotated[list[str] | None, typer.Option(help="Foreign columns: ours=theirs, e.g. N=params.")] = None,
    n: Annotated[WhatN, typer.Option(help="What N counts.")] = WhatN.total,
    c: Annotated[WhatC, typer.Option(help="C as counted FLOPs or as 6ND.")] = WhatC.measured,
    budgets: Annotated[
        int | None,
        typer.Option(help="Interpolate every size to this many budgets (approach 2); default: the table's own."),
    ] = None,
    at: Annotated[list[float] | None, typer.Option(help="Budgets in FLOPs to print the optimum for.")] = None,
    objective: Annotated[str, typer.Option(help="What approach 3 minimises.")] = "huber_log",
    cluster: Annotated[str | None, typer.Option(help="Resample whole groups of this column (approach 3).")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """N*(C), D*(C) and the loss on them, and how far the approaches disagree."""
    import json as json_module

    from analysis.approaches import all_approaches, exponents_by_count
    from analysis.result import plain_types
    from analysis.table import parse_columns, read_table

    df = read_table(table, columns=parse_columns(columns or []))
    names = variable_columns(df.columns, n, c)
    found = all_approaches(df, y=y, columns=names, budgets=budgets, objective=objective, cluster=cluster)
    top = max(f.range[1] for f in found.frontiers)
    optima = found.at(at or [top, 10 * top])
    counts = exponents_by_count(df, y=y)
    if json:
        data = found.to_dict() | {"optima": optima.to_dict("records"), "exponents_by_count": counts.to_dict("records")}
        typer.echo(json_module.dumps(plain_types(data), indent=2, allow_nan=False))
        return
    typer.echo(found.sentence())
    typer.echo("\n" + optima.to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    if len(counts) > 1:
        typer.echo("\nExponent of N*(C) by what N and C count:")
        typer.echo(counts.to_string(index=False, float_format=lambda v: f"{v:.4g}"))
