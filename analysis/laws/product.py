"""Products of powers: how a tuned setting, such as the best learning rate, follows size and data."""

from __future__ import annotations

from functools import partial

import numpy as np

from aimscale.analysis.laws.base import Array, Columns, Law, Parameter, Params, coefficient

STEEPEST = 4.0
"""Exponents are searched between minus this and this."""
EXPONENTS = {"N": "a", "D": "b"}
"""Variable -> its exponent."""


def _product(x: Columns, t: Params, *, variables: tuple[str, ...]) -> tuple[Array]:
    return (np.exp(sum(t[EXPONENTS[v]] * (x.log(v) - np.log(t[f"{v}0"])) for v in variables)),)


def _product_report(p: Params, *, variables: tuple[str, ...]) -> dict[str, Array]:
    powers = {EXPONENTS[v]: p[EXPONENTS[v]] for v in variables}
    return {"c": p["c"] * np.prod([p[f"{v}0"] ** -p[EXPONENTS[v]] for v in variables], axis=0), **powers}


def product(*variables: str) -> Law:
    """Make y = c N^a D^b, with exponents of either sign, in N, D or both."""
    return Law(
        name="product",
        formula=f"y = {' '.join(['c', *(f'{v}^{EXPONENTS[v]}' for v in variables)])}",
        variables=variables,
        linear=(coefficient("c"),),
        nonlinear=tuple(Parameter(name=EXPONENTS[v], bounds=(-STEEPEST, STEEPEST)) for v in variables),
        basis=partial(_product, variables=variables),
        report=partial(_product_report, variables=variables),
        constants={f"{v}0": 1.0 for v in variables},
        source="Li et al. 2025 (Step Law), of learning rate and batch",
    )
