"""Display of results: a few lines in a shell, a table in a notebook, prose, a figure, plain types and JSON; flags, and
how numbers, names, lists and options read in sentences."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import html
import json
import math
import re
import shlex
import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar

from aimscale.analysis.errors import AnalysisError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MAX_ROWS = 20
"""Rows that a shell and a notebook show of a longer table."""


class Drawing:
    """A method that is a function of `plots`, by the class of the result; `help(Fit.plot)` shows its options."""

    functions: ClassVar[Callable[[], Mapping[type, Callable[..., Figure]]]]
    """Function that returns the drawing of every class: `plots` stands above results, so the package sets it."""

    def __get__(self, result: Any, owner: type) -> Callable[..., Figure]:
        draw = Drawing.functions().get(owner, _no_figure)
        return draw if result is None else MethodType(draw, result)


def _no_figure(result: Any, **options: Any) -> Figure:
    raise AnalysisError(f"There is no figure of a {type(result).__name__}; draw its .table yourself.")


class Result:
    """Base class of all results."""

    plot = Drawing()
    """Draw its figure, where there is one."""
    also: ClassVar[tuple[str, ...]] = ()
    """Properties that stand beside its fields in `to_dict`."""

    if TYPE_CHECKING:

        @property
        def table(self) -> pd.DataFrame:
            """Its numbers."""

    def headline(self) -> str:
        """Say in one line what this is: its facts, without cautions, unless there is something better."""
        return "; ".join(f"{key}: {value}" for key, value in self.facts() if key != "caution")

    def facts(self) -> list[tuple[str, str]]:
        """List what stands above the table as key and value, what to be careful about first."""
        return []

    def cells(self) -> list[dict[str, str]]:
        """Write the table as a reader sees it."""
        return [{str(k): _cell(v) for k, v in row.items()} for row in self.table.to_dict("records")]

    def sentences(self) -> list[str]:
        """Write what stands above the table for running text."""
        return as_sentences(self.facts())

    def summary(self) -> str:
        """Write all there is to say, as the command prints it: the facts with the worst caution, the table, and then
        the other cautions, so that these do not push the numbers off the screen."""
        facts, others = self.facts(), list[tuple[str, str]]()
        cautions = [place for place, (key, _) in enumerate(facts) if key == "caution"]
        if len(cautions) > 2:  # two lines cost no screen
            first, *rest = cautions
            others = [facts[place] for place in rest]
            facts[first] = ("caution", f"{facts[first][1]} ({len(rest)} more cautions below the table)")
            facts = [fact for place, fact in enumerate(facts) if place not in rest]
        parts = (fact_lines(facts) if facts else self.headline(), text_table(self.cells()), fact_lines(others))
        return "\n\n".join(filter(None, parts))

    def to_dict(self) -> dict[str, Any]:
        """Give its fields in plain types, tables as rows, and its words; fields of `repr=False` are left out."""
        words: dict[str, Any] = {name: getattr(self, name, list)() for name in ("sentence", "sentences")}
        more = {name: plain_types(getattr(self, name)) for name in self.also}
        return plain_fields(self) | more | {name: told for name, told in words.items() if told}

    def to_json(self, *, indent: int | None = 2, **also: Any) -> str:
        """Write `to_dict`, and what there is `also`, as JSON; numbers that JSON cannot hold become null."""
        return json.dumps(plain_types(self.to_dict() | also), indent=indent, allow_nan=False)

    def to_latex(self) -> str:
        r"""Write the cells as a tabular of LaTeX (booktabs), as a paper does: numbers without suffixes, names of
        parameters and variables and powers of ten as mathematics (`$\alpha$`, `$1.2\times10^{6}$`)."""
        import pandas as pd

        self.cells()  # sentences that are made once and kept stay as people say them
        token = _HAS_SUFFIXES.set(False)
        try:
            rows = self.cells()
        finally:
            _HAS_SUFFIXES.reset(token)
        table = pd.DataFrame([{latex(name): latex(text) for name, text in row.items()} for row in rows])
        return table.to_latex(index=False, escape=False)

    def __repr__(self) -> str:
        return f"{self.headline()}\n{_shown(self.table, 'to_string')}"

    def _repr_html_(self) -> str:
        """Write what a notebook shows."""
        return f"<p>{html.escape(self.headline())}</p>{_shown(self.table, 'to_html', border=0)}"


def _shown(table: pd.DataFrame, form: str, **options: Any) -> str:
    """Write a table without columns that are blank in every row."""
    seen = table.loc[:, [table.empty or table[name].ne("").any() for name in table]]
    return str(getattr(seen, form)(index=False, max_rows=MAX_ROWS, float_format=_cell, **options))


def fact_lines(facts: Sequence[tuple[str, str]]) -> str:
    """Write keys and values in two columns; a value that the terminal is too narrow for goes on below itself."""
    edge = max((len(key) for key, _ in facts), default=0) + 2
    width = max(shutil.get_terminal_size((1000, 0)).columns, edge + 30)
    fold = textwrap.TextWrapper(width, subsequent_indent=" " * edge, break_long_words=False, break_on_hyphens=False)
    return "\n".join(fold.fill(f"{key:<{edge}}{value}") for key, value in facts)


def as_sentences(facts: Sequence[tuple[str, str]]) -> list[str]:
    """Write facts for running text."""
    return [f"{capital(key)}: {value.rstrip('.')}." for key, value in facts]


def text_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Write cells in columns under heads, numbers to the right; a column without a word is left out. Columns that the
    terminal is too narrow for follow in a second block, beside the first columns that tell the rows apart.
    """
    columns = []
    for name in dict.fromkeys(name for row in rows for name in row):
        cells = [row.get(name, "") for row in rows]
        width = max(map(len, (name, *cells)))
        to_the_right = all(re.match(r"[-+–\d]|$", cell) for cell in cells)
        columns += [[f"{each:{'>' if to_the_right else '<'}{width}}" for each in (name, *cells)]] if any(cells) else []
    num_keys = next((n for n in range(1, len(columns)) if len({*zip(*columns[:n], strict=True)}) > len(rows)), 0)
    keys = columns[:num_keys]
    room = min(shutil.get_terminal_size((120, 0)).columns, 120)
    blocks = [[*keys]]
    for column in columns[num_keys:]:
        if len(blocks[-1]) > num_keys and sum(len(each[0]) + 2 for each in (*blocks[-1], column)) - 2 > room:
            blocks.append([*keys])
        blocks[-1].append(column)
    return "\n\n".join("\n".join("  ".join(row).rstrip() for row in zip(*block, strict=True)) for block in blocks)


