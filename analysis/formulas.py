"""Formulas: arithmetic of names and numbers, from text that may be a stranger's. Nothing of it is executed.

    formula = parse_formula("6 * N * D")
    formula.names  # ("N", "D")
    formula({"N": 1e9, "D": [1e9, 2e9]})  # array([6.0e+18, 1.2e+19])

A formula holds names (in backticks where Python has no such name), numbers, parentheses, + - * / // % ** and calls of
`FUNCTIONS`, and nothing else: no attribute, index, text, comparison or keyword. All numbers are float64, so that no
product outgrows its integers and no power takes long; a caller that needs whole numbers rounds the result.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aimscale.analysis.errors import AnalysisError

MAX_LENGTH = 1000
"""Maximum number of characters of a formula."""
FUNCTIONS = {
    "abs": np.abs, "exp": np.exp, "log": np.log, "log10": np.log10, "log2": np.log2, "sqrt": np.sqrt,
    "max": np.maximum, "min": np.minimum,
}  # fmt: skip
"""Name -> function of one value, or for max and min of several."""
OPERATORS: dict[type[ast.AST], np.ufunc] = {
    ast.Add: np.add, ast.Sub: np.subtract, ast.Mult: np.multiply, ast.Div: np.divide, ast.FloorDiv: np.floor_divide,
    ast.Mod: np.remainder, ast.Pow: np.power, ast.UAdd: np.positive, ast.USub: np.negative,
}  # fmt: skip
_BACKTICKS = re.compile("`([^`]*)`")
_Compute = Callable[[Mapping[str, np.ndarray]], Any]


class FormulaError(AnalysisError):
    """Text that is no formula, or a formula that its values do not suit."""


@dataclass(frozen=True, kw_only=True)
class Formula:
    """Parsed formula; call it with the values of its names."""

    text: str
    names: tuple[str, ...]
    """Names in the order of their first use, without backticks."""
    _compute: _Compute = field(repr=False, compare=False)

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """Compute the formula in float64.

        Args:
            values: name -> a number, or numbers in an array of one shape for all names.

        Raises:
            FormulaError: a name has no value or is no number, or the formula of numbers alone is not finite.
        """
        numbers: dict[str, np.ndarray] = {}
        for name in self.names:
            if name not in values:
                raise FormulaError(f"there is no '{name:.80}'")
            try:
                numbers[name] = np.asarray(values[name], float)
            except (TypeError, ValueError, OverflowError) as error:
                raise FormulaError(f"'{name:.80}' holds what is no number") from error
        with np.errstate(all="ignore"):
            result = self._compute(numbers)
        if not self.names and not np.isfinite(result):
            raise FormulaError(f"'{self.text:.80}' is {result}")
        return result


def parse_formula(text: str) -> Formula:
    """Parse a formula.

    Raises:
        FormulaError: it holds what no formula may hold, or more than `MAX_LENGTH` characters.
    """
    if len(text) > MAX_LENGTH:
        raise FormulaError(f"it has more than {MAX_LENGTH} characters")
    quoted: dict[str, str] = {}

    def placeholder(match: re.Match[str]) -> str:
        name = f"{'_' * (len(text) + 1)}{len(quoted)}"  # longer than any name of the text
        quoted[name] = match[1]
        return name

    names: dict[str, None] = {}
    try:
        compute = _parse(ast.parse(_BACKTICKS.sub(placeholder, text.strip()), mode="eval").body, quoted, names)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:  # of Python's own parser
        raise FormulaError("it is no arithmetic of names and numbers") from error
    return Formula(text=text, names=tuple(names), _compute=compute)


def _parse(node: ast.expr, quoted: Mapping[str, str], names: dict[str, None]) -> _Compute:
    """Turn an allowed part into a function of the names' values, and note the names."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            value = np.float64(number)
            return lambda values: value
        case ast.Name(id=written):
            name = quoted.get(written, written)
            names[name] = None
            return lambda values: values[name]
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in OPERATORS:
            return _applied(OPERATORS[type(sign)], [_parse(operand, quoted, names)])
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in OPERATORS:
            return _applied(OPERATORS[type(sign)], [_parse(side, quoted, names) for side in (left, right)])
        case ast.Call(func=ast.Name(id=called), args=args, keywords=[]) if called in FUNCTIONS:
            function = FUNCTIONS[called]
            if len(args) == function.nin or len(args) > function.nin > 1:
                return _applied(function, [_parse(arg, quoted, names) for arg in args])
    raise FormulaError(f"it may hold names, numbers, + - * / // % **, parentheses, {', '.join(FUNCTIONS)}, no more")


def _applied(function: np.ufunc, parts: list[_Compute]) -> _Compute:
    """Apply a function to the results of parts: one by one where it takes fewer."""
    if len(parts) == 1:
        return lambda values: function(parts[0](values))
    return lambda values: functools.reduce(function, [part(values) for part in parts])


def quoted(name: str) -> str:
    """Write a column as a formula takes it."""
    return name if name.isidentifier() else f"`{name}`"
