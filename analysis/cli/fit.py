"""`aimscale fit TABLE`: a law with intervals, flags and a held-out test."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from aimscale.analysis.cli import options
from aimscale.analysis.cli.options import draw, show, table_of
from aimscale.analysis.errors import AnalysisError

if TYPE_CHECKING:
    import pandas as pd

    from aimscale.analysis.fitting.result import Fit
    from aimscale.analysis.next.backtest import Choice


def command(
    tables: options.Tables,
    law: Annotated[
        str,
        typer.Option(
            help="Law to fit; a one-variable law names its variable, e.g. power_offset:N or power:C. auto (auto:C of C "
            "alone), or several with commas: the simplest that predicts the largest scales as well as any."
        ),
    ] = "chinchilla",
    objective: Annotated[
        str, typer.Option(help="What to minimise: robust, huber_log (:0.01 sets delta), lsq or log_lsq.")
    ] = "robust",
    fix: Annotated[list[str] | None, typer.Option(help="Hold a parameter, e.g. E=0.")] = None,
    bound: Annotated[
        list[str] | None, typer.Option(help="Keep a parameter between two values, e.g. alpha=0.1:1.")
    ] = None,
    resamples: Annotated[int, typer.Option(min=0, help="Draws that intervals are read from; 0 for none.")] = 1000,
    hold_out: Annotated[
        list[str] | None, typer.Option(help="Test by leaving the largest out, e.g. N or D:2; may be repeated.")
    ] = None,
    y: Annotated[str, typer.Option(help="Column to fit.", rich_help_panel=options.PANEL)] = "val_loss",
    columns: options.Columns = None,
    where: options.Where = None,
    best_of: options.BestOf = None,
    weights: Annotated[str | None, typer.Option(help="Column of weights.", rich_help_panel=options.PANEL)] = None,
    figure: options.FigurePath = None,
    json: options.AsJson = False,
) -> None:
    """Fit LAW to a table and say how far to trust it."""
    from aimscale.analysis.fitting.estimate import fit
    from aimscale.analysis.table.names import our_name

    df = table_of(tables, columns, where, best_of, y)
    y = our_name(df, y)
    by = hold_out[0].partition(":")[0] if hold_out else None
    df, choice = chosen(law, df, by, y, objective)
    if choice and (fix or bound):
        raise AnalysisError("--fix and --bound belong to one law; name it by --law instead of comparing several.")
    result = fit(
        choice.best.law if choice else law,
        df,
        y=y,
        objective=objective,
        weights=our_name(df, weights) if weights else None,
        fixed={name: value for name, (value,) in numbers(fix, "--fix", "E=0", 1).items()},
        bounds={name: (low, high) for name, (low, high) in numbers(bound, "--bound", "alpha=0.1:1", 2).items()},
        resamples=resamples,
    )
    result = tested(result, df, hold_out or [])
    after = ["", choice.sentence()] if choice else []
    if choice and json:
        if figure is not None:
            draw(result.plot(), figure)
        show(replace(choice, best=result), json)
    else:
        show(result, json, figure, after=after)


def chosen(law: str, df: pd.DataFrame, by: str | None, y: str, objective: str) -> tuple[pd.DataFrame, Choice | None]:
    """The table with what a choice needs, and the choice, where `law` names several or leaves it open."""
    from aimscale.analysis.next.backtest import AUTO, choose, with_compute

    laws = law.split(",")
    if len(laws) == 1 and law.partition(":")[0] != AUTO:
        return df, None
    df = with_compute(df, None)
    return df, choose(laws if len(laws) > 1 else law, df, by=by, y=y, objective=objective, resamples=0)


def tested(result: Fit, df: pd.DataFrame, hold_out: list[str]) -> Fit:
    """The fit with held-out tests, and flags of the table."""
    from aimscale.analysis.fitting.holdout import held_out
    from aimscale.analysis.table.select import mixture_flags
    from aimscale.analysis.words import Flag

    tests = []
    for wish in hold_out:
        by, _, count = wish.partition(":")
        if count and not (count.isdecimal() and int(count)):
            raise AnalysisError(f"--hold-out takes N or N:2, not {wish!r}.")
        tests.append(held_out(result, df, by=by, num_values=int(count or 1)))
    mixed = [Flag(kind="mixed", subject=words) for words in mixture_flags(df, result.law.variables)]
    return replace(result, flags=(*result.flags, *mixed), heldout=tuple(tests))


def numbers(texts: list[str] | None, option: str, example: str, num: int) -> dict[str, list[float]]:
    """Options `name=value` (`num` 1) or `name=low:high` (2) by name.

    Raises:
        AnalysisError: not of that form.
    """
    found = {}
    for text in texts or []:
        name, _, values = text.partition("=")
        try:
            found[name.strip()] = [float(value) for value in values.split(":")]
        except ValueError:
            found[name.strip()] = []
        if len(found[name.strip()]) != num:
            raise AnalysisError(f"{option} takes numbers such as {example}, not {text!r}.")
    return found
