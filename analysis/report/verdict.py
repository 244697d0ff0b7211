"""Summary of the page: trust, what is imprecise, the law, the best split, the forecast, what to run next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from aimscale.analysis.effects.plateau import first_budget_past_plateau
from aimscale.analysis.fitting.covariance import half_width
from aimscale.analysis.fitting.identification import num_values
from aimscale.analysis.fitting.inference import CONFIDENCE
from aimscale.analysis.fitting.result import EXPONENTS, Fit, held_out_cautions
from aimscale.analysis.forecasts.forecaster import DOF, Forecaster
from aimscale.analysis.optimum.approaches import Approaches
from aimscale.analysis.report.study import Study
from aimscale.analysis.table.design import varies
from aimscale.analysis.table.points import passes_flags
from aimscale.analysis.words import human, percent

Colour = Literal["green", "amber", "red"]
MAX_REASONS = 4
"""Doubts told in the summary; the others are flags of the fits below."""
SMALL, SIZED = 1.0, ("scatter", "pattern")
"""Per cent below which flags of these kinds change no decision where left-out scales are predicted."""
HARMLESS = ("factor", "outliers", "tuned", "few_groups")
"""Kinds of flags that never do: a coefficient that its exponent makes up for, points that the objective sets aside, a
choice among rates that biases losses by part of their noise, groups so few that intervals hold some 90 %."""
HEADS = {"green": "Yes", "amber": "With care", "red": "No"}


class Trust(NamedTuple):
    """Judgement of a law."""

    colour: Colour
    reasons: list[str]
    """Why it is that colour."""
    doubts: list[str]
    """What is imprecise, the largest first."""


class Line(NamedTuple):
    """A question of the summary."""

    question: str
    answer: str
    colour: Colour | None = None
    """Trust in the rest; set on the first line only."""


def verdict(study: Study) -> list[Line]:
    """Write the summary, whatever the table allows; each line says so where it has no answer."""
    joint, frontier = study.get("law"), study.get("compute-optimal frontier")
    colour, reasons, doubts = trust(joint, frontier)
    if (num := len(doubts) - MAX_REASONS) > 0:
        doubts[MAX_REASONS:] = [f"{num} more stand{'s' * (num == 1)} below, with the law."]
    lines = [Line("Can it be trusted?", f"{HEADS[colour]}. {' '.join(reasons)}", colour)]
    lines += [Line("What is imprecise", " ".join(doubts))] if doubts else []
    return [
        *lines,
        Line("The law", " ".join(_law(study, joint)) if joint else "None."),
        Line("Best split", _split(study, frontier)),
        Line("Forecast", _forecast(study)),
        Line("What to run next", _next(study, joint)),
    ]


def trust(joint: Fit | None, frontier: Approaches | None) -> Trust:
    """Judge the joint law.

    Red: the law must not be used. Amber: something may change a decision. Green: the law is identified and predicts
    what was left out; what else is known of it is small, and said as what it is.
    """
    if joint is None:
        return Trust("red", ["No joint law of parameters and data could be fitted."], [])
    exponents = [name for name in EXPONENTS if name in joint.params]
    unknown = [p for p in exponents if p in joint.not_identified]
    fatal = [f"{p} is not identified." for p in unknown]
    if joint.heldout and not any(test.is_better for test in joint.heldout):
        fatal.append("A straight line in log-log predicts the left-out scales as well.")
    tests, blind = ([test for test in joint.heldout if test.is_test is sound] for sound in (True, False))
    failures = held_out_cautions(tests or blind) if joint.heldout else ["No scale could be left out to test it."]
    flags = [f for f in joint.flags if not unknown or (f.subject not in unknown and f.kind != "few_values")]
    tiny = [f for f in flags if f.kind in HARMLESS or (f.kind in SIZED and abs(f.number) < SMALL)]
    small = [] if failures else tiny
    cautions = [*failures, *map(str, frontier.flags if frontier else ()), *(str(f) for f in flags if f not in small)]
    doubts = [*cautions, *held_out_cautions(blind if tests else ()), *map(str, small)]
    if fatal:
        return Trust("red", fatal, doubts)
    named = f"{' and '.join(exponents)} {'is' if len(exponents) == 1 else 'are'} identified."
    return Trust("amber" if cautions else "green", [named], doubts)


def _law(study: Study, joint: Fit) -> Iterator[str]:
    values = ", ".join(joint.equation(name, name) for name in (*EXPONENTS, "E") if name in joint.params)
    yield f"{joint.law.formula}, fitted to {joint.num_points} of {joint.num_rows} rows{study.whose}: {values}."
    if laws := study.get("forecaster"):
        yield from beside_others(laws)
    yield f"Learning rates: {study.tuning}."


def beside_others(laws: Forecaster) -> Iterator[str]:
    """Say why this law is the page's: it predicted better in every backtest, or nothing tells the laws apart."""
    name, first = laws.law.name, next(iter(laws.curves))
    alike = [law for law in laws.curves if law != name and not laws.is_better(name, law)]
    if name != first:
        num = len(laws.backtests)
        tests = f"each of its {num} backtests" if num > 1 else "its one backtest"
        yield f"In {tests} it predicted the table's larger runs better than the {first} law."
    if alike:
        how = "Backtests" if laws.is_tested else "A table too small for backtests"
        yield f"{how} cannot tell it apart from {', '.join(alike)}."


