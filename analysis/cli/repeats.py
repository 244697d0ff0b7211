"""`aimscale repeats TABLE`: what a repeated image is worth beside a new one."""

from __future__ import annotations

from aimscale.analysis.cli import options
from aimscale.analysis.cli.options import show, table_of


def command(
    tables: options.Tables,
    y: options.LossColumn = "val_loss",
    objective: options.Objective = "robust",
    resamples: options.Resamples = 1000,
    columns: options.Columns = None,
    where: options.Where = None,
    best_of: options.BestOf = None,
    main: options.Main = False,
    figure: options.FigurePath = None,
    json: options.AsJson = False,
) -> None:
    """R_D with its interval, the worth of the k-th pass over an image, and whether R_D is bounded at all."""
    from aimscale.analysis.effects.repetition import repeats
    from aimscale.analysis.table.design import mixture_flags
    from aimscale.analysis.table.schema import our_name

    df = table_of(tables, columns, where, main, best=best_of, y=y)
    found = repeats(df, y=our_name(df, y), objective=objective, resamples=resamples)
    show(found, json, figure, after=mixture_flags(df, ["N", "D", "U"]))
