"""Display of results: a few lines in a shell, a table in a notebook, prose, a figure, plain types and JSON."""

from __future__ import annotations

import dataclasses
import html
import importlib
import json
import re
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.words import capital, human

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MAX_ROWS = 20
"""Rows that a shell and a notebook show of a longer table."""


class Drawing:
    """A method that is a function of `plots`, such as "scaling.plot_fit"; `help(Fit.plot)` shows its options."""

    def __init__(self, name: str) -> None:
        self.name = name  # `plots` stands above results, and is imported when asked for

    def __get__(self, result: Any, owner: type | None = None) -> Callable[..., Figure]:
        module, _, function = self.name.partition(".")
        draw = getattr(importlib.import_module(f"aimscale.analysis.plots.{module}"), function)
        return draw if result is None else MethodType(draw, result)


class Result:
    """Base class of all results."""

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
        """Write all there is to say, as the command prints it."""
        facts = self.facts()
        return f"{fact_lines(facts) if facts else self.headline()}\n\n{text_table(self.cells())}".rstrip()

    def plot(self, **options: Any) -> Figure:
        """Draw its figure, where the class of the result has one."""
        raise AnalysisError(f"There is no figure of a {type(self).__name__}; draw its .table yourself.")

    def to_dict(self) -> dict[str, Any]:
        """Give its fields in plain types, tables as rows, and its words; fields of `repr=False` are left out."""
        words: dict[str, Any] = {name: getattr(self, name, list)() for name in ("sentence", "sentences")}
        return plain_fields(self) | {name: told for name, told in words.items() if told}

    def to_json(self, *, indent: int | None = 2, **also: Any) -> str:
        """Write `to_dict`, and what there is `also`, as JSON; numbers that JSON cannot hold become null."""
        return json.dumps(plain_types(self.to_dict() | also), indent=indent, allow_nan=False)

    def to_latex(self) -> str:
        r"""Write the cells as a tabular of LaTeX (booktabs); powers of ten become mathematics."""
        import pandas as pd

        text = pd.DataFrame(self.cells()).to_latex(index=False, escape=True)
        digits = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
        powers = re.sub("10([⁻⁰¹²³⁴-⁹]+)", lambda m: f"$10^{{{m[1].translate(digits)}}}$", text)
        return powers.replace("×", r"$\times$")

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