def _split(study: Study, found: Approaches | None) -> str:
    if found is None:
        why = "no approach is possible" if "flops_train" in study.usable else "the table has no training FLOPs"
        return f"Not known: {why}."
    top, best = found.largest_budget, found.frontiers[-1]
    at = best.at(top).iloc[0]
    n, n_lo, n_hi, d = (human(at[name]) for name in ("N", "N_lo", "N_hi", "D"))
    law = f" on the {best.law.law.name} law" if best.law else ""
    several = len(found.frontiers) > 1
    exponents = [f"C^{f.exponent_words()}{f' (approach {f.approach})' * several}" for f in found.frontiers]
    apart = [f"There they differ by a factor of {human(found.disagreement(top), 2)} in N."] * several
    parts = [
        f"At {human(top)} FLOP: N = {n} [{n_lo}, {n_hi}], D = {d}, by approach {best.approach}{law}.",
        f"N grows as {', '.join(exponents)}.",
        *apart,
        *map(str, passes_flags(study.usable, "This D", {"D": at["D"]})),
    ]
    return " ".join(parts)


def _forecast(study: Study) -> str:
    if (found := study.get("forecast")) is None:
        return "None without a law."
    parts, repeats = list[str](), list[str]()
    for row in found.table[found.table["quantity"] == "val_loss"].to_dict("records"):
        n, d = human(row["N"]), human(row["D"])
        parts.append(
            f"At N = {n}, D = {d} ({human(row['distance'])} times beyond the table) a loss of {human(row['value'], 4)} "
            f"[{human(row['pi_lo'], 4)}, {human(row['pi_hi'], 4)}]."
        )
        repeats += map(str, passes_flags(study.usable, f"D = {d}", {"D": row["D"]}))
    return " ".join([*parts, f"Intervals: {percent(CONFIDENCE)}, of one run.", *repeats])


def _next(study: Study, joint: Fit | None) -> str:
    """Name the first thing that the table lacks."""
    if joint is None:
        return "A grid of at least three sizes by three budgets, each with a validation loss."
    for v, other, names, noun in (("N", "D", ("alpha", "aN"), "sizes"), ("D", "N", ("beta", "aD"), "budgets")):
        for name in joint.not_identified.intersection(names):
            if (larger := first_budget_past_plateau(study.usable)) is not None:
                return f"Larger data, from {human(larger)} images on: before, losses are on the first plateau."
            (low, high), num = joint.ranges[v], num_values(joint.data[v].to_numpy())
            return (
                f"More {noun}: {name} is not identified by {num} of them over a factor of {human(high / low)}. "
                f"At the largest {other}, go on below {human(low)} or beyond {human(high)}."
            )
    words = "A run beyond the largest one: no smaller run narrows its forecast for less."
    if (proposal := study.get("next runs")) is not None:
        runs = [f"N = {human(n)} on D = {human(d)}" for n, d in proposal.table[["N", "D"]].to_numpy(float)]
        more = f" and {len(runs) - 4} more" if len(runs) > 4 else ""
        at = ", ".join(f"{v} = {human(value)}" for v, value in proposal.target.items())
        before, after = (float(half_width(sd, DOF, CONFIDENCE)) for sd in (proposal.sd_before, proposal.sd_after))
        words = (
            f"{'; '.join(runs[:4])}{more}. For {50 * proposal.price / proposal.budget:.0f} % of the cost of a run at "
            f"{at}, they narrow its forecast from ±{percent(before)} to ±{percent(after)} (95 %)."
        )
    if "seed" in study.usable and not varies(study.usable["seed"]):
        smallest = human(joint.ranges["N"][0])
        words += f" Add a second seed of the cheapest size ({smallest} parameters), to tell noise from misfit."
    return words
