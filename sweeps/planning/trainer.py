"""The section `trainer` of a sweep file: a command of the user that trains the runs, and its templates.

A template holds `{name}` or arithmetic, `{budget/(batch*block)}`, in which the values of a run stand by name, and
`run_dir`, `size`, `seed`, `budget`, `budgets` and `devices` of the run. Its words are split as a shell would; no shell
reads them, and no value makes two words of one.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from aimscale.analysis.formulas import FormulaError, parse_formula
from aimscale.harness.run.program import MetricsSection, StopSection
from aimscale.harness.run.section import Section

RESERVED = ("run_dir", "size", "seed", "budget", "budgets", "devices", "result", "N", "D")
"""Names that a run gives values itself."""
GROUPS = ("D", "step", "val_loss", "loss", "budget")
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
Value = str | int | float | bool


class TemplateError(ValueError):
    """Template that cannot be filled in."""


def fill(template: str, values: Mapping[str, Any]) -> str:
    """Put values in place of the names and formulas in braces; `{{` and `}}` stand for braces.

    Raises:
        TemplateError: a name has no value, or a formula is none.
    """

    def value(match: re.Match[str]) -> str:
        written, text = match[0], (match[1] or "").strip()
        if written in ("{{", "}}"):
            return written[0]
        if match[1] is None:
            raise TemplateError(f"'{template:.80}' has a single brace; write {written * 2}")
        if text in values:
            return _written(values[text])
        try:
            numbers = {name: each for name, each in values.items() if _is_number(each)}
            return _written(float(parse_formula(text)(numbers)))
        except FormulaError as error:
            names = ", ".join(sorted(values))
            raise TemplateError(f"{{{text:.80}}} cannot be filled in: {error} (names: {names:.300})") from error

    return _BRACES.sub(value, template)


def names_of(template: str) -> list[str]:
    """Return the names in braces that a size has to give values.

    Raises:
        TemplateError: a formula is none.
    """
    names: dict[str, None] = {}
    for text in filter(None, (match[1] for match in _BRACES.finditer(template))):
        try:
            names |= dict.fromkeys(parse_formula(text).names)
        except FormulaError as error:
            raise TemplateError(f"{{{text:.80}}} is no formula: {error}") from error
    return [name for name in names if name not in RESERVED]


def fill_words(template: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the words of a command, filled in."""
    return tuple(fill(word, values) for word in shlex.split(template))


def _written(value: Any) -> str:
    """Write a value as an argument: a whole number without a point."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, float):
        return f"{value:.12g}"  # without what binary fractions add
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_words(text: str) -> str:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"'{text:.80}' cannot be split into words ({error}); close its quotes") from error
    if not words:
        raise ValueError("is empty; give a command")
    return text


def _check_formula(text: str) -> str:
    try:
        parse_formula(text)
    except FormulaError as error:
        raise ValueError(f"'{text:.80}' is no formula: {error}") from error
    return text


def _check_names(values: dict[str, Any]) -> dict[str, Any]:
    for name in values:
        if name in RESERVED or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"'{name}' cannot name a value; use letters, digits and _, and none of {RESERVED}")
    return values


def _check_metrics(section: MetricsSection) -> MetricsSection:
    _check_formula(section.D)
    if section.pattern is not None:
        try:
            groups = re.compile(section.pattern).groupindex
        except re.error as error:
            raise ValueError(f"pattern is no regular expression ({error})") from error
        if "val_loss" not in groups:
            raise ValueError("pattern has no group (?P<val_loss>...), the validation loss of a line")
    return section


def _check_sizes(sizes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    for name, values in sizes.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", name):
            raise ValueError(f"size '{name}' names folders; use letters, digits, . and - alone")
        _check_names(values)
    return sizes


Words = Annotated[str, AfterValidator(_check_words)]
Formula = Annotated[str, AfterValidator(_check_formula)]
Values = Annotated[dict[str, Value], AfterValidator(_check_names)]


class ResumeSection(Section):
    """How the command goes on with a run, if not by itself."""

    if_exists: str
    """File under the run directory that an attempt which can be resumed has left."""
    add: Words
    """Further words of the command."""


class TrainerSection(Section):
    """Command that trains the runs, in place of aimscale's own trainer."""

    directory: str = "."
    """Working directory of the command, relative to the sweep file; its git commit goes into every start and row."""
    command: Words
    """Command, with `{name}` and `{arithmetic}` of values; it writes into `{run_dir}`. No shell reads it."""
    resume: ResumeSection | None = None
    """How a run that was stopped goes on; null: the same command goes on by itself."""
    metrics: Annotated[MetricsSection, AfterValidator(_check_metrics)] = MetricsSection()
    """Where its numbers stand; by default JSON lines in `{run_dir}/metrics.jsonl`."""
    sizes: Annotated[dict[str, dict[str, Value]], Field(min_length=1), AfterValidator(_check_sizes)]
    """Size -> its values by name."""
    params: Formula | None = None
    """Formula of N from the values; null: the program tells `N`, and plans know it once a run of the size has begun."""
    flops: Formula = "6*N*D"
    """Formula of C from N, D and the values."""
    unit: str = Field("samples", pattern=r"^[A-Za-z][A-Za-z -]{0,30}$")
    """What D counts, in the plural: tokens, images, characters."""
    budgets: Literal["apart", "together"] = "apart"
    """`apart`: a run for each budget, whose last loss is its row; `together`: one run that serves all, and says in a
    line by `budget` which of them its loss is of."""
    evaluate: dict[str, Words] = Field(default_factory=dict)
    """Name -> command that measures a budget, and writes {"accuracy": {"task:kind": share}} to `{result}`."""
    runtime: Values = Field(default_factory=dict)
    """Values that do not change what is trained, such as the number of loader processes."""
    stop: StopSection = StopSection()
    """How the program is asked to save and end."""
    devices: int = Field(1, ge=1, le=1024)
    """Devices of one node that a run uses at the same time."""
    threads: int = Field(1, ge=1, le=4096)
    """Cores that a run computes with, where there is no GPU."""
    version: str = ""
    """Any text; another one makes all runs anew."""
