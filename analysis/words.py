"""Flags of a fit, and how fits, flags and held-out tests read: the one place where what was found becomes sentences."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aimscale.analysis.errors import option

if TYPE_CHECKING:
    from aimscale.analysis.fitting.result import Fit, HeldOut

NOT_IDENTIFIED = "not identified"
UNITS = {
    "params_total": "all parameters, head included",
    "params_trunk": "parameters of the backbone",
    "params_head": "parameters of the pixel head",
    "images_seen": "images seen, repeats counted",
    "unique_images": "different images in the training pool",
    "flops_train": "training FLOPs as counted (attention and head included)",
    "flops_6nd": "training FLOPs as 6 N D",
}
"""What a column of the results table counts."""
FLAGS = {
    "lower_bound": "{subject} lies on its lower bound {number:g}.",
    "upper_bound": "{subject} lies on its upper bound {number:g}.",
    "reaches_bound": "{subject} is not identified: its interval reaches the bound {number:g}.",
    "few_values": "{more[0]} do not identify {subject}, whatever the noise; measure more, or hold one by {option:fix}.",
    "from_above": "{subject} is known from above only: the data allow any value from 0 to {count}.",
    "factor": "{subject} is known only within a factor of {number:.3g}.",
    "rival": "Other parameters fit as well within the noise: their log-likelihood is {number:.2g} lower.",
    "narrow": "{subject} varies only by a factor of {number:.3g}, so its exponent is hardly tested.",
    "one_variable": "{subject} grow in one proportion, so neither exponent is identified.",
    "collinear": "{subject} grow together (correlation of logarithms {number:.3f}), so their exponents trade off.",
    "outliers": "{number:.0f} points lie beyond {more[0]:g} robust standard deviations (farthest: row {subject}).",
    "unseen": "Too few {subject} to estimate the error that all points of one share; the intervals assume none.",
    "few_groups": "{number:.0f} {subject} hardly tell an error that all points of one share: where there is one, 95 % "
    "intervals hold some 90 %.",
    "scatter": "The points lie {number:.2g} % off the law, more than repeated runs differ ({p}).",
    "pattern": "The points lie {number:.2g} % off the law, and the misfit follows {subject} ({p}).",
    "off": "{more[0]} {subject} lies {number:+.2g} % off the law fitted without it ({more[1]:.2g} standard "
    "deviations).",
    "experiments": "Rows of different {subject} lie up to {number:.2g} % apart ({p}), so they are not of one law; "
    "choose one by {option:where}.",
}
"""Kind of a flag -> its sentence."""


class _Option:
    def __format__(self, words: str) -> str:
        return option(*words.split(" ", 1))


OPTION = _Option()
"""Names an option in a template: `{option:where status=complete}`."""


@dataclass(frozen=True, kw_only=True)
class Flag:
    """Something to be careful about in a result."""

    kind: str
    """Which of `FLAGS`."""
    subject: str = ""
    """The parameter, variable, group or row that it is about."""
    number: float = 0.0
    """How much: a bound, a factor, per cent, standard deviations."""
    more: tuple[float | str, ...] = ()
    """What else the sentence tells."""
    p: float = 1.0
    """Probability that a sound law shows as much, where that was tested."""
    text: str = ""
    """Its sentence, written where it is raised."""

    def __str__(self) -> str:
        if self.text:
            return self.text
        told = {"subject": self.subject, "number": self.number, "more": self.more, "p": p_value(self.p)}
        told["count"] = human(self.number, 4)
        return FLAGS[self.kind].format(**told, option=OPTION)


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SI = ((1e9, "B"), (1e6, "M"), (1e3, "k"))


def human(value: float, digits: int = 3) -> str:
    """A count as people say it: 27.6k, 1.21M, 6.44B; beyond that, and below 0.001, a power of ten."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1e12 or 0 < size < 1e-3:
        return power_of_ten(value, digits)
    for scale, letter in _SI:
        if size >= scale * 0.9995:
            return f"{float(f'{value / scale:.{digits}g}'):.{max(digits, 6)}g}{letter}"
    return f"{float(f'{value:.{digits}g}'):.{max(digits, 6)}g}"


