"""Flags of a fit, and how fits, flags and held-out tests read: the one place where what was found becomes sentences."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aimscale.analysis.errors import option

if TYPE_CHECKING:
    from aimscale.analysis.effects.contrasts import Contrast

POWER = 0.8
"""Power of a minimum detectable effect."""

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
    "in_plateau": "{number:.0f} rows of {subject} lie in the first plateau of their size, up to {more[0]:,.0f} images, "
    "where losses follow no power law.",
    "other_unit": "Losses at different {subject} have different targets or images, so they are not compared.",
    "absent": "{more[0]}: no value at {more[3]} = {subject}.",
    "unpaired": "{more[0]}: nothing is paired between {more[1]} and {subject}, which differ in {more[2]}; run both "
    "with the same, or {option:ignore} that column.",
    "one_pair": "One pair of runs a size: the interval covers the test images, not seeds; run more seeds.",
    "these_sizes": "Fewer than three sizes: intervals speak of these sizes alone; run more sizes to tell of others.",
    "unseen_prefix": "Validation gives every model a bidirectional prefix; a model trained without one never saw any.",
    "other_patches": "Each order scores other patches after the prefix, so their losses measure different tasks.",
    "equal_images": "Equal images, not equal compute: a deeper or larger head costs more per image.",
    "no_gain_asks": "No worth in compute: losses at different {subject} measure different tasks.",
    "no_gain_outside": "No worth of {subject} in compute: {number:.0f} of its {more[1]} losses lie outside those of "
    "{more[0]}, or the losses of {more[0]} do not fall with every budget.",
    "rows_left_out": "{subject}.",
    "other_tasks": "Tasks that the paper does not have: {subject}.",
    "other_probes": "Probes of another kind than Table 6's attentive one: {subject}.",
    "other_sides": "Resolution: these runs see {subject} px, AIM {number} px, which is part of every gap.",
    "loss_levels": "Losses: the paper's are on IN-1k at 224 px, these on the table's own images.",
    "no_result": "{subject}: {more[0]}",
    "one_seed": "No two rows differ in the seed alone, so the noise of seeds is not known; run more seeds.",
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
        told = {"subject": self.subject, "number": self.number, "more": self.more}
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


def contrast_cells(c: Contrast, by: str) -> dict[str, str]:
    """A contrast as a row of a table."""
    m, unknown = c.measure, not c.over
    over = "1 pair" if c.num_run_pairs == 1 else f"{c.num_run_pairs} pairs"
    return {
        "measure": m.title,
        by: c.level,
        "difference": m.shown_difference(c.difference),
        "95 % interval": "" if unknown else f"[{m.shown_difference(c.low)}, {m.shown_difference(c.high)}]",
        "over": f"{over}, {c.images.num_images:,} images" if c.over == "test images" and c.images else over,
        "sizes": str(c.num_sizes or ""),
        "d.f.": "" if math.isnan(c.degrees) else f"{c.degrees:.3g}",
        "verdict": "no interval" if unknown else c.verdict,
        "detectable": "" if unknown or c.is_significant else m.shown_size(c.detectable),
        "mean": m.shown(c.level_mean),
        "baseline": m.shown(c.baseline_mean),
        "ratio": "" if math.isnan(c.ratio) or unknown else f"{c.ratio:.4f} [{c.ratio_low:.4f}, {c.ratio_high:.4f}]",
    }


def scope(c: Contrast) -> str:
    """What a contrast's interval is over, and which sizes it speaks of."""
    runs = "one pair of runs" if c.num_run_pairs == 1 else f"{c.num_run_pairs} pairs of runs"
    runs += f" ({c.num_pairs} of rows)" if c.num_pairs > c.num_run_pairs else ""
    if not c.over:
        return f"from {runs}{' of different sizes' * (c.num_sizes > 1)}, so without an interval"
    if c.images is not None and c.over == "test images":
        return f"over the {c.images.num_images:,} test images of {runs}"
    spare = f"({c.degrees:.3g} degrees of freedom)"
    if c.over == "sizes":
        return f"over {runs} at {c.num_sizes} sizes {spare}"
    return f"over {runs}{('', ', for this size', ', for these two sizes')[c.num_sizes]} {spare}"


def contrast_sentence(c: Contrast) -> str:
    """A difference with its interval, what that is over and what it leaves out."""
    m = c.measure
    text = f"{m.title}: {m.shown(c.level_mean)} with {c.level}, {m.shown(c.baseline_mean)} with {c.baseline}"
    text += f", difference {m.shown_difference(c.difference)}"
    if not c.over:
        return f"{text}, {scope(c)}."
    text += f" [{m.shown_difference(c.low)}, {m.shown_difference(c.high)}]"
    if not math.isnan(c.ratio) and c.over != "test images":
        text += f", ratio {c.ratio:.4f} [{c.ratio_low:.4f}, {c.ratio_high:.4f}]"
    text += f", {scope(c)}"
    if c.images is not None and c.over == "test images":
        text += f", McNemar {p_value(c.images.p)}" if not math.isnan(c.images.p) else ""
    elif c.images is not None:
        text += f", on these test images (others: ±{m.shown_size(c.images.half)})"
    if c.is_significant:
        return f"{text}: {c.level} is {c.verdict}."
    effect = f"minimum detectable effect {m.shown_size(c.detectable)} at {100 * POWER:.0f} % power"
    return f"{text}: {c.verdict} ({effect})."
