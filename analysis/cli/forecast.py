"""`aimscale forecast TABLE --at N=..,D=..`: what a run will reach, written down before it is trained."""

from __future__ import annotations

from typing import Annotated

import typer

from aimscale.analysis.cli import options
from aimscale.analysis.cli.options import show, table_of


def command(
    tables: options.Tables,
    at: Annotated[str, typer.Option(help="The run's scale: N=1e9,D=2B (and U= where images repeat).")],
    law: Annotated[str, typer.Option(help="Law of the loss; auto chooses it as `fit --law auto` does.")] = "auto",
    register: Annotated[
        bool,
        typer.Option(
            "--register",
            help="Append law, data hash, date and intervals to forecasts.jsonl beside the first table, before the run.",
        ),
    ] = False,
    y: options.LossColumn = "val_loss",
    columns: options.Columns = None,
    where: options.Where = None,
    best_of: options.BestOf = None,
    json: options.AsJson = False,
) -> None:
    """Forecast the loss by a law and every probe's accuracy through it, each with two intervals."""
    from aimscale.analysis.forecasts.ahead import ahead, parse_scale
    from aimscale.analysis.forecasts.registry import REGISTER
    from aimscale.analysis.forecasts.registry import register as write
    from aimscale.analysis.table.names import our_name
    from aimscale.analysis.table.select import mixture_flags

    df = table_of(tables, columns, where, best_of, y)
    y = our_name(df, y)
    found = ahead(df, parse_scale(at, "--at"), law=law, y=y)
    after = list(mixture_flags(df, found.law.law.variables))
    if register:
        path = (tables[0] if tables[0].is_dir() else tables[0].parent) / REGISTER
        write(found, df, path)
        after += ["", f"registered in {path}"]
    show(found, json, after=after)
