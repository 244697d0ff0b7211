"""`aimscale repeats TABLE`: what a repeated image is worth beside a new one."""

from __future__ import annotations

from typing import Annotated

import typer

from aimscale.analysis.cli.options import AsJson, Columns, FigurePath, Main, Tables, Where, draw, table_of

app = typer.Typer(help="Tell what repeated images are worth, by the law of Muennighoff et al.", add_completion=False)


@app.command()
def repeats_table(
    tables: Tables,
    y: Annotated[str, typer.Option(help="Loss column.")] = "val_loss",
    objective: Annotated[str, typer.Option(help="What to minimise.")] = "huber_log",
    resamples: Annotated[int, typer.Option(min=20, help="Bootstrap resamples.")] = 1000,
    columns: Columns = None,
    where: Where = None,
    main: Main = False,
    figure: FigurePath = None,
    json: AsJson = False,
) -> None:
    """R_D with its interval, the worth of the k-th sight of an image, and whether R_D is bounded at all."""
    from aimscale.analysis.effects.repetition import repeats
    from aimscale.analysis.plots.intervals import plot_repeats
    from aimscale.analysis.tables.design import mixture_flags

    df = table_of(tables, columns, where, main)
    found = repeats(df, y=y, objective=objective, resamples=resamples)
    if figure is not None:
        draw(plot_repeats(*found.curves(), found.fit.loss_unit), figure)
    typer.echo(found.to_json() if json else "\n".join([found.text(), *mixture_flags(df, ["N", "D", "U"])]))
