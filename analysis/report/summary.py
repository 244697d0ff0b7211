"""Opening of the page: the findings beside their figures, how far to trust them, what follows from the law."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal, NamedTuple

import pandas as pd

from aimscale.analysis.display import capital, human, p_value, percent, scale_words
from aimscale.analysis.fitting.covariance import CONFIDENCE, half_width
from aimscale.analysis.fitting.diagnostics import num_values
from aimscale.analysis.fitting.held_out import EXPONENTS, HeldOut
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.forecasts.forecaster import DOF, Forecaster
from aimscale.analysis.laws import PLATEAU_STEPS
from aimscale.analysis.optimum.approaches import Approaches
from aimscale.analysis.report.blocks import PageFigure, feature_finding
from aimscale.analysis.report.study import Study
from aimscale.analysis.table.schema import varies
from aimscale.analysis.table.select import passes_flags
from aimscale.analysis.tuning.result import ONE_RATE

MAX_DOUBTS = 4
"""Further cautions told in the summary; the others are flags of the fits below."""
SCALES = {"N": "size", "D": "amount of data", "C": "compute"}
"""Variable -> its name in a sentence."""
FALLS_WITH = {"alpha": "size", "aN": "size", "beta": "the amount of data", "aD": "the amount of data"}
"""Exponent -> what loss falls with by it."""
Colour = Literal["green", "amber", "red"]
HEADS = {"green": "Yes", "amber": "With caution", "red": "No"}
PRECISE = 4.0
"""Ends of an exponent's interval that differ by less know it within a factor of 2 on either side."""
ALARM = 0.05
"""Probability of a false alarm of a fact, over all its tests."""
TOLD_APART = ("scatter", "pattern", "factor", "few_values", "reaches_bound")
"""Kinds of flags that the three facts tell, or that concern a coefficient, for which its exponent makes up."""
HARMLESS = ("outliers", "tuned")
"""Kinds of other flags that may stand beside "Yes": points that the objective sets aside, and a choice among rates."""


class Line(NamedTuple):
    """A question of the summary."""

    question: str
    answer: str
    colour: Colour | None = None
    """Trust in the rest; set on the first line only."""


def findings(study: Study) -> list[PageFigure]:
    """Give the findings that the tables allow: of the law, and of loss and features."""
    figures = [_law_finding(law, study.whose)] if (law := study.get("law")) else []
    return figures if (features := feature_finding(study)) is None else [*figures, features]


def _law_finding(law: Fit, whose: str) -> PageFigure:
    """Tell how the largest scales are predicted when they are left out, and how a straight line fares."""
    told = [_beside_line(test) for test in law.heldout if test.is_test]
    told = told or [f"One law of {law.num_points} points, which nothing that was left out tests"]
    details = [f"{each}." for each in told[1:]]
    details += [f"{_beside_line(test)}; that hardly tests it." for test in law.heldout if not test.is_test]
    details += [f"The figure shows the law of all rows{whose}, {law.law.formula}, with its 95 % interval."]
    return PageFigure("loss-N", told[0], " ".join(details), partial(law.plot, x="N"))


def _beside_line(test: HeldOut) -> str:
    law, line = percent(test.mean_abs_relative_error), percent(test.naive_mean_abs_relative_error)
    start = (
        f"Fitted without the largest {SCALES.get(test.variable, test.variable)}, the law predicts its loss with a mean "
    )
    return f"{start}error of {law}, a straight line with {line}"


def verdict(study: Study) -> list[Line]:
    """Write the summary, whatever the table allows; each line says so where it has no answer."""
    joint, frontier = study.get("law"), study.get("compute-optimal frontier")
    judged, still_open = trust(joint, frontier), unfinished(study)
    head = f"Not yet. {still_open} So far" if still_open else HEADS[judged.colour]
    colour: Colour = "amber" if still_open else judged.colour
    lines = [Line("Can it be trusted?", f"{head}: {judged.answer}", colour)]
    lines += [Line(fact.question, fact.answer) for fact in judged.facts]
    doubts, num = judged.doubts[:MAX_DOUBTS], len(judged.doubts) - MAX_DOUBTS
    doubts += [f"{num} more stand{'s' * (num == 1)} below, with the law."] * (num > 0)
    lines += [Line("Further cautions", " ".join(doubts))] * bool(doubts)
    return [
        *lines,
        Line("The law", " ".join(_law(study, joint)) if joint else "None."),
        Line("Compute-optimal", _split(study, frontier)),
        Line("Forecast", _forecast(study)),
        Line("What to run next", "The rest of the sweep." if still_open else _next(study, joint)),
    ]


