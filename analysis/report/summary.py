"""Opening of the page: the findings beside their figures, how far to trust them, what follows from the law."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal, NamedTuple

import pandas as pd

from aimscale import analysis
from aimscale.analysis.accuracy.correlation import Correlation, Correlations
from aimscale.analysis.fitting.covariance import CONFIDENCE, half_width
from aimscale.analysis.fitting.identification import num_values
from aimscale.analysis.fitting.result import EXPONENTS, Fit, held_out_cautions
from aimscale.analysis.forecasts.forecaster import DOF, Forecaster
from aimscale.analysis.laws.base import PLATEAU_STEPS
from aimscale.analysis.optimum.approaches import Approaches
from aimscale.analysis.published.comparison import ADAPTED, PROTOCOL, TASKS, best_frozen, read_baselines, table6
from aimscale.analysis.report.blocks import PageFigure
from aimscale.analysis.report.study import CORRELATION, LINK, Study
from aimscale.analysis.table.design import varies
from aimscale.analysis.table.points import passes_flags
from aimscale.analysis.words import PROBES, accuracy_of, human, percent, scale_words

SCALES = {"N": "size", "D": "amount of data", "C": "compute"}
"""Variable -> its name in a sentence."""
PIXELS = "raw-pixels"
"""The baseline that stands in the sentence: what features are made of."""
Colour = Literal["green", "amber", "red"]
HEADS = {"green": "Yes", "amber": "With caution", "red": "No"}
MAX_REASONS = 4
"""Doubts told in the summary; the others are flags of the fits below."""
SMALL, SIZED = 1.0, ("scatter", "pattern")
"""Per cent below which flags of these kinds change no decision where left-out scales are predicted."""
HARMLESS = ("outliers", "tuned", "few_groups")
"""Kinds of flags that never do: points that the objective sets aside, a choice among rates that biases losses by part
of their noise, groups so few that intervals hold 85 to 92 %."""
COEFFICIENT = "factor"
"""Kind of flag that the summary leaves to the fits below: an imprecise coefficient, for which its exponent makes up."""


class Trust(NamedTuple):
    """Judgement of a law."""

    colour: Colour
    reasons: list[str]
    """Why it is that colour."""
    doubts: list[str]
    """Imprecise parts, the most serious first."""


class Line(NamedTuple):
    """A question of the summary."""

    question: str
    answer: str
    colour: Colour | None = None
    """Trust in the rest; set on the first line only."""


def findings(study: Study) -> list[PageFigure]:
    """Give the findings that the tables allow: of the law, and of loss and features."""
    found = [_law_finding(law, study.whose)] if (law := study.get("law")) else []
    kind = next((kind for kind in study.kinds if study.by_task(CORRELATION, kind)), None)
    return found if kind is None else [*found, _feature_finding(study, kind)]


def _law_finding(law: Fit, whose: str) -> PageFigure:
    """Tell how the largest scales are predicted when they are left out, and how a straight line fares."""
    told = [
        f"the largest {SCALES.get(test.variable, test.variable)} is predicted to "
        f"{percent(test.mean_abs_relative_error)}; a straight line misses by "
        f"{percent(test.naive_mean_abs_relative_error)}"
        for test in law.heldout
    ]
    sentence = f"Left out, {told[0]}" if told else f"One law of {law.num_points} points, tested on none"
    details = [f"Left out, {each}." for each in told[1:]]
    details += [f"The figure shows the law of all rows{whose}, {law.law.formula}, with its 95 % interval."]
    return PageFigure("loss-N", sentence, " ".join(details), partial(law.plot, x="N"))


def _feature_finding(study: Study, kind: str) -> PageFigure:
    """Tell how loss and accuracy go together by task, first where lower loss is better, and where raw pixels stand."""
    found, probes = study.by_task(CORRELATION, kind), study.probes.dropna(subset="top1")
    rows = {task: probes[(probes["kind"] == kind) & (probes["task"] == task)] for task in found}
    beside = {task: levels(study, kind, rows[task]) for task in found}
    leading = {task: _leading(each) for task, each in found.items()}

    def reached(task: str) -> str:
        level = beside[task].set_index("name")["top1"]
        pixels = f"; raw pixels give {percent(level[PIXELS])}" if PIXELS in level else ""
        return f"{percent(rows[task]['top1'].max())} at best{pixels}"

    task, *others = sorted(found, key=lambda task: not (leading[task].is_significant and leading[task].value < 0))
    first = leading[task]
    pearson = [c for c in found[task] if c.method == first.method]
    details = [f"The {accuracy_of(kind)} is {reached(task)}."]
    details += [f"Both follow compute; {_shown(c)}, {c.verdict}." for c in pearson if c.partial_on and c is not first]
    details += [f"On {each} {_shown(leading[each])}, {reached(each)}." for each in others]
    links = {name: each for name, each in study.by_task(LINK, kind).items() if name == task}
    draw = partial(analysis.plot_loss_accuracy, rows[task], {task: pearson}, links, beside[task])
    return PageFigure("finding-accuracy", feature_words(kind, task, first), " ".join(details), draw)


def feature_words(kind: str, task: str, found: Correlation) -> str:
    """Say whether lower loss goes with higher accuracy of a kind on a task."""
    better = "better features" if kind in PROBES and kind != ADAPTED else "higher accuracy"
    told = f"Lower loss, {better if found.value < 0 else 'LOWER accuracy'}"
    is_known = found.is_significant and found.chance is None  # nothing is above guessing otherwise
    told = told if is_known else f"Not known whether lower loss means {better}"
    return f"{told}: {_shown(found)} on {task}"


def _leading(found: Correlations) -> Correlation:
    """Choose the coefficient to tell: Pearson's at equal compute where that is significant, else over all rows."""
    pearson = [c for c in found if c.method == "pearson"]
    return next((c for c in pearson if c.is_significant), pearson[-1])


