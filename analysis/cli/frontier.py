"""`aimscale frontier TABLE`: compute-optimal size and data by three approaches."""

from __future__ import annotations

from typing import Annotated

import typer

from aimscale.analysis.cli.fit import WhatC, WhatN, variable_columns
from aimscale.analysis.cli.options import AsJson, Columns, FigurePath, Main, Tables, Where, draw, table_of

app = typer.Typer(help="Compute-optimal size and data by approaches 1, 2 and 3.", add_completion=False)


@app.command()
def frontier_table(
    tables: Tables,
    y: Annotated[str, typer.Option(help="Loss column.")] = "val_loss",
    columns: Columns = None,
    where: Where = None,
    main: Main = False,
    n: Annotated[WhatN, typer.Option(help="What N counts.")] = WhatN.total,
    c: Annotated[WhatC, typer.Option(help="C as counted FLOPs, as 6ND, or as executed.")] = WhatC.measured,
    budgets: Annotated[
        int | None,
        typer.Option(help="Interpolate every size to this many budgets (approach 2); default: the table's own."),
    ] = None,
    at: Annotated[list[float] | None, typer.Option(help="Budgets in FLOPs to print the optimum for.")] = None,
    objective: Annotated[str, typer.Option(help="What approach 3 minimises.")] = "huber_log",
    cluster: Annotated[
        str,
        typer.Option(help="Approach 3 resamples groups of this column; auto: runs that have several rows; none: rows."),
    ] = "auto",
    figure: FigurePath = None,
    json: AsJson = False,
) -> None:
    """N*(C), D*(C) and the loss on them, and how far the approaches disagree."""
    import json as json_module

    from aimscale.analysis.fitting.result import plain_types
    from aimscale.analysis.frontier.approaches import all_approaches
    from aimscale.analysis.plots.laws import plot_frontiers
    from aimscale.analysis.tables.design import mixture_flags

    df = table_of(tables, columns, where, main, fresh=True)
    names = variable_columns(df.columns, n, c)
    found = all_approaches(
        df, y=y, columns=names, budgets=budgets, objective=objective, cluster=None if cluster == "none" else cluster
    )
    flags = mixture_flags(df, ["N", "D", "C"])
    if figure is not None:
        draw(plot_frontiers(found.frontiers), figure)
    top = max(f.range[1] for f in found.frontiers)
    optima = found.at(at or [top, 10 * top])
    if json:
        data = found.to_dict() | {"optima": optima.to_dict("records"), "flags": list(flags)}
        typer.echo(json_module.dumps(plain_types(data), indent=2, allow_nan=False))
        return
    typer.echo(" ".join([found.sentence(), *flags]))
    typer.echo("\n" + optima.to_string(index=False, float_format=lambda v: f"{v:.4g}"))