def power_of_ten(value: float, digits: int = 2) -> str:
    """A number of FLOPs: 3×10¹³."""
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPT)
    return power if mantissa == "1" else f"{mantissa}×{power}"


def percent(share: float, digits: int = 2) -> str:
    """A fraction as per cent."""
    return f"{human(100 * share, digits)} %"


def p_value(p: float) -> str:
    """A probability of chance; digits of a tiny one say nothing."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.1g}"


NEAR = 0.55
"""Likeness from which a name may be the one that was meant."""


def did_you_mean(typed: str, names: Iterable[str], otherwise: str) -> str:
    """The names that resemble one that does not exist, the nearest first; else some of all."""
    lower = typed.lower()
    score = {n: difflib.SequenceMatcher(None, lower, n.lower()).ratio() for n in names}
    known = sorted(score, key=lambda n: -score[n])
    near = [n for n in known if score[n] >= NEAR or (len(lower) > 2 and lower in n.lower())]
    return f"did you mean {' or '.join(near[:3])}?" if near else f"{otherwise} {some(known)}."


MAX_NAMED = 5
"""Names that a sentence lists at most."""


def some(names: Sequence[str]) -> str:
    """`MAX_NAMED` of the names at most, and how many more there are."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{', '.join(names[:MAX_NAMED])}{more}"


def refusal_words(flags: Sequence[Flag]) -> str:
    """Why amounts of compute were refused, and how many for each reason."""
    counts = Counter(map(str, flags))
    return ", ".join(f"{why} ({num})" for why, num in counts.items())


def said_once(flags: Iterable[Flag]) -> tuple[Flag, ...]:
    """Drop flags that say less than another one: that rows differ in a column, where they are known to lie apart."""
    flags = tuple(dict.fromkeys(flags))
    apart = {flag.subject for flag in flags if flag.kind == "experiments"}
    return tuple(flag for flag in flags if not (flag.kind == "mixed" and flag.subject in apart))


def flag_words(flags: Sequence[Flag]) -> list[str]:
    """Flags in words; of more than three that differ in their number alone, the first and how many follow."""
    words = []
    for kind, subject in dict.fromkeys((flag.kind, flag.subject) for flag in flags):
        alike = [str(flag) for flag in flags if (flag.kind, flag.subject) == (kind, subject)]
        words += alike if len(alike) <= 3 else [f"{alike[0]} (and {len(alike) - 1} more)"]
    return words


def kind_name(kind: str) -> str:
    """A kind of probe in a table: LoRA is none, because it adapts the backbone."""
    return "LoRA (not frozen)" if kind == "lora" else kind


PROBES = ("attentive", "efficient", "linear", "knn", "lora")
"""Kinds of accuracy that are probes of ours; a foreign table has kinds of its own, such as zero-shot."""


def measured_by(kind: str) -> str:
    """A kind of accuracy behind the name of its task."""
    return f"{kind} probe" if kind in PROBES else f"{kind} accuracy".strip()


def accuracy_of(kind: str, of: str = "accuracy") -> str:
    """What a kind of accuracy (or of error) is, in prose."""
    if kind == "lora":
        return f"{of} after LoRA adaptation (not frozen)"
    return f"{'k-NN' if kind == 'knn' else kind}-probe {of}" if kind in PROBES else f"{kind} {of}"


def interval_words(fit: Fit) -> str:
    """How a fit's intervals were found."""
    counts = {**fit.estimate.groups.counts, "points": fit.num_points}
    over = " and ".join(f"{counts[name]} {name}" for name in fit.estimate.covariance.by)
    return f"cluster-robust (CR2, Bell-McCaffrey) over {over}"


ASSUMED = "they take the law for true: on public tables, 3 to 100 times beyond, those of one law hold some 80 % of runs"
"""Caution about predictions by one law, from backtests on the public tables of docs/forecasts.md."""


