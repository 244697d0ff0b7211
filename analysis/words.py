"""Flags, and how numbers, names and lists read in sentences."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Flag:
    """Something to be careful about in a result."""

    kind: str
    """Short name, by which flags are found and compared."""
    subject: str = ""
    """Parameter, variable, group or row that it is about."""
    number: float = 0.0
    """Size of it: a bound, a factor, per cent, standard deviations."""
    more: tuple[float | str, ...] = ()
    """Further values that are read apart from the sentence."""
    p: float = 1.0
    """Probability that a sound law shows as much, where that was tested."""
    text: str
    """Sentence that a reader sees."""

    def __str__(self) -> str:
        return self.text


SUFFIXES = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "%": 1e-2}
"""Suffixes of numbers and their factors, as tables and people write them."""


def human(value: float, digits: int = 3) -> str:
    """Write a count as people say it: 27.6k, 1.21M, 6.44B; beyond that, and below 0.001, a power of ten."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1e12 or 0 < size < 1e-3:
        return power_of_ten(value, digits)
    scales = {1e9: "B", 1e6: "M", 1e3: "k"}
    scale = next((each for each in scales if size >= each * 0.9995), 1.0)
    return f"{float(f'{value / scale:.{digits}g}'):.{max(digits, 6)}g}{scales.get(scale, '')}"


def power_of_ten(value: float, digits: int = 2) -> str:
    """Write a number of FLOPs: 3×10¹³."""
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if mantissa == "1" else f"{mantissa}×{power}"


def scale_words(at: Mapping[Any, float], digits: int = 4) -> str:
    """Write the values of variables: N = 1.21M, D = 3B."""
    return ", ".join(f"{variable} = {human(value, digits)}" for variable, value in at.items())


def percent(share: float, digits: int = 2) -> str:
    """Write a fraction as per cent."""
    return f"{human(100 * share, digits)} %"


def p_value(p: float) -> str:
    """Write a probability of chance; digits of a tiny one say nothing."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.1g}"


def did_you_mean(typed: str, names: Iterable[str], otherwise: str) -> str:
    """Name what resembles a name that does not exist, the nearest first; else some of all."""
    lower = typed.lower()
    score = {n: difflib.SequenceMatcher(None, lower, n.lower()).ratio() for n in names}
    known = sorted(score, key=score.__getitem__, reverse=True)
    near = [n for n in known if score[n] >= 0.55 or (len(lower) > 2 and lower in n.lower())]
    return f"did you mean {' or '.join(near[:3])}?" if near else f"{otherwise} {some(known, MAX_KNOWN)}."


MAX_NAMED, MAX_KNOWN = 5, 16
"""Names that a sentence lists at most, and known names to choose from."""


def some(names: Sequence[str], most: int = MAX_NAMED) -> str:
    """Name so many at most, and say how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def said_once(flags: Iterable[Flag]) -> tuple[Flag, ...]:
    """Drop flags that say less than another one: that rows differ in a column, where they are known to lie apart."""
    flags = tuple(dict.fromkeys(flags))
    apart = {flag.subject for flag in flags if flag.kind == "experiments"}
    return tuple(flag for flag in flags if not (flag.kind == "mixed" and flag.subject in apart))


def flag_words(flags: Sequence[Flag]) -> list[str]:
    """Write flags; of more than three that differ in their number alone, the first and how many follow."""
    alike: dict[tuple[str, str], list[str]] = {}
    for flag in flags:
        alike.setdefault((flag.kind, flag.subject), []).append(str(flag))
    groups = (each if len(each) <= 3 else [f"{each[0]} (and {len(each) - 1} more)"] for each in alike.values())
    return [words for group in groups for words in group]


PROBES = ("attentive", "efficient", "linear", "knn", "lora")
"""Kinds of accuracy that are probes of ours; a foreign table has kinds of its own, such as zero-shot."""


def measured_by(kind: str) -> str:
    """Name a kind of accuracy, behind the name of its task."""
    return f"{kind} probe" if kind in PROBES else f"{kind} accuracy".strip()


def accuracy_of(kind: str, of: str = "accuracy") -> str:
    """Name a kind of accuracy (or of error) in prose."""
    if kind == "lora":
        return f"{of} after LoRA adaptation (not frozen)"
    return f"k-NN {of}" if kind == "knn" else f"{kind}-probe {of}" if kind in PROBES else f"{kind} {of}"


def capital(words: str) -> str:
    """Begin a sentence with these words; k-NN keeps its small letter."""
    return words if words.startswith("k-NN") else words[0].upper() + words[1:]
