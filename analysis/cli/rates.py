"""`aimscale rates`: whether each size was tuned, and the law of the best learning rate and batch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aimscale import analysis
from aimscale.analysis.cli import options
from aimscale.analysis.cli.options import show, table_of, then
from aimscale.analysis.display import text_table
from aimscale.analysis.errors import AnalysisError

if TYPE_CHECKING:
    from aimscale.analysis.fitting.result import Fit

MEASURED, TUNED = "best as measured", "as if tuned"


def rates(
    tables: options.Tables,
    lr: Annotated[str, typer.Option(help="Column of the learning rate.")] = "lr_peak",
    batch: Annotated[
        str | None, typer.Option(help="Column of the batch; default: batch_size, where sizes were tried at several.")
    ] = None,
    law: Annotated[
        str, typer.Option(help="Law of the loss to fit as measured, and as if all runs were tuned.")
    ] = "chinchilla",
    target: Annotated[
        str | None,
        typer.Option(help="Print the best settings at this scale, N=1e9,D=2B, and the runs that would narrow them."),
    ] = None,
    write: Annotated[
        Path | None, typer.Option(help="Write the laws as a recipe that a sweep can name, FILE.yaml.")
    ] = None,
    y: options.LossColumn = "val_loss",
    columns: options.Columns = None,
    where: options.Where = None,
    figure: options.FigurePath = None,
    label: options.Labels = None,
    json: options.AsJson = False,
) -> None:
    """Find each cell's best setting (three rates or more at one N and D), their law, and what every cell lost."""
    from aimscale.analysis.forecasts.forecast import parse_scale
    from aimscale.analysis.table.names import our_name

    df = table_of(tables, columns, where)
    y = our_name(df, y)
    found = analysis.rates(df, y=y, lr=lr, batch=batch)
    if write is not None:
        write.write_text(found.recipe(then(["rates"], tables, columns, where)))
        typer.echo(f"wrote {write}", err=True)
    laws: dict[str, Fit] = {}
    try:
        corrected = analysis.tuned(df, y=y, found=found)
        laws = {words: analysis.fit(each, law, y=y) for words, each in ((MEASURED, df), (TUNED, corrected))}
        after = ["", f"{laws[TUNED].law.formula}:", "", text_table(_beside(laws))]
    except AnalysisError as error:
        after = ["", f"No law as if all runs were tuned: {error}"]
    if target is not None:
        after.append(f"target: {found.advice(parse_scale(target, '--target'))}")
    show(
        found,
        json,
        figure,
        labels=label,
        after=after,
        also={"laws": laws},
        following=then(["fit", "report"], tables, columns, where),
    )


def _beside(laws: dict[str, Fit]) -> list[dict[str, str]]:
    """Write a row per parameter with its value by every law."""
    return [{"parameter": name, **{k: law.shown(name) for k, law in laws.items()}} for name in laws[TUNED].params]