def fit_facts(fit: Fit) -> Iterator[tuple[str, str]]:
    """Collect all but the parameters: held-out errors, flags, the law, what its variables count, rows, ranges,
    objective, intervals; the checklist is that of (Mis)fitting (Li et al. 2025).
    """
    yield from ((f"held out {test.variable}", held_out_words(test)) for test in fit.heldout)
    yield from (("with care", each) for each in (*flag_words(fit.flags), *held_out_cautions(fit.heldout)))
    yield from (
        ("test", f"F = {f.more[0]:.3g} with {f.more[1]:.0f} and {f.more[2]:.0f} degrees of freedom ({p_value(f.p)})")
        for f in fit.flags
        if f.kind in ("scatter", "pattern")
    )
    yield "law", fit.law.formula
    names = {"L": variable_words(fit, "y"), **{v: variable_words(fit, v) for v in fit.law.variables}}
    if other := [f"{letter} = {name}" for letter, name in names.items() if letter != name]:
        yield "columns", ", ".join(other)
    yield "rows", f"{fit.num_points} of {fit.num_rows}"
    yield from [("left out", "; ".join(map(str, fit.exclusions)))] if fit.exclusions else []
    yield from ((f"range {v}", f"{human(low)} to {human(high)}") for v, (low, high) in fit.ranges.items())
    delta = f" with delta {human(fit.objective.delta)}" if fit.objective.robust else ""
    residuals = f"{'Huber losses' if delta else 'squares'} of {'log ' if fit.objective.log else ''}residuals"
    yield "objective", f"{fit.objective.name}: sum of {residuals}{delta}, {human(fit.objective_value, 4)}"
    assumed = f"; {ASSUMED}" if "L" not in fit.law.variables else ""
    yield "intervals", f"95 %, {interval_words(fit)}{assumed}" if fit.intervals else "none"
    yield from [] if fit.heldout else [("held out", "nothing")]


def variable_words(fit: Fit, variable: str) -> str:
    """What a variable (or "y") is: their name in a foreign table, ours with what it counts in a results table."""
    column = fit.columns[variable]
    name = fit.names.get(column, column)
    return f"{name} ({UNITS[column]})" if fit.loss_unit and name == column and column in UNITS else name


def held_out_words(test: HeldOut) -> str:
    """Error on the held-out scale beside the naive baseline."""
    names = ", ".join(sorted(test.not_identified))
    unknown = f"; not identified without them: {names}" if names else ""
    verdict = "better" if test.is_better else "no better"
    return (
        f"mean error {percent(test.mean_abs_relative_error, 3)} on {test.num_test} points, {verdict} than a straight "
        f"line in log-log ({percent(test.naive_mean_abs_relative_error, 3)}); {test.num_inside} of {test.num_test} "
        f"inside their prediction intervals; fitted to the {test.num_train} below {test.variable} = "
        f"{human(min(test.values))}{unknown}"
    )


EXPONENTS = ("alpha", "beta", "aN", "aD", "h")
"""Exponents of N and D in the joint laws: Chinchilla's and its kin, Kaplan's, and that of laws of D / N."""


def held_out_cautions(tests: Iterable[HeldOut]) -> Iterator[str]:
    """Say what held-out scales speak against a law.

    The points of one scale may all err alike, by what too few scales hardly tell: so only most of them, twice as far
    off as their intervals reach, are an alarm. Of sound tables of 5 x 4 and 7 x 5 points with errors of points, sizes
    and budgets alike, 0 to 6 % raise one; where points outside the intervals counted, 3 to 50 % did.
    """
    for test in tests:
        errors = [percent(each) for each in (test.mean_abs_relative_error, test.naive_mean_abs_relative_error)]
        if not test.is_test:
            yield f"The largest {test.variable} cannot test the law: without it the exponents are not identified."
        elif not test.is_better:
            v = test.variable
            yield f"Fitted without the largest {v}, the law misses it by {errors[0]}, a straight line by {errors[1]}."
        elif 2 * test.num_far > test.num_test and not test.is_blind:
            yield (
                f"{test.num_far} of {test.num_test} points of the largest {test.variable} lie more than twice as far "
                "off as their prediction intervals reach."
            )