def _cell(value: Any) -> str:
    return human(value, 4) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def plain_fields(record: Any) -> dict[str, Any]:
    """Give the fields of a dataclass in plain types, but for those of `repr=False`."""
    return {f.name: plain_types(getattr(record, f.name)) for f in dataclasses.fields(record) if f.repr}


def plain_types(value: Any) -> Any:
    """Reduce a value to JSON types; numbers that JSON cannot hold become null."""
    import numpy as np
    import pandas as pd

    match value:
        case Result():
            return value.to_dict()
        case pd.DataFrame():
            return plain_types(value.to_dict("records"))
        case dict():
            return {":".join(map(str, k)) if isinstance(k, tuple) else str(k): plain_types(v) for k, v in value.items()}
        case list() | tuple() | np.ndarray():
            return [plain_types(v) for v in value]
        case set() | frozenset():
            return sorted(value)
        case float() | np.floating():
            return float(value) if np.isfinite(value) else None
        case np.generic():
            return value.item()
    return plain_fields(value) if dataclasses.is_dataclass(value) else value


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


_HAS_SUFFIXES = ContextVar("has_suffixes", default=True)
LATEX = str.maketrans(
    {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}"} | {c: rf"\{c}" for c in "&%$#_{}"}
)
"""Characters that mean something to LaTeX, as text."""
SUPERSCRIPTS = "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"


def latex(text: str) -> str:
    r"""Write a cell in LaTeX: a letter or alpha, beta and gamma alone, and powers of ten, as mathematics."""
    if re.fullmatch("[A-Za-z]|alpha|beta|gamma", text):
        return f"${text if len(text) == 1 else chr(92) + text}$"
    to_digits = str.maketrans(SUPERSCRIPTS, "-0123456789")

    def power(match: re.Match[str]) -> str:
        times = r"\times" if match[1] else ""
        return f"${times}10^{{{match[2].translate(to_digits)}}}$"

    return re.sub(f"(×)?10([{SUPERSCRIPTS}]+)", power, text.translate(LATEX)).replace("–", "--")


