"""`aimscale fit`, `forecast` and `frontier`: a law, what it expects of a run, and how to split compute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from aimscale.analysis.cli import options
from aimscale.analysis.cli.options import show, table_of, table_to_minimise, then
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.words import human, said_once

if TYPE_CHECKING:
    import pandas as pd

    from aimscale.analysis.fitting.result import Fit
    from aimscale.analysis.forecasts.forecaster import Forecaster


def fit(
    tables: options.Tables,
    law: Annotated[
        str,
        typer.Option(
            help="Law to fit; a one-variable law names its variable, e.g. power_offset:N or power:C. auto (auto:C of C "
            "alone), or several with commas: the first, or one that predicts the table's own larger runs better in "
            "every backtest."
        ),
    ] = "chinchilla",
    objective: Annotated[
        str, typer.Option(help="What to minimise: robust, huber_log (:0.01 sets delta), lsq or log_lsq.")
    ] = "robust",
    fix: Annotated[list[str] | None, typer.Option(help="Hold a parameter, e.g. E=0.")] = None,
    bound: Annotated[
        list[str] | None, typer.Option(help="Keep a parameter between two values, e.g. alpha=0.1:1.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Column in proportion to which rows count; compute: as forecasts are fitted. Default: all alike."
        ),
    ] = None,
    hold_out: Annotated[
        list[str] | None, typer.Option(help="Test by leaving the largest out, e.g. N or D:2; may be repeated.")
    ] = None,
    y: options.Minimised = "val_loss",
    columns: options.Columns = None,
    where: options.Where = None,
    best_of: options.BestOf = None,
    figure: options.FigurePath = None,
    json: options.AsJson = False,
) -> None:
    """Fit LAW to a table and say how far to trust it."""
    from aimscale.analysis.effects.plateau import plateau_flags
    from aimscale.analysis.fitting.estimate import fit
    from aimscale.analysis.table.points import with_compute

    df, y = table_to_minimise(tables, columns, where, best_of, y)
    found = several(law, df, y)
    if found:
        df = with_compute(df)  # as it was weighed with
    if found and (fix or bound):
        raise AnalysisError("--fix and --bound belong to one law; name it by --law instead of comparing several.")
    result = fit(
        df,
        found.law if found else law,
        y=y,
        weights=weights,
        objective=objective,
        fixed={name: value for name, (value,) in numbers(fix, "--fix", "E=0").items()},
        bounds={name: (low, high) for name, (low, high) in numbers(bound, "--bound", "alpha=0.1:1").items()},
    )
    result = tested(result, df, hold_out or [])
    result = replace(result, flags=(*result.flags, *plateau_flags(df.loc[result.data.index], y)))
    after, also = ([], {}) if found is None else (["", found.summary()], {"laws": found.table})
    both = {"N", "D"} <= {*result.law.variables} and "flops_train" in df
    following = then([*(["frontier"] if both else []), "report"], tables, columns, where, best_of)
    show(result, json, figure, after=after, also=also, following=following)


def several(law: str, df: pd.DataFrame, y: str) -> Forecaster | None:
    """Weigh the laws where `law` names several or leaves it open."""
    from aimscale.analysis.forecasts.forecaster import forecaster
    from aimscale.analysis.forecasts.points import AUTO

    is_one = "," not in law and law.partition(":")[0] != AUTO
    return None if is_one else forecaster(df, law=law, y=y)


def tested(result: Fit, df: pd.DataFrame, hold_out: list[str]) -> Fit:
    """Give the fit its held-out tests, and flags of the table."""
    from aimscale.analysis.fitting.holdout import held_out
    from aimscale.analysis.optimum.measured import with_budgets
    from aimscale.analysis.table.names import our_name
    from aimscale.analysis.table.select import mixture_flags

    tests = []
    for wish in hold_out:
        by, _, count = wish.partition(":")
        if count and not (count.isdecimal() and int(count)):
            raise AnalysisError(f"--hold-out takes N or N:2, not {wish!r}.")
        by_budget = our_name(df, by) == our_name(df, "C") and "C" not in result.law.variables
        rows = with_budgets(df, result.columns["y"], result.columns) if by_budget else df
        tests.append(held_out(result, rows, by="C" if by_budget else by, num_values=int(count or 1)))
    mixed = mixture_flags(df, result.law.variables, result.columns["y"])
    return replace(result, flags=said_once((*result.flags, *mixed)), heldout=tuple(tests))


def numbers(texts: list[str] | None, option: str, example: str) -> dict[str, list[float]]:
    """Read options of an example's form, `name=value` or `name=low:high`, by name.

    Raises:
        AnalysisError: not of that form.
    """
    found = {}
    for text in texts or []:
        name, _, values = text.partition("=")
        try:
            found[name.strip()] = [float(value) for value in values.split(":")]
            if values.count(":") != example.count(":"):
                raise ValueError(values)
        except ValueError as error:
            raise AnalysisError(f"{option} takes numbers such as {example}, not {text!r}.") from error
    return found


def forecast(
    tables: options.Tables,
    at: Annotated[
        list[str], typer.Option(help="A run's scale, N=1e9,D=2B (and U= where images repeat); may be repeated.")
    ],
    law: Annotated[
        str, typer.Option(help="Laws to weigh: auto, auto:C of C alone, or names with commas; one law alone is itself.")
    ] = "auto",
    register: Annotated[
        bool,
        typer.Option(
            "--register",
            help="Append data hash, date and intervals to forecasts.jsonl beside the first table, before the run.",
        ),
    ] = False,
    y: options.LossColumn = "val_loss",
    columns: options.Columns = None,
    where: options.Where = None,
    best_of: options.BestOf = None,
    json: options.AsJson = False,
) -> None:
    """Forecast the loss and every accuracy of runs not trained yet, with intervals that grow with distance."""
    from aimscale.analysis.forecasts.forecast import forecast, parse_scale
    from aimscale.analysis.forecasts.registry import REGISTER
    from aimscale.analysis.forecasts.registry import register as write
    from aimscale.analysis.table.names import our_name
    from aimscale.analysis.table.points import passes_flags, usable_rows
    from aimscale.analysis.table.select import mixture_flags

    df = table_of(tables, columns, where, best_of, y)
    y = our_name(df, y)
    found = forecast(df, [parse_scale(each, "--at") for each in at], law=law, y=y)
    rows = usable_rows(df, y, best_by=y)
    repeats = [
        flag for each in found.scales for flag in passes_flags(rows.rows, f"D = {human(each.get('D', 0))}", each)
    ]
    mixed = mixture_flags(df, [*found.loss.points.x], y)
    found = replace(found, flags=(*mixed, *rows.flags, *repeats, *found.flags))
    after = []
    if register:
        path = (tables[0] if tables[0].is_dir() else tables[0].parent) / REGISTER
        write(found, df, path)
        after += ["", f"registered in {path}"]
    show(
        found,
        json,
        after=after,
        following=then([f"next --target {at[-1]} --budget GPU_HOURS"], tables, columns, where, best_of),
    )


def frontier(
    tables: options.Tables,
    at: Annotated[list[float] | None, typer.Option(help="Budgets in FLOPs to print the optimum for.")] = None,
    law: Annotated[
        str, typer.Option(help="Law of approach 3, as `fit --law` takes it; auto chooses it as `fit` does.")
    ] = "chinchilla",
    y: options.Minimised = "val_loss",
    columns: options.Columns = None,
    where: options.Where = None,
    best_of: options.BestOf = None,
    figure: options.FigurePath = None,
    json: options.AsJson = False,
) -> None:
    """N*(C), D*(C) and the loss on them, and how far the approaches disagree; of a probe, how far its optimum lies from
    that of the loss."""
    from aimscale.analysis.display import fact_lines
    from aimscale.analysis.optimum.approaches import frontier, gap_to_loss
    from aimscale.analysis.table.points import passes_flags, usable_rows
    from aimscale.analysis.table.select import mixture_flags

    for flops in at or []:
        if not 0 < flops < math.inf:
            raise AnalysisError(f"--at takes training FLOPs such as 1e18, not {flops:g}.")
    df, y = table_to_minimise(tables, columns, where, best_of, y)
    several_laws = several(law, df, y)
    by_law = several_laws.law if several_laws else law
    found = frontier(df, y=y, law=by_law)
    gap = gap_to_loss(found, df, y, law=by_law)
    shown = at or [found.largest_budget, 10 * found.largest_budget]
    best = found.at(shown).iloc[-1]
    rows = usable_rows(df, y, best_by=y)
    repeats = passes_flags(rows.rows, f"D* = {human(best['D'])} at {human(best['C'])} FLOP", {"D": best["D"]})
    found = replace(found, flags=(*found.flags, *mixture_flags(df, ["N", "D", "C"], y), *rows.flags, *repeats))
    place = [] if found.are_apart else [f"forecast --at {typed_scale({v: best[v] for v in ('N', 'D')})}"]
    show(
        found,
        json,
        figure,
        words=found.summary(shown),
        after=["", fact_lines([("probe and loss", gap.sentence())])] if gap else [],
        also={"optima": found.at(shown), "flags": found.cautions, "against_loss": gap},
        following=then([*place, "report"], tables, columns, where, best_of),
    )


def typed_scale(at: Mapping[str, float]) -> str:
    """Write a scale as `--at` takes it."""
    return ",".join(f"{name}={human(v) if 1e-3 < v < 1e12 else f'{v:.3g}'}" for name, v in at.items())
