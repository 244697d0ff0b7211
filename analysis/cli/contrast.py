"""`aimscale contrast TABLE --by COLUMN`: what one change does with everything else equal."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer

from aimscale.analysis.cli import options
from aimscale.analysis.cli.options import draw, show, table_of


def command(
    tables: options.Tables,
    by: Annotated[
        str,
        typer.Option(
            help="Column to compare, e.g. prefix, head_depth, optimiser.weight_decay, against the paper's level or the "
            "one named: size=rung-24; within a row, `kind` compares kinds of probes and `blocks` the chosen blocks "
            "with the last ones."
        ),
    ],
    measure: Annotated[
        list[str] | None,
        typer.Option(help="val_loss, another column, top1, top1:TASK or top1:TASK:KIND; default: loss and all probes."),
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Column that may differ within a pair.")] = None,
    columns: options.Columns = None,
    where: options.Where = None,
    figure: options.FigurePath = None,
    json: options.AsJson = False,
) -> None:
    """Pair rows over size, data, seed and all else; differences and ratios with intervals, and the worth in compute."""
    from aimscale.analysis.display import plain_types
    from aimscale.analysis.effects.contrasts import contrast
    from aimscale.analysis.effects.gains import gains

    df = table_of(tables, columns, where)
    name, _, baseline = by.partition("=")
    found = contrast(df, by=name, baseline=baseline or None, measures=measure or [], ignore=ignore or [])
    worth = gains(found, df)
    if not json:
        show(found, json, figure, after=[f"- {line}" for line in worth.sentences()])
        return
    if figure is not None:
        draw(found.plot(), figure)
    typer.echo(json_module.dumps(plain_types(found.to_dict() | {"gains": worth.gains}), indent=2, allow_nan=False))
