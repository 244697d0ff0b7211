"""Laws in which size and data interact: what more data buys depends on the size, and the other way round.

Each is written around the data's geometric mean (n0, d0, u0), where its parameters are nearly independent; `report`
turns them into the parameters of the formula.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from aimscale.analysis.laws.base import Array, Columns, Law, Parameter, Params, coefficient, exponent

Parts = tuple[Any, ...]
POOL_EXPONENT, STEEPNESS = 0.75, 1.5
"""A pool of U holds off the overfitting of a size N ~ U^0.75, and repeats count by their power of 1.5. Few runs tell
these; they are held at what predicted best among six and four values in backtests on nine tenths of 161 runs with up to
3000 passes over pools of 1e8 to 1e11 tokens."""


OPTIMAL_EXPONENTS = {
    "a": lambda p: p["beta"] / (p["alpha"] + p["beta"]),
    "b": lambda p: p["alpha"] / (p["alpha"] + p["beta"]),
}
"""Exponents of N*(C) and D*(C) where the law falls by N^-alpha and D^-beta."""


def _centre(x: Columns, variable: str) -> float:
    """Geometric mean of a variable."""
    return float(np.exp(np.mean(x.log(variable))))


def _coupled_terms(x: Columns, t: Params, n0: float, d0: float) -> Array:
    """(A N^-alpha + B D^-beta)^c over its value at the centre's N."""
    size = np.exp(-t["alpha"] * (x.log("N") - np.log(n0)))
    data = np.exp(-t["beta"] * (x.log("D") - np.log(d0)))
    return np.exp(t["c"] * np.log(size + t["w"] * data))


def _coupled_gradient(x: Columns, t: Params, terms: Array, n0: float, d0: float) -> tuple[Array, ...]:
    """Derivatives of `_coupled_terms` by alpha, beta, c and w."""
    log_n, log_d = x.log("N") - np.log(n0), x.log("D") - np.log(d0)
    size, data = np.exp(-t["alpha"] * log_n), np.exp(-t["beta"] * log_d)
    inner = size + t["w"] * data
    outer = t["c"] * terms / inner
    return -outer * size * log_n, -outer * t["w"] * data * log_d, terms * np.log(inner), outer * data


def _coupled_report(p: Params, n0: float, d0: float) -> dict[str, Array]:
    with np.errstate(over="ignore", divide="ignore"):
        level = p["K"] ** (1 / p["c"])
        a, b = level * n0 ** p["alpha"], level * p["w"] * d0 ** p["beta"]
    return {"E": p["E"], "A": a, "B": b, "alpha": p["alpha"], "beta": p["beta"], "c": p["c"]}


def coupled(n0: float = 1.0, d0: float = 1.0) -> Law:
    """Chinchilla's terms under one outer exponent; c = 1 is Chinchilla's law, E = 0 and beta = 1 Kaplan's."""
    return Law(
        name="coupled",
        formula="L = E + (A N^-alpha + B D^-beta)^c",
        variables=("N", "D"),
        linear=(coefficient("E"), coefficient("K")),
        nonlinear=(
            exponent("alpha"),
            exponent("beta"),
            exponent("c", 0.02),
            Parameter(name="w", bounds=(1e-3, 1e3), log=True),
        ),
        basis=lambda x, t: (1.0, _coupled_terms(x, t, n0, d0)),
        gradient=lambda x, t, g: tuple((0.0, each) for each in _coupled_gradient(x, t, g[1], n0, d0)),
        report=lambda p: _coupled_report(p, n0, d0),
        centred=lambda x: coupled(_centre(x, "N"), _centre(x, "D")),
        derived=OPTIMAL_EXPONENTS,
        source="Chinchilla's terms under Kaplan's outer exponent; a and b are the exponents of N*(C) and D*(C)",
    )


def _bent_log(log_x: Array, bend: Array) -> Array:
    """(x^bend - 1) / bend: a logarithm that bends up or down, ln x at bend = 0."""
    small = np.abs(bend) < 1e-8
    safe = np.where(small, 1.0, bend)
    return np.where(small, log_x * (1 + 0.5 * bend * log_x), np.expm1(safe * log_x) / safe)


