"""`aimscale noise TABLE`: how much of the loss's spread comes from seeds, validation images and prefixes."""

from __future__ import annotations

from aimscale.analysis.cli import options
from aimscale.analysis.cli.options import show, table_of


def command(
    tables: options.Tables,
    y: options.LossColumn = "val_loss",
    columns: options.Columns = None,
    where: options.Where = None,
    best_of: options.BestOf = None,
    main: options.Main = False,
    figure: options.FigurePath = None,
    json: options.AsJson = False,
) -> None:
    """Standard deviations with intervals; per-image losses are read from the run directories beside the tables."""
    from aimscale.analysis.effects.noise_sources import noise
    from aimscale.analysis.table.schema import our_name

    df = table_of(tables, columns, where, main, best=best_of, y=y)
    show(noise(df, y=our_name(df, y)), json, figure)