def _shown(c: Correlation) -> str:
    return f"{'at equal compute ' * bool(c.partial_on)}r = {c.value:.2f} [{c.low:.2f}, {c.high:.2f}]"


def levels(study: Study, kind: str, rows: pd.DataFrame) -> pd.DataFrame:
    """List what accuracies of a kind may be compared with: the table's own baselines, and on its tasks the paper."""
    same, theirs = rows[["task", "n"]].drop_duplicates(), read_baselines(study.frame)
    theirs = theirs[theirs["kind"].eq(kind) & (kind != ADAPTED)].rename(columns={"size": "name"})
    own = theirs.merge(same, on=["task", "n"]).reindex(columns=["task", "name", "top1"])
    own = own.drop_duplicates(["task", "name"]).sort_values("top1")
    paper = [
        {"task": task, "name": f"{key}, published", "top1": table6().loc[key, task]}
        for task in (same["task"].unique() if kind == PROTOCOL and study.is_ours else ())
        if task in TASKS
        for key in dict.fromkeys(("aim-7B", best_frozen(task)))
    ]
    return pd.concat([own, pd.DataFrame(paper, columns=own.columns)], ignore_index=True)


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
        Line("Compute-optimal", _split(study, frontier)),
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
    flags = [f for f in joint.flags if f.kind != COEFFICIENT]
    flags = [f for f in flags if not unknown or (f.subject not in unknown and f.kind != "few_values")]
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
    if name != first:
        num = len(laws.backtests)
        tests = f"each of its {num} backtests" if num > 1 else "its one backtest"
        yield f"In {tests} it predicted the table's larger runs better than the {first} law."
    if alike := [law for law in laws.curves if law != name and not laws.is_better(name, law)]:
        how = "Backtests" if laws.is_tested else "A table too small for backtests"
        yield f"{how} cannot tell it apart from {', '.join(alike)}."


def _split(study: Study, found: Approaches | None) -> str:
    if found is None:
        why = "no approach is possible" if "flops_train" in study.usable else "the table has no training FLOPs"
        return f"Not known: {why}."
    d = found.frontiers[-1].at(found.largest_budget)["D"].iloc[0]
    return " ".join([found.headline(), *map(str, passes_flags(study.usable, "This D", {"D": d}))])


def _forecast(study: Study) -> str:
    if (found := study.get("forecast")) is None:
        return "None without a law."
    passes = [flag for at in found.scales for flag in passes_flags(study.usable, f"D = {human(at['D'])}", at)]
    return " ".join([found.headline(), f"Intervals are {percent(CONFIDENCE)}, for one new run.", *map(str, passes)])


def _next(study: Study, joint: Fit | None) -> str:
    """Name the first thing that the table lacks."""
    if joint is None:
        return "A grid of at least three sizes by three budgets, each with a validation loss."
    for v, other, names, noun in (("N", "D", ("alpha", "aN"), "sizes"), ("D", "N", ("beta", "aD"), "budgets")):
        for name in joint.not_identified.intersection(names):
            if larger := _past_plateau(study.usable):
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
            f"{scale_words(proposal.target, 3)}, they narrow its forecast from ±{percent(before)} to "
            f"±{percent(after)} (95 %)."
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