def farseer(n0: float = 1.0, d0: float = 1.0) -> Law:
    """Limit, coefficient and exponent of the data term each a stretched exponential of the size.

    With h_i = ((N/n0)^g_i - 1) / g_i the limit is E exp(-s3 h_3), the exponent of D is e = d exp(s1 h_1), and the
    coefficient falls by s2 h_2 in logarithm beside what a changing exponent does to it at d0.
    """
    log_d0 = float(np.log(d0))

    def basis(x: Columns, t: Params) -> Parts:
        log_n = x.log("N") - np.log(n0)
        power = t["d"] * np.exp(t["s1"] * _bent_log(log_n, t["alpha"]))
        fall = (t["s2"] - t["d"] * t["s1"] * log_d0) * _bent_log(log_n, t["beta"])
        limit = np.exp(-t["s3"] * _bent_log(log_n, t["gamma"]))
        return limit, np.exp(-fall - (power - t["d"]) * log_d0 - power * (x.log("D") - log_d0))

    def report(p: Params) -> dict[str, Array]:
        with np.errstate(over="ignore", divide="ignore"):
            slopes = {1: (p["s1"], "alpha"), 2: (p["d"] * p["s1"] * log_d0 - p["s2"], "beta"), 3: (-p["s3"], "gamma")}
            a = {i: s * n0 ** -p[bend] / p[bend] for i, (s, bend) in slopes.items()}
            levels = {1: np.log(p["d"]), 2: np.log(p["B"]) + p["d"] * log_d0, 3: np.log(p["E"])}
            b = {i: levels[i] - s / p[bend] for i, (s, bend) in slopes.items()}
        out = {f"{name}{i}": values[i] for i in (1, 2, 3) for name, values in (("a", a), ("b", b))}
        return {**out, "alpha": p["alpha"], "beta": p["beta"], "gamma": p["gamma"]}

    return Law(
        name="farseer",
        formula="L = exp(a3 N^gamma + b3) + exp(a2 N^beta + b2) D^-exp(a1 N^alpha + b1)",
        variables=("N", "D"),
        linear=(coefficient("E"), coefficient("B")),
        nonlinear=(
            exponent("d", 0.02, 3.0),
            Parameter(name="s1", bounds=(-0.5, 0.5)),
            Parameter(name="alpha", bounds=(-1.5, 1.5)),
            Parameter(name="s2", bounds=(-0.5, 1.0)),
            Parameter(name="beta", bounds=(-1.5, 1.5)),
            Parameter(name="s3", bounds=(0.0, 0.5)),
            Parameter(name="gamma", bounds=(-1.5, 1.5)),
        ),
        basis=basis,
        report=report,
        centred=lambda x: farseer(_centre(x, "N"), _centre(x, "D")),
        source="Farseer (Li et al. 2025)",
    )


def overfitting(n0: float = 1.0, d0: float = 1.0, u0: float = 1.0) -> Law:
    """The coupled law and a penalty for repeats: it grows with the size over the pool^0.75 and saturates."""

    def basis(x: Columns, t: Params) -> Parts:
        unique = np.minimum(x["U"], x["D"])
        room = x.log("N") - np.log(n0) - POOL_EXPONENT * (np.log(unique) - np.log(u0))
        repeats = (x["D"] / unique - 1) ** STEEPNESS
        share = repeats / (repeats + t["R0"] ** STEEPNESS)
        return 1.0, _coupled_terms(x, t, n0, d0), np.exp(t["p"] * room) * share

    def report(p: Params) -> dict[str, Array]:
        with np.errstate(over="ignore", divide="ignore"):
            level = p["G"] * np.exp(p["p"] * (POOL_EXPONENT * np.log(u0) - np.log(n0)))
        return {**_coupled_report(p, n0, d0), "G": level, "p": p["p"], "R0": p["R0"]}

    within = coupled(n0, d0)
    return Law(
        name="overfitting",
        formula=f"L = E + (A N^-alpha + B D^-beta)^c + G (N / U^{POOL_EXPONENT})^p S/(S + R0^{STEEPNESS}), "
        f"S = (D/U - 1)^{STEEPNESS}",
        variables=("N", "D", "U"),
        linear=(*within.linear, coefficient("G")),
        nonlinear=(*within.nonlinear, exponent("p", 0.1, 4.0), exponent("R0", 1.0, 1e4)),
        basis=basis,
        report=report,
        centred=lambda x: overfitting(_centre(x, "N"), _centre(x, "D"), _centre(x, "U")),
        source="The coupled law with a saturating penalty for repeats (this project); for pools seen tens of times",
    )
