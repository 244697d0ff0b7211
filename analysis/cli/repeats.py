"""`aimscale repeats TABLE`: what a repeated image is worth beside a new one."""

from __future__ import annotations

from typing import Annotated

import typer

from aimscale.analysis.cli.options import (
    AsJson,
    BestOf,
    Columns,
    FigurePath,
    LossColumn,
    Main,
    Resamples,
    Tables,
    Where,
    show,
    table_of,
)

app = typer.Typer(help="Tell what repeated images are worth, by the law of Muennighoff et al.", add_completion=False)


@app.command()
def repeats_table(
    tables: Tables,
    y: LossColumn = "val_loss",
    objective: Annotated[str, typer.Option(help="What to minimise.")] = "robust",
    resamples: Resamples = 1000,
    columns: Columns = None,
    where: Where = None,
    best_of: BestOf = None,
    main: Main = False,
    figure: FigurePath = None,
    json: AsJson = False,
) -> None:
    """R_D with its interval, the worth of the k-th sight of an image, and whether R_D is bounded at all."""
    from aimscale.analysis.effects.repetition import repeats
    from aimscale.analysis.tables.design import mixture_flags

    df = table_of(tables, columns, where, main, best=best_of, y=y)
    found = repeats(df, y=y, objective=objective, resamples=resamples)
    show(found, json, figure, after=mixture_flags(df, ["N", "D", "U"]))
