"""`aimscale fit`, `forecast` and `frontier`: a law, what it expects of a run, and how to split compute."""

from __future__ import annotations

import math
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from aimscale import analysis
from aimscale.analysis.cli import options
from aimscale.analysis.cli.options import TableArguments, can_report, of_law, parameter_values
from aimscale.analysis.display import human, text_table
from aimscale.analysis.errors import AnalysisError

if TYPE_CHECKING:
    from aimscale.analysis.fitting.result import Fit
    from aimscale.analysis.forecasts.forecaster import Forecaster
    from aimscale.analysis.table.runs import Runs


def list_laws(law: str) -> str:
    """Print every law and leave, if `list` is asked for; else return the name."""
    if law != "list":
        return law
    rows = [{"law": each.name, "formula": each.formula, "source": each.source} for each in analysis.laws.LAWS.values()]
    typer.echo(text_table(rows))
    raise typer.Exit


@options.verb("y", "columns", "where", "groups", "figure", "label", "level", "json", y=options.Minimised)
def fit(
    given: TableArguments,
    law: Annotated[
        str,
        typer.Option(
            help="Law to fit; list prints all. A law of one variable names it: power_offset:N. With auto (auto:C: laws "
            "of C alone), or several names and commas, the first is taken, unless another one predicts the table's own "
            "larger runs better in every backtest.",
            callback=list_laws,
            is_eager=True,
        ),
    ] = "chinchilla",
    objective: Annotated[
        str, typer.Option(help="What to minimise: robust, huber_log (:0.01 sets delta), lsq or log_lsq.")
    ] = "robust",
    fix: Annotated[
        list[str] | None,
        typer.Option(help="Hold a parameter, E=0, or keep it between two values, alpha=0.1:1; may be repeated."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Column by which rows are weighted; compute: as forecasts do. Default: equal weights."),
    ] = None,
    hold_out: Annotated[
        list[str] | None,
        typer.Option(help="Test the law on its largest values, left out: N, or D:2 for two; may be repeated."),
    ] = None,
    drop_outliers: Annotated[
        bool, typer.Option("--drop-outliers", help="Fit once more without points far beyond the others, and name them.")
    ] = False,
) -> None:
    """Fit LAW to a table and say how far to trust it."""
    from aimscale.analysis.fitting.held_out import EXPONENTS

    runs, y, tuning = given.read_to_minimise()
    if laws := several(law, runs, y):
        if fix:
            raise AnalysisError("--fix belongs to one law; name it by --law instead of comparing several.")
        runs = runs.with_compute()  # as it was weighed with
    values = dict(map(parameter_values, fix or []))
    fixed = {name: each[0] for name, each in values.items() if len(each) == 1}
    bounds = {name: (each[0], each[1]) for name, each in values.items() if len(each) == 2}
    result = analysis.fit(
        runs,
        laws.law if laws else law,
        y=y,
        weights=weights,
        objective=objective,
        fixed=fixed,
        bounds=bounds,
        drop_outliers=drop_outliers,
    )
    result = tested(result, runs, hold_out or [], laws)
    after = ["", laws.summary()] if laws else []
    also = {"tuning": tuning, **({"laws": laws.table} if laws else {})}
    splits = {"N", "D"} <= {*result.law.variables} and "flops_train" in runs
    splits = splits and not result.not_identified.intersection(EXPONENTS)
    verbs = [*[f"frontier{of_law(law, 'chinchilla')}"] * splits, *["report"] * can_report(runs)]
    given.show(result, verbs, after=after, also=also)


def several(law: str, runs: Runs, y: str) -> Forecaster | None:
    """Weigh the laws where `law` names several or leaves it open."""
    is_one = "," not in law and law.partition(":")[0] != "auto"
    return None if is_one else analysis.forecaster(runs, law=law, y=y)


def tested(result: Fit, runs: Runs, hold_out: list[str], laws: Forecaster | None) -> Fit:
    """Give the fit its held-out tests, and flags of the table."""
    from aimscale.analysis.optimum.isoflop import with_budgets
    from aimscale.analysis.table.select import mixture_flags

    tests, y = [], result.columns["y"]
    for wish in hold_out:
        by, _, count = wish.partition(":")
        if count and not (count.isdecimal() and int(count)):
            raise AnalysisError(f"--hold-out takes N or N:2, not {wish!r}.")
        by_budget = runs.column(by) == runs.column("C") and "C" not in result.law.variables
        rows, by = (with_budgets(runs, y, result.columns), "C") if by_budget else (runs, by)
        test = laws.held_out if laws else analysis.held_out
        tests.append(test(result, rows, by=by, num_values=int(count or 1)))
    cautions = mixture_flags(runs, result.law.variables, y)
    return replace(result, cautions=cautions, heldout=tuple(tests))


@options.verb("y", "columns", "where", "groups", "level", "json")
def forecast(
    given: TableArguments,
    at: Annotated[
        list[str], typer.Option(help="A run's scale, N=1e9,D=2B (and U= where images repeat); may be repeated.")
    ],
    law: Annotated[
        str, typer.Option(help="Laws to average: auto, auto:C (laws of C alone), or names with commas.")
    ] = "auto",
    register: Annotated[
        bool,
        typer.Option(
            "--register",
            help="Save the forecast, with date and hash of the data, in forecasts.jsonl next to the first table.",
        ),
    ] = False,
) -> None:
    """Forecast the loss and every accuracy of runs not trained yet, with intervals that grow with distance."""
    from aimscale.analysis.forecasts.forecast import REGISTER, parse_scale
    from aimscale.analysis.forecasts.forecast import register as write

    runs, y, tuning = given.read_to_minimise()
    result = analysis.forecast(runs, [parse_scale(each, "--at") for each in at], law=law, y=y)
    after = []
    if register:
        first = given.tables[0]
        path = (first if first.is_dir() else first.parent) / REGISTER
        write(result, runs, path)
        after.append(f"registered in {path}")
    is_beyond = result.table["distance"].iloc[-1] > 1  # else `next` has no offer
    farther = is_beyond and {"N", "D"} <= result.scales[-1].keys()
    verbs = [f"next --target {shlex.quote(at[-1])}{of_law(law, 'auto')}"] if farther else ["report"] * can_report(runs)
    given.show(result, verbs, after=after, also={"tuning": tuning})


@options.verb("y", "columns", "where", "groups", "figure", "label", "level", "json", y=options.Minimised)
def frontier(
    given: TableArguments,
    at: Annotated[list[float] | None, typer.Option(help="Budgets in FLOPs to print the optimum for.")] = None,
    law: Annotated[
        str, typer.Option(help="Law of approach 3, as `fit --law` takes it; auto chooses it as `fit` does.")
    ] = "chinchilla",
) -> None:
    """N*(C), D*(C) and the loss on them, and how far the approaches disagree."""
    from aimscale.analysis.table.points import usable_rows
    from aimscale.analysis.table.select import passes_flags

    for flops in at or []:
        if not 0 < flops < math.inf:
            raise AnalysisError(f"--at takes training FLOPs such as 1e18, not {flops:g}.")
    runs, y, tuning = given.read_to_minimise()
    chosen = several(law, runs, y)
    result = analysis.frontier(runs, y=y, law=chosen.law if chosen else law, laws=chosen)
    shown = at or [result.largest_budget, 10 * result.largest_budget]
    optima = result.at(shown)
    c, n, d = result.leading.at(shown).iloc[-1][["C", "N", "D"]]
    passes = passes_flags(usable_rows(runs, y, best_by=y).rows, f"D* = {human(d)} at {human(c)} FLOP", {"D": d})
    result = replace(result, flags=(*result.flags, *passes))
    typed = (f"{name}={human(v) if 1e-3 < v < 1e12 else f'{v:.3g}'}" for name, v in (("N", n), ("D", d)))
    place = [] if result.are_apart else [f"forecast --at {','.join(typed)}{of_law(law, 'chinchilla')}"]
    also = {"optima": optima, "flags": result.cautions, "tuning": tuning}
    given.show(result, [*place, *["report"] * can_report(runs)], words=result.summary(shown), also=also)