def unfinished(study: Study) -> str:
    """Say how much of the sweeps is still to come; empty where all runs are there, or the table is of no sweep."""
    rows = study.frame
    if not {"run_id", "status", "schema_version"} <= {*rows}:
        return ""
    is_open, is_there = (rows["status"] == status for status in ("unfinished", "complete"))
    if not (num_open := is_open.groupby(rows["run_id"]).any().sum()):
        return ""
    num_rows = f"{is_there.sum()} of {len(rows)} rows {'is' if is_there.sum() == 1 else 'are'} there"
    return f"{num_open} of {rows['run_id'].nunique()} runs have not finished: {num_rows}."


def _law(study: Study, joint: Fit) -> Iterator[str]:
    values = ", ".join(joint.equation(name, name) for name in (*EXPONENTS, "E") if name in joint.params)
    yield f"{joint.law.formula}, fitted to {joint.num_points} of {joint.num_rows} rows{study.whose}: {values}."
    if laws := study.get("forecaster"):
        yield from beside_others(laws)
    yield f"{capital(study.tuning)}." if study.tuning == ONE_RATE else f"Learning rates: {study.tuning}."


def beside_others(laws: Forecaster) -> Iterator[str]:
    """Say why this law is the page's: it predicted better in every backtest, or nothing tells the laws apart."""
    name, first = laws.law.name, next(iter(laws.fits))
    if name != first:
        num = len(laws.backtests)
        tests = f"each of its {num} backtests" if num > 1 else "its one backtest"
        yield f"In {tests} it predicted the table's larger runs better than the {first} law."
    if alike := [law for law in laws.fits if law != name and not laws.is_better(name, law)]:
        how = "In backtests" if laws.is_tested else "Untested, as the table is too small for backtests,"
        yield f"{how} it fits no better than {', '.join(alike)}."


def _split(study: Study, approaches: Approaches | None) -> str:
    if approaches is None:
        return "Not known: no approach is possible."
    d = approaches.leading.at(approaches.largest_budget)["D"].iloc[0]
    return " ".join([approaches.headline(), *map(str, passes_flags(study.usable, "This D", {"D": d}))])


def _forecast(study: Study) -> str:
    if (forecast := study.get("forecast")) is None:
        return "None without a law."
    passes = [flag for at in forecast.scales for flag in passes_flags(study.usable, f"D = {human(at['D'])}", at)]
    by = f"By {dict(forecast.loss.facts())['laws']}, weighted by backtests."
    return " ".join(
        [forecast.headline(), by, f"Intervals are {percent(CONFIDENCE)}, for one new run.", *map(str, passes)]
    )


def _next(study: Study, joint: Fit | None) -> str:
    """Name the first thing that the table lacks."""
    if joint is None:
        return "A grid of at least three sizes by three budgets, each with a validation loss."
    for v, other, names, noun in (("N", "D", ("alpha", "aN"), "sizes"), ("D", "N", ("beta", "aD"), "budgets")):
        for name in joint.not_identified.intersection(names):
            if larger := _past_plateau(study.usable.frame):
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
        before, after = (float(half_width(sd, DOF)) for sd in (proposal.sd_before, proposal.sd_after))
        words = (
            f"{'; '.join(runs[:4])}{more}. For {50 * proposal.price / proposal.budget:.0f} % of the cost of a run at "
            f"{scale_words(proposal.target, 3)}, the expected half-width of its forecast "
            f"is {percent(after)}, now {percent(before)} (95 %)."
        )
    if "seed" in study.usable and not varies(study.usable["seed"]):
        smallest = human(joint.ranges["N"][0])
        words += f" Add a second seed of the cheapest size ({smallest} parameters), to tell noise from misfit."
    return words


def _past_plateau(rows: pd.DataFrame) -> float:
    """Return the images from which rows of our sweeps lie past the first plateau; 0 where all do, or nothing tells."""
    if not {"run_id", "images_seen", "batch_size"} <= {*rows}:
        return 0.0
    needed = PLATEAU_STEPS * rows["batch_size"].astype(float)
    return float(needed.where(rows["images_seen"] < needed, 0.0).max())


class Fact(NamedTuple):
    """One of the three facts: what it says, and what of it speaks against the law."""

    question: str
    answer: str
    against: list[str]


class Trust(NamedTuple):
    """Judgement of a law."""

    colour: Colour
    answer: str
    facts: list[Fact]
    doubts: list[str]
    """Further cautions."""


