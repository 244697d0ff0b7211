"""`aimscale rates`: whether each size was tuned, and the law of the best learning rate and batch."""

from __future__ import annotations

from typing import Annotated

import typer

from aimscale import analysis
from aimscale.analysis.cli import options
from aimscale.analysis.cli.options import show, table_of, then
from aimscale.analysis.display import text_table
from aimscale.analysis.errors import AnalysisError


def rates(
    tables: options.Tables,
    lr: Annotated[str, typer.Option(help="Column of the learning rate.")] = "lr_peak",
    batch: Annotated[
        str | None, typer.Option(help="Column of the batch; default: batch_size, where sizes were tried at several.")
    ] = None,
    law: Annotated[
        str, typer.Option(help="Law of the loss to fit as measured, and as if all runs were tuned.")
    ] = "chinchilla",
    y: options.LossColumn = "val_loss",
    columns: options.Columns = None,
    where: options.Where = None,
    figure: options.FigurePath = None,
    label: options.Labels = None,
    json: options.AsJson = False,
) -> None:
    """Find each cell's best setting (three rates or more at one N and D), their law, and what every cell lost."""
    found = analysis.rates(table_of(tables, columns, where), y=y, lr=lr, batch=batch)
    try:
        tuned = analysis.corrected(found, law)
        after = ["", tuned.headline(), "", text_table(tuned.cells())]
    except AnalysisError as error:
        tuned, after = None, ["", f"No law as if all runs were tuned: {error}"]
    show(
        found,
        json,
        figure,
        labels=label,
        after=after,
        also={"corrected": tuned},
        following=then(["fit", "report"], tables, columns, where),
    )
