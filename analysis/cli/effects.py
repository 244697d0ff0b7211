"""`aimscale contrast` and `correlate`: what one change does, and whether loss goes with accuracy."""

from __future__ import annotations

from typing import Annotated

import typer

from aimscale import analysis
from aimscale.analysis.cli import options
from aimscale.analysis.cli.options import show, table_of, then
from aimscale.analysis.display import fact_lines
from aimscale.analysis.errors import AnalysisError


def contrast(
    tables: options.Tables,
    by: Annotated[
        str,
        typer.Option(
            help="Column to compare, e.g. prefix, head_depth, optimiser.weight_decay, against the paper's level or the "
            "one named: size=rung-24; `kind` compares kinds of probes within a row."
        ),
    ],
    measure: Annotated[
        list[str] | None,
        typer.Option(help="A column, or accuracies: TASK:KIND, TASK, top1 (all); default: loss and all accuracies."),
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Column that may differ within a pair.")] = None,
    as_law: Annotated[
        bool,
        typer.Option(
            "--as-law", help="Fit the losses of both levels as laws: how the gain in compute changes with compute."
        ),
    ] = False,
    columns: options.Columns = None,
    where: options.Where = None,
    figure: options.FigurePath = None,
    label: options.Labels = None,
    json: options.AsJson = False,
) -> None:
    """Pair rows over size, data, seed and all else; differences and ratios with intervals, and the worth in compute."""
    from aimscale.analysis.effects.gains import Gain, gains

    df = table_of(tables, columns, where)
    name, _, baseline = by.partition("=")
    if as_law:
        if ignore or len(measure or []) > 1:
            raise AnalysisError("--as-law fits one loss, named by --measure, and takes no --ignore; leave these out.")
        each = analysis.recipes(df, by=name, baseline=baseline or None, y=(measure or ["val_loss"])[0])
        show(
            each[0],
            json,
            figure,
            labels=label,
            after=[line for more in each[1:] for line in ("", more.summary())],
            also={"levels": each} if len(each) > 1 else None,
            following=then(["report"], tables, columns, where),
        )
        return
    found = analysis.contrast(df, by=name, baseline=baseline or None, measures=measure or [], ignore=ignore or [])
    worth = gains(found)
    after = ["", fact_lines([*dict.fromkeys(("worth", str(each)) for each in worth)])] if worth else []
    also = {"gains": [each for each in worth if isinstance(each, Gain)]}
    following = then(["report"], tables, columns, where)
    show(found, json, figure, labels=label, after=after, also=also, following=following)


def correlate(
    tables: options.Tables,
    x: Annotated[str, typer.Option(help="First column.")] = "val_loss",
    y: Annotated[
        str, typer.Option(help="Second column or accuracy, TASK:KIND; top1 means every accuracy of the table.")
    ] = "top1",
    partial: Annotated[
        str | None, typer.Option(help="Hold this column equal and show nothing else, e.g. flops_train.")
    ] = None,
    within: Annotated[str | None, typer.Option(help="Correlate within groups of this column (size).")] = None,
    columns: options.Columns = None,
    where: options.Where = None,
    json: options.AsJson = False,
) -> None:
    """Pearson and Spearman with intervals: at equal compute first, then over all rows, where both follow compute."""
    found = analysis.correlate(table_of(tables, columns, where), x=x, y=y, partial=partial, within=within)
    show(found, json, following=then(["report"], tables, columns, where))
