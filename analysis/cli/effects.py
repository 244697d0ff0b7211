"""`aimscale contrast`, `correlate` and `rates`: single changes, loss beside accuracy, whether each size was tuned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aimscale import analysis
from aimscale.analysis.cli import options
from aimscale.analysis.cli.options import TableArguments, parameter_values
from aimscale.analysis.display import text_table
from aimscale.analysis.errors import AnalysisError

if TYPE_CHECKING:
    from aimscale.analysis.fitting.result import Fit

MEASURED, TUNED = "best as measured", "as if tuned"


@options.verb("columns", "where", "figure", "label", "level", "json")
def contrast(
    given: TableArguments,
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
    transfer: Annotated[
        bool,
        typer.Option("--transfer", help="Tell how much data a warm start is worth, in samples of runs from scratch."),
    ] = False,
    law: Annotated[
        str | None,
        typer.Option(
            help="With --as-law: the law of compute that both follow but for one gain, power_offset:C or power:C; "
            "ladders of five rungs or fewer that grow in N and D take the first by themselves."
        ),
    ] = None,
    fix: Annotated[list[str] | None, typer.Option(help="Hold a parameter of that law, E=1.6; may be repeated.")] = None,
) -> None:
    """Pair rows over size, data, seed and all else; differences and ratios with intervals."""
    runs, (name, _, baseline) = given.read(), by.partition("=")
    if transfer:
        if as_law or law or fix or ignore or len(measure or []) > 1:
            raise AnalysisError("--transfer takes one loss, named by --measure, and no other option; leave these out.")
        worth = analysis.transfer(runs, by=name, baseline=baseline or None, y=(measure or ["val_loss"])[0])
        after = [line for more in worth[1:] for line in ("", more.summary())]
        given.show(worth[0], ["report"], after=after, also={"levels": worth} if len(worth) > 1 else None)
        return
    if not as_law:
        if law or fix:
            raise AnalysisError("--law and --fix belong to --as-law; add it.")
        levels = analysis.contrast(
            runs, by=name, baseline=baseline or None, measures=measure or [], ignore=ignore or []
        )
        return given.show(levels, ["report"])
    if ignore or len(measure or []) > 1:
        raise AnalysisError("--as-law fits one loss, named by --measure, and takes no --ignore; leave these out.")
    values = dict(map(parameter_values, fix or []))
    fixed = {parameter: numbers[0] for parameter, numbers in values.items()}
    y = (measure or ["val_loss"])[0]
    results = analysis.recipes(runs, by=name, baseline=baseline or None, y=y, law=law or "", fixed=fixed)
    after = [line for more in results[1:] for line in ("", more.summary())]
    also = {"levels": results} if len(results) > 1 else None
    given.show(results[0], ["report"], after=after, also=also, drawn={"beside": results[1:]})


@options.verb("columns", "where", "figure", "label", "level", "json")
def correlate(
    given: TableArguments,
    x: Annotated[str, typer.Option(help="First column.")] = "val_loss",
    y: Annotated[
        str, typer.Option(help="Second column or accuracy, TASK:KIND; top1 means every accuracy of the table.")
    ] = "top1",
    partial: Annotated[
        str | None, typer.Option(help="Hold this column equal and show nothing else, e.g. flops_train.")
    ] = None,
    within: Annotated[str | None, typer.Option(help="Correlate within groups of this column (size).")] = None,
) -> None:
    """Pearson and Spearman with intervals: at equal compute first, then over all rows, where both follow compute."""
    given.show(analysis.correlate(given.read(), x=x, y=y, partial=partial, within=within), ["report"])


@options.verb("y", "columns", "where", "figure", "label", "level", "json")
def rates(
    given: TableArguments,
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
) -> None:
    """Find each cell's best setting (three rates or more at one N and D), their law, and what every cell lost."""
    from aimscale.analysis.forecasts.forecast import parse_scale

    runs = given.read()
    y = runs.column(given.y)
    result = analysis.rates(runs, y=y, lr=lr, batch=batch)
    if write is not None:
        write.write_text(result.recipe(given.then("rates")))
        typer.echo(f"wrote {write}", err=True)
    laws: dict[str, Fit] = {}
    try:
        corrected = analysis.tuned(runs, y=y, known_rates=result)
        laws = {words: analysis.fit(each, law, y=y) for words, each in ((MEASURED, runs), (TUNED, corrected))}
        names = laws[TUNED].params.index
        rows = [{"parameter": name, **{words: each.shown(name) for words, each in laws.items()}} for name in names]
        after = ["", f"{laws[TUNED].law.formula}:", "", text_table(rows)]
    except AnalysisError as error:
        after = ["", f"No law as if all runs were tuned: {error}"]
    if target is not None:
        after.append(f"target: {result.advice(parse_scale(target, '--target'))}")
    given.show(result, ["fit", "report"], after=after, also={"laws": laws})