def trust(joint: Fit | None, frontier: Approaches | None) -> Trust:
    """Judge the joint law by three facts, each with its number.

    Green: its exponents are precise, it predicts the largest size and the largest amount of data within their noise,
    no misfit is seen beyond noise, and no other flag such as two experiments in one table, or too few budgets to tell
    what their points share, speaks against it. Amber: one of these fails or was not tested. Red: an exponent is not
    identified, or a straight line predicts whatever was left out as well.
    """
    if joint is None:
        return Trust("red", "no joint law of parameters and data could be fitted.", [], [])
    facts = [precision(joint), prediction(joint), misfit(joint)]
    unknown = {name: FALLS_WITH.get(name, "compute") for name in _exponents(joint) if name in joint.not_identified}
    fatal = [f"how loss falls with {of} cannot be told ({name} is not identified)" for name, of in unknown.items()]
    if joint.heldout and not any(test.is_better for test in joint.heldout):
        fatal.append("a straight line in log-log predicts the left-out scales as well")
    flags = [f for f in joint.flags if f.kind not in TOLD_APART]
    cautions, harmless = ([str(f) for f in flags if (f.kind in HARMLESS) is kind] for kind in (False, True))
    doubts = [*map(str, frontier.flags if frontier else ()), *harmless]
    if fatal:
        return Trust("red", f"{'; '.join(fatal)}.", facts, [*cautions, *doubts])
    against = [each for fact in facts for each in fact.against]
    if against or cautions:
        return Trust("amber", " ".join([f"{'; '.join(against)}."] * bool(against) + cautions), facts, doubts)
    passed = "the exponents are precise, what was left out is predicted within its noise, and no misfit is seen."
    return Trust("green", passed, facts, doubts)


def _exponents(joint: Fit) -> list[str]:
    return [name for name in EXPONENTS if name in joint.params]


def precision(joint: Fit) -> Fact:
    """Say within which factor each exponent is known."""
    told, against = list[str](), list[str]()
    for name in _exponents(joint):
        ends = joint.intervals.get(name)
        if name in joint.not_identified:
            told.append(f"{name} is not identified")
        elif ends is not None and ends.is_known:
            factor = ends.high / ends.low if ends.low > 0 else float("inf")
            verb = "of" if told and "factor" in told[-1] else "is known within a factor of"
            told.append(f"{name} {verb} {human(factor, 2)}")
            against += [f"{name} is imprecise"] * (not factor <= PRECISE)
    return Fact("How precise", f"{', '.join(told)}.", against)


def prediction(joint: Fit) -> Fact:
    """Say how what was left out was predicted, against its noise and against a straight line."""
    tests = {test.variable: test for test in joint.heldout}
    told, against = [_predicted(test) for test in joint.heldout], list[str]()
    for v in [] if "C" in tests else sorted({"N", "D"}.intersection(joint.law.variables).difference(tests)):
        told.append(f"No {SCALES[v]} could be left out.")
        against.append(f"{SCALES[v]} was not tested")
    for v, test in tests.items():
        name = f"the largest {SCALES.get(v, v)}"
        if not test.is_test:
            against.append(f"{name} was not tested")
        elif not test.is_better:
            against.append(f"a straight line predicts {name} as well")
        elif test.p < ALARM / len(tests):
            against.append(f"{name} was missed by more than its noise")
    return Fact("How it predicts", " ".join(told), against)


def _predicted(test: HeldOut) -> str:
    v, law, line = test.variable, *map(percent, (test.mean_abs_relative_error, test.naive_mean_abs_relative_error))
    sds = abs(test.mean_error) / max(test.mean_error_sd, 1e-300)
    start = f"Fitted without the largest {SCALES.get(v, v)}, the law predicts its loss with a mean error of {law}"
    start += f" (a straight line: {line})"
    if not test.is_test:
        return f"{start}, but {' and '.join(sorted(test.not_identified))} are not identified then: no test."
    return f"{start}; on average {human(sds, 2)} standard deviations of noise off ({p_value(test.p)})."


def misfit(joint: Fit) -> Fact:
    """Say how far the law is off beyond noise: in its form, and for each size and each amount of data."""
    if not joint.misfits:
        return Fact("How far off", "Lack of fit was not tested.", ["lack of fit was not tested"])
    told, against = list[str](), list[str]()
    for test in joint.misfits:
        name = {"form": "points", "N": "sizes", "D": "budgets"}.get(test.subject, test.subject)
        along = f" along {test.follows}" if test.follows else ""
        told.append(f"{name}{along} {test.words()}")
        if test.p < ALARM / len(joint.misfits):
            against.append(f"{name} lie {test.off:.2g} % off the law{along}")
    return Fact("How far off", f"Lack of fit beyond noise: {'; '.join(told)}.", against)
