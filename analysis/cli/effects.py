"""`aimscale contrast`, `correlate` and `rates`: single changes, loss beside accuracy, whether each size was tuned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aimscale import analysis
from aimscale.analysis.cli import options
from aimscale.analysis.cli.options import TableArguments, show
from aimscale.analysis.display import text_table
from aimscale.analysis.errors import AnalysisError

if TYPE_CHECKING:
    from aimscale.analysis.fitting.result import Fit

MEASURED, TUNED = "best as measured", "as if tuned"


def contrast(
    tables: options.Tables,
    by: Annotated[
        str,
        typer.Option(
            help="Column to compare, e.g. prefix, head_depth, optimiser.weight_decay, against the paper's level or the "
            "one named: size=rung-24."
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
    """Pair rows over size, data, seed and all else; differences and ratios with intervals."""
    arguments = TableArguments(tables, columns, where)
    df, (name, _, baseline) = arguments.read(), by.partition("=")
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
            following=arguments.then("report"),
        )
        return
    found = analysis.contrast(df, by=name, baseline=baseline or None, measures=measure or [], ignore=ignore or [])
    show(found, json, figure, labels=label, following=arguments.then("report"))


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
    figure: options.FigurePath = None,
    label: options.Labels = None,
    json: options.AsJson = False,
) -> None:
    """Pearson and Spearman with intervals: at equal compute first, then over all rows, where both follow compute."""
    arguments = TableArguments(tables, columns, where)
    found = analysis.correlate(arguments.read(), x=x, y=y, partial=partial, within=within)
    show(found, json, figure, labels=label, following=arguments.then("report"))


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

    arguments = TableArguments(tables, columns, where)
    df = arguments.read()
    y = our_name(df, y)
    found = analysis.rates(df, y=y, lr=lr, batch=batch)
    if write is not None:
        write.write_text(found.recipe(arguments.then("rates")))
        typer.echo(f"wrote {write}", err=True)
    laws: dict[str, Fit] = {}
    try:
        corrected = analysis.tuned(df, y=y, found=found)
        laws = {words: analysis.fit(each, law, y=y) for words, each in ((MEASURED, df), (TUNED, corrected))}
        corrected_law = laws[TUNED]
        rows = [
            {"parameter": k, **{words: each.shown(k) for words, each in laws.items()}} for k in corrected_law.params
        ]
        after = ["", f"{corrected_law.law.formula}:", "", text_table(rows)]
    except AnalysisError as error:
        after = ["", f"No law as if all runs were tuned: {error}"]
    if target is not None:
        after.append(f"target: {found.advice(parse_scale(target, '--target'))}")
    show(found, json, figure, labels=label, after=after, also={"laws": laws}, following=arguments.then("fit", "report"))
