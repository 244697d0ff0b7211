"""`aimscale contrast TABLE --by COLUMN`: what one change does with everything else equal."""

from __future__ import annotations

from typing import Annotated

import typer

from aimscale.analysis.cli import options
from aimscale.analysis.cli.options import show, table_of


def command(
    tables: options.Tables,
    by: Annotated[
        str,
        typer.Option(
            help="Column to compare, e.g. prefix, head_depth, patch_order, target, optimiser.weight_decay; within a "
            "row, `kind` compares kinds of probes and `blocks` the chosen blocks with the last ones."
        ),
    ],
    baseline: Annotated[str | None, typer.Option(help="Level to compare with; default: the paper's.")] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(help="val_loss, another column, top1, top1:TASK or top1:TASK:KIND; default: loss and all probes."),
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Column that may differ within a pair.")] = None,
    columns: options.Columns = None,
    where: options.Where = None,
    each: Annotated[
        bool, typer.Option("--each", help="Also print the differences by size and by images seen.")
    ] = False,
    figure: options.FigurePath = None,
    json: options.AsJson = False,
) -> None:
    """Pair rows over size, data, seed and all other settings; differences and ratios with Student's intervals."""
    from aimscale.analysis.effects.contrasts import contrast
    from aimscale.analysis.effects.gains import with_gains

    df = table_of(tables, columns, where)
    found = with_gains(contrast(df, by=by, baseline=baseline, measures=measure or [], ignore=ignore or []), df)
    show(found, json, figure, after=found.lines_by_scale() if each else ())
