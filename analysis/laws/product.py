"""Products of powers: how a tuned setting, such as the best learning rate, follows size and data."""

from __future__ import annotations

from functools import partial

import numpy as np

from aimscale.analysis.laws.base import Array, Columns, Law, Parameter, Params, coefficient

STEEPEST = 4.0
"""Exponents are searched between minus this and this."""


def _product(x: Columns, t: Params, *, variables: tuple[str, ...]) -> tuple[Array]:
    return (np.exp(sum(t[exponent_of(v)] * (x.log(v) - np.log(t[f"{v}0"])) for v in variables)),)


def _product_report(p: Params, *, variables: tuple[str, ...]) -> dict[str, Array]:
    powers = [p[f"{v}0"] ** -p[exponent_of(v)] for v in variables]
    return {"c": p["c"] * np.prod(powers, axis=0), **{exponent_of(v): p[exponent_of(v)] for v in variables}}


def exponent_of(variable: str) -> str:
    """Name the exponent of a variable."""
    return {"N": "a", "D": "b"}.get(variable, f"exponent_{variable}")


def product(*variables: str) -> Law:
    """Make y = c N^a D^b, with exponents of either sign, in some variables; without any, a constant."""
    return Law(
        name="product",
        formula=f"y = {' '.join(['c', *(f'{v}^{exponent_of(v)}' for v in variables)])}",
        variables=variables,
        linear=(coefficient("c"),),
        nonlinear=tuple(Parameter(name=exponent_of(v), bounds=(-STEEPEST, STEEPEST)) for v in variables),
        basis=partial(_product, variables=variables),
        report=partial(_product_report, variables=variables),
        constants={f"{v}0": 1.0 for v in variables},
        source="Li et al. 2025 (Step Law), of learning rate and batch",
    )
