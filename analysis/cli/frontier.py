"""`aimscale frontier TABLE`: compute-optimal size and data by three approaches."""

from __future__ import annotations

import json as json_module
import math
from typing import Annotated

import typer

from aimscale.analysis.cli import options
from aimscale.analysis.cli.options import draw, table_of
from aimscale.analysis.errors import AnalysisError


def command(
    tables: options.Tables,
    budgets: Annotated[
        int | None,
        typer.Option(min=2, help="Interpolate every size to this many budgets (approach 2); default: the table's own."),
    ] = None,
    at: Annotated[list[float] | None, typer.Option(help="Budgets in FLOPs to print the optimum for.")] = None,
    y: options.LossColumn = "val_loss",
    columns: options.Columns = None,
    where: options.Where = None,
    best_of: options.BestOf = None,
    figure: options.FigurePath = None,
    json: options.AsJson = False,
) -> None:
    """N*(C), D*(C) and the loss on them, and how far the approaches disagree."""
    from aimscale.analysis.display import plain_types
    from aimscale.analysis.frontier.approaches import all_approaches
    from aimscale.analysis.table.names import our_name
    from aimscale.analysis.table.select import mixture_flags

    for flops in at or []:
        if not 0 < flops < math.inf:
            raise AnalysisError(f"--at takes training FLOPs such as 1e18, not {flops:g}")
    df = table_of(tables, columns, where, best_of, y)
    found = all_approaches(df, y=our_name(df, y), budgets=budgets)
    flags = mixture_flags(df, ["N", "D", "C"])
    if figure is not None:
        draw(found.plot(), figure)
    shown = at or [found.largest_budget, 10 * found.largest_budget]
    if json:
        data = found.to_dict() | {"optima": found.at(shown).to_dict("records"), "flags": list(flags)}
        typer.echo(json_module.dumps(plain_types(data), indent=2, allow_nan=False))
        return
    typer.echo("\n".join([*flags, found.summary(shown)]))
