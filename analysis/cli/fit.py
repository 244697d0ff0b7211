"""`aimscale fit TABLE`: a law with intervals, flags and a held-out test."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aimscale.analysis.cli.options import AsJson, Columns, FigurePath, Main, Tables, Where, draw, table_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pandas as pd

    from aimscale.analysis.fitting.result import Fit, HeldOut

app = typer.Typer(help="Fit a scaling law to a table, with intervals and a held-out test.", add_completion=False)


class WhatN(StrEnum):
    """What N counts."""

    total = "total"
    trunk = "trunk"
    head = "head"


class WhatC(StrEnum):
    """How C is counted."""

    measured = "measured"
    sixnd = "6nd"
    executed = "executed"


@app.command()
def fit_table(
    tables: Tables,
    law: Annotated[
        str, typer.Option(help="Law to fit; a one-variable law names its variable, e.g. power_offset:N or power:C.")
    ] = "chinchilla",
    y: Annotated[str, typer.Option(help="Column to fit.")] = "val_loss",
    objective: Annotated[str, typer.Option(help="What to minimise: huber_log, lsq, log_lsq, lad, ...")] = "huber_log",
    columns: Columns = None,
    where: Where = None,
    main: Main = False,
    n: Annotated[WhatN, typer.Option(help="What N counts.")] = WhatN.total,
    c: Annotated[WhatC, typer.Option(help="C as counted FLOPs, as 6ND, or as executed.")] = WhatC.measured,
    on_envelope: Annotated[
        bool,
        typer.Option("--envelope", help="Only rows that no row of equal or less compute undercuts (laws of C)."),
    ] = False,
    weights: Annotated[str | None, typer.Option(help="Column of weights.")] = None,
    fix: Annotated[list[str] | None, typer.Option(help="Hold a parameter, e.g. E=0.")] = None,
    bound: Annotated[
        list[str] | None, typer.Option(help="Keep a parameter between two values, e.g. alpha=0.1:1.")
    ] = None,
    cluster: Annotated[
        str,
        typer.Option(help="Resample whole groups of this column; auto: runs where they have several rows; none: rows."),
    ] = "auto",
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples; 0 for none.")] = 1000,
    hold_out: Annotated[
        list[str] | None, typer.Option(help="Test by leaving the largest out, e.g. N or D:2; may be repeated.")
    ] = None,
    leave_out: Annotated[
        str | None, typer.Option(help="Name groups of this column (size, run_id) whose removal moves a parameter most.")
    ] = None,
    profiles: Annotated[
        bool, typer.Option("--profile", help="Flag parameters whose profile likelihood is flat.")
    ] = False,
    against: Annotated[
        list[str] | None, typer.Option(help="Rival law, compared by predicting the largest scale; may be repeated.")
    ] = None,
    definitions: Annotated[
        bool,
        typer.Option("--definitions", help="Refit the joint law for every meaning of N and C in the table instead."),
    ] = False,
    figure: FigurePath = None,
    json: AsJson = False,
) -> None:
    """Fit LAW to a table and say how far to trust it."""
    from dataclasses import replace

    from aimscale.analysis.fitting.estimate import fit
    from aimscale.analysis.fitting.heldout import held_out
    from aimscale.analysis.fitting.influences import with_influence_flags
    from aimscale.analysis.fitting.profiles import with_profile_flags
    from aimscale.analysis.fitting.select import choose
    from aimscale.analysis.tables.design import lower_envelope, mixture_flags

    df = table_of(tables, columns, where, main, fresh="repeated" not in law)
    if definitions:
        _definitions(df, y, objective, resamples, figure, json)
        return
    names = variable_columns(df.columns, n, c)
    if on_envelope:
        df = lower_envelope(df, names.get("C", "flops_train"), y)
    result = fit(
        law,
        df,
        y=y,
        objective=objective,
        columns=names,
        weights=weights,
        fixed={k: number(v, k) for k, v in pairs(fix or [], "--fix", "E=0")},
        bounds={k: number_pair(v, k) for k, v in pairs(bound or [], "--bound", "alpha=0.1:1")},
        resamples=resamples,
        cluster=None if cluster == "none" else cluster,
    )
    result = replace(result, flags=(*result.flags, *mixture_flags(df, result.law.variables)))
    tests: list[HeldOut] = []
    for wish in hold_out or []:
        by, _, count = wish.partition(":")
        tests.append(held_out(result, df, by=by, num_values=int(number(count or "1", "--hold-out"))))
    result = replace(result, heldout=tuple(tests))
    if leave_out is not None:
        result = with_influence_flags(result, df, by=leave_out)
    if profiles:
        result = with_profile_flags(result)
    if figure is not None:
        from aimscale.analysis.plots.scaling import plot_fit

        drawn = plot_fit(result).get_figure(root=True)
        assert drawn is not None
        draw(drawn, figure)
    typer.echo(result.to_json() if json else text(result))
    if against and not json:
        by = (hold_out or [result.law.variables[0]])[0].partition(":")[0]
        ranked = choose([law, *against], df, by=by, y=y, columns=names, objective=objective, resamples=0)
        typer.echo("\n" + ranked.sentence())


def _definitions(df: pd.DataFrame, y: str, objective: str, resamples: int, figure: Path | None, json: bool) -> None:
    """Print, and draw, how the exponents depend on what N and C count."""
    from aimscale.analysis.frontier.definitions import by_definition
    from aimscale.analysis.plots.intervals import plot_definitions

    found = by_definition(df, y=y, objective=objective, resamples=resamples)
    if figure is not None:
        draw(plot_definitions(found), figure)
    typer.echo(found.to_json() if json else found.text())


def variable_columns(present: Iterable[str], n: WhatN, c: WhatC) -> dict[str, str]:
    """Columns of N and C by the user's choice, as far as the table is a results table."""
    flops = {WhatC.measured: "flops_train", WhatC.sixnd: "flops_6nd", WhatC.executed: "flops_executed"}
    wanted = {"N": f"params_{n.value}", "C": flops[c]}
    present = set(present)
    chosen = {"N": n != WhatN.total, "C": c != WhatC.measured}
    return {v: name for v, name in wanted.items() if name in present or chosen[v]}


def pairs(options: list[str], option: str, example: str) -> list[tuple[str, str]]:
    """Split `name=value` options.

    Raises:
        AnalysisError: an option without "=".
    """
    from aimscale.analysis.errors import AnalysisError

    out = []
    for text in options:
        name, equals, value = text.partition("=")
        if not equals:
            raise AnalysisError(f"{option} takes name=value such as {example}, not {text!r}.")
        out.append((name.strip(), value.strip()))
    return out


def number(text: str, where: str) -> float:
    """A number of an option.

    Raises:
        AnalysisError: not a number.
    """
    from aimscale.analysis.errors import AnalysisError

    try:
        return float(text)
    except ValueError:
        raise AnalysisError(f"{text!r} given for {where} is not a number.") from None


def number_pair(text: str, where: str) -> tuple[float, float]:
    """Two numbers of an option, low:high."""
    low, _, high = text.partition(":")
    return number(low, where), number(high, where)


def text(result: Fit) -> str:
    """The parameters as a table, then the sentence."""
    lines = [result.law.formula, ""]
    rows = [(name, result.shown(name)) for name in result.params]
    width = max(len(name) for name, _ in rows)
    lines += [f"  {name:<{width}}  {shown}" for name, shown in rows]
    return "\n".join([*lines, "", result.sentence()])