def human(value: float, digits: int = 3) -> str:
    """Write a count as people say it: 27.6k, 1.21M, 6.44B; beyond that, and below 0.001, a power of ten."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= (1e12 if _HAS_SUFFIXES.get() else 1e6) or 0 < size < 1e-3:
        return power_of_ten(value, digits)
    if not _HAS_SUFFIXES.get():
        return f"{float(f'{value:.{digits}g}'):.{max(digits, 6)}g}"
    scales = {1e9: "B", 1e6: "M", 1e3: "k"}
    scale = next((each for each in scales if size >= each * 0.9995), 1.0)
    return f"{float(f'{value / scale:.{digits}g}'):.{max(digits, 6)}g}{scales.get(scale, '')}"


def power_of_ten(value: float, digits: int = 2) -> str:
    """Write a number of FLOPs: 3×10¹³."""
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if mantissa == "1" else f"{mantissa}×{power}"


def told_apart(values: Iterable[float], write: Callable[[float, int], str], digits: int) -> list[str]:
    """Write different numbers with as few digits as tell them apart, and so many at least."""
    numbers = list(values)
    tries = ([write(value, num) for value in numbers] for num in range(digits, 18))  # 17 tell any two floats apart
    return next((words for words in tries if len(set(words)) == len(numbers)), [str(value) for value in numbers])


def scale_words(at: Mapping[Any, float], digits: int = 4) -> str:
    """Write the values of variables: N = 1.21M, D = 3B."""
    return ", ".join(f"{variable} = {human(value, digits)}" for variable, value in at.items())


def percent(share: float, digits: int = 2) -> str:
    """Write a fraction as per cent."""
    return f"{human(100 * share, digits)} %"


def beyond_words(distance: float) -> str:
    """Say how far a scale lies beyond the measured ones."""
    return f"{human(distance)} times beyond the table" if distance > 1 else "within the measured range"


def p_value(p: float) -> str:
    """Write a probability of chance; digits of a tiny one say nothing."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.1g}"


def by_chance(are_significant: Sequence[bool], level: float = 0.95) -> str:
    """Say how many of several intervals exclude zero, and how many would if there were nothing to find."""
    num = len(are_significant)
    return f"{sum(are_significant)} of {num} exclude zero, where {human(num * (1 - level), 2)} would by chance"


def did_you_mean(typed: str, names: Iterable[str], otherwise: str) -> str:
    """Name what resembles a name that does not exist, the nearest first; else some of all."""
    lower = typed.lower()
    score = {n: difflib.SequenceMatcher(None, lower, n.lower()).ratio() for n in names}
    nearest = sorted(score, key=score.__getitem__, reverse=True)
    near = [n for n in nearest if score[n] >= 0.55 or (len(lower) > 2 and lower in n.lower())]
    return f"did you mean {' or '.join(near[:3])}?" if near else f"{otherwise} {some(nearest, MAX_KNOWN)}."


MFU = {"mfu_published": "published/nominal", "mfu": "executed/measured"}
"""Columns of model FLOPs utilisation: which FLOPs over which peak."""
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


_IS_COMMAND = ContextVar("is_command", default=False)
_PYTHON = {
    "columns": 'columns={{"{}": "{}"}}', "fix": 'fixed={{"{}": {}}}', "groups": 'groups={{"{}": "{}"}}',
    "ignore": 'ignore=["{}"]', "measure": 'measures=["{}"]', "out": 'out="{}"', "where": 'where=["{}"]',
    "drop-outliers": "drop_outliers=True", "law": 'law="{}"',
}  # fmt: skip
"""Option -> the argument that it is in Python, with its value."""


@contextlib.contextmanager
def in_command() -> Iterator[None]:
    """Name options as the command does, within; elsewhere they read as Python's arguments."""
    token = _IS_COMMAND.set(True)
    try:
        yield
    finally:
        _IS_COMMAND.reset(token)


def option(name: str, value: str | Mapping[str, str] = "") -> str:
    """Name an option as its reader types it: `--fix E=0` in a command, `fixed={"E": 0}` in Python; several values by
    their names."""
    if isinstance(value, Mapping):
        pairs = ",".join(f"{key}={each}" for key, each in value.items())
        return option(name, pairs) if _IS_COMMAND.get() else f"{option(name)}={json.dumps(dict(value))}"
    if _IS_COMMAND.get():
        return f"--{name} {shlex.quote(value)}" if value else f"--{name}"
    form, (key, _, right) = _PYTHON[name], value.partition("=")
    return form.format(*((key, right) if "{{" in form else (value,))) if value else form.partition("=")[0]
