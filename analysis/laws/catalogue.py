"""The catalogue of scaling laws: N parameters, D samples seen, U unique samples, C training FLOPs, L loss, x any scale.

Each is an `analysis.laws.base.Law`; `LAWS` lists them by the name that `aimscale fit --law` takes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.laws.base import Array, Bounds, Columns, Law, Parameter, Params, coefficient, exponent, scale_of
from aimscale.analysis.laws.interacting import OPTIMAL_EXPONENTS, coupled, farseer, overfitting
from aimscale.analysis.words import did_you_mean

Parts = tuple[Any, ...]


def power(x: str = "x", *, offset: bool = True) -> Law:
    """Power law in one variable, with or without an offset."""
    head, ones, zeros = ((coefficient("E"),), (1.0,), (0.0,)) if offset else ((), (), ())
    return Law(
        name="power_offset" if offset else "power",
        formula=f"L = {'E + ' if offset else ''}A {x}^-a",
        variables=(x,),
        linear=(*head, coefficient("A")),
        nonlinear=(exponent("a"),),
        basis=lambda v, t: (*ones, np.exp(-t["a"] * v.log(x))),
        gradient=lambda v, t, g: ((*zeros, -v.log(x) * g[-1]),),
        source="M2 of Alabdulmohsin et al. 2022" if offset else "Kaplan et al. 2020; M1 of Alabdulmohsin et al. 2022",
    )


def saturating(x: str = "x") -> Law:
    """Power law that levels off at small scale too."""
    return Law(
        name="saturating",
        formula=f"L = E + A ({x} + {x}0)^-a",
        variables=(x,),
        linear=(coefficient("E"), coefficient("A")),
        nonlinear=(exponent("a"), scale_of(f"{x}0", x, below=1e-3, above=1.0)),
        basis=lambda v, t: (1.0, np.exp(-t["a"] * np.log(v[x] + t[f"{x}0"]))),
        source="Zhai et al. 2022",
    )


def _softplus(z: Array) -> Array:
    """ln(1 + e^z), also of complex z (for the complex step) and of large z."""
    return np.where(np.real(z) > 30, z, np.log1p(np.exp(np.where(np.real(z) > 30, 0, z))))


def _sigmoid(z: Array) -> Array:
    return np.exp(-_softplus(-z))


def _chinchilla_basis(x: Columns, t: Params) -> Parts:
    return 1.0, np.exp(-t["alpha"] * x.log("N")), np.exp(-t["beta"] * x.log("D"))


def _chinchilla_gradient(x: Columns, t: Params, g: Parts) -> tuple[Parts, ...]:
    return (0.0, -x.log("N") * g[1], 0.0), (0.0, 0.0, -x.log("D") * g[2])


CHINCHILLA = Law(
    name="chinchilla",
    formula="L = E + A N^-alpha + B D^-beta",
    variables=("N", "D"),
    linear=(coefficient("E"), coefficient("A"), coefficient("B")),
    nonlinear=(exponent("alpha"), exponent("beta")),
    basis=_chinchilla_basis,
    gradient=_chinchilla_gradient,
    derived=OPTIMAL_EXPONENTS,
    source="Hoffmann et al. 2022, approach 3; a and b are the exponents of N*(C) and D*(C)",
)


def _kaplan(n0: float = 1.0, d0: float = 1.0) -> Law:
    """Kaplan's law as K ((N/n0)^-p + w d0/D)^aD with p = aN/aD, so that one coefficient is linear."""

    def report(p: Params) -> dict[str, Array]:
        n_c = n0 * p["K"] ** (1 / p["aN"])
        return {"aN": p["aN"], "aD": p["aD"], "Nc": n_c, "Dc": p["w"] * d0 * p["K"] ** (1 / p["aD"])}

    def basis(x: Columns, t: Params) -> Parts:
        size = np.exp(-t["aN"] / t["aD"] * (x.log("N") - np.log(n0)))
        return (np.exp(t["aD"] * np.log(size + t["w"] * d0 / x["D"])),)

    def gradient(x: Columns, t: Params, g: Parts) -> tuple[Parts, ...]:
        log_n, ratio = x.log("N") - np.log(n0), t["aN"] / t["aD"]
        size = np.exp(-ratio * log_n)
        inner = size + t["w"] * d0 / x["D"]
        by_size = g[0] * size / inner * log_n
        return (-by_size,), (g[0] * np.log(inner) + by_size * ratio,), (g[0] * t["aD"] / inner * d0 / x["D"],)

    return Law(
        name="kaplan",
        formula="L = ((Nc/N)^(aN/aD) + Dc/D)^aD",
        variables=("N", "D"),
        linear=(coefficient("K"),),
        nonlinear=(
            exponent("aN", 0.005, 2.0),
            exponent("aD", 0.005, 2.0),
            Parameter(name="w", bounds=(1e-6, 1e6), log=True),
        ),
        basis=basis,
        gradient=gradient,
        report=report,
        centred=lambda x: _kaplan(float(np.exp(np.mean(x.log("N")))), float(np.exp(np.mean(x.log("D"))))),
        source="Kaplan et al. 2020, equation 1.5",
    )


KAPLAN = _kaplan()


def effective(unique: Array, seen: Array, worth: Array) -> Array:
    """Effective amount U + U R (1 - exp(-(seen/U - 1) / R)) of something of which U is fresh and the rest repeated."""
    repeats = np.maximum(seen / unique, 1.0) - 1.0
    return unique + unique * worth * -np.expm1(-repeats / worth)


REPEATED = Law(
    name="repeated",
    formula="L = E + A N^-alpha + B D'^-beta, D' = U + U R_D (1 - exp(-(D/U - 1)/R_D))",
    variables=("N", "D", "U"),
    linear=(coefficient("E"), coefficient("A"), coefficient("B")),
    nonlinear=(exponent("alpha"), exponent("beta"), exponent("R_D", 0.1, 1e3)),
    basis=lambda x, t: (
        1.0,
        np.exp(-t["alpha"] * x.log("N")),
        effective(np.minimum(x["U"], x["D"]), x["D"], t["R_D"]) ** -t["beta"],
    ),
    source="Muennighoff et al. 2023, the data half",
)

REPEATED_DATA = Law(
    name="repeated_data",
    formula="L = E + B D'^-beta, D' = U + U R_D (1 - exp(-(D/U - 1)/R_D))",
    variables=("D", "U"),
    linear=(coefficient("E"), coefficient("B")),
    nonlinear=(exponent("beta"), exponent("R_D", 0.1, 1e3)),
    basis=lambda x, t: (1.0, effective(np.minimum(x["U"], x["D"]), x["D"], t["R_D"]) ** -t["beta"]),
    source="Muennighoff et al. 2023, the data half, at one size",
)

OVERTRAINED = Law(
    name="overtrained",
    formula="L = E + (a M^h + b M^-h) C^-h, M = D/N",
    variables=("N", "D", "C"),
    linear=(coefficient("E"), coefficient("a"), coefficient("b")),
    nonlinear=(exponent("h"),),
    basis=lambda x, t: (
        1.0,
        np.exp(t["h"] * (x.log("D") - x.log("N") - x.log("C"))),
        np.exp(-t["h"] * (x.log("D") - x.log("N") + x.log("C"))),
    ),
    gradient=lambda x, t, g: (
        (0.0, g[1] * (x.log("D") - x.log("N") - x.log("C")), -g[2] * (x.log("D") - x.log("N") + x.log("C"))),
    ),
    source="Gadre et al. 2024, equation 4",
)


def _range_of(name: str, variable: str, margin: float) -> Parameter:
    """A location within the data's range widened by `margin` of it on both sides."""

    def bounds(x: Columns) -> Bounds:
        low, high = float(x[variable].min()), float(x[variable].max())
        return low - margin * (high - low), high + margin * (high - low)

    return Parameter(name=name, bounds=bounds)


def _rate_of(name: str, variable: str) -> Parameter:
    """A rate per unit of a variable, from hardly curved to a step over the data's range."""

    def bounds(x: Columns) -> Bounds:
        span = float(np.ptp(x[variable]))
        return 0.01 / span, 100.0 / span

    return Parameter(name=name, bounds=bounds, log=True)


LINK_SIGMOID = Law(
    name="link_sigmoid",
    formula="accuracy = floor + (ceiling - floor) / (1 + exp(k (L - L0)))",
    variables=("L",),
    linear=(coefficient("floor"), coefficient("height")),
    nonlinear=(_rate_of("k", "L"), _range_of("L0", "L", 2.0)),
    basis=lambda x, t: (1.0, _sigmoid(-t["k"] * (x["L"] - t["L0"]))),
    report=lambda p: {"floor": p["floor"], "ceiling": p["floor"] + p["height"], "k": p["k"], "L0": p["L0"]},
    source="loss to accuracy, OLMo ladder (Bhagia et al. 2024)",
)

LINK_EXPONENTIAL = Law(
    name="link_exponential",
    formula="accuracy = 1 - eps + k exp(-gamma L)",
    variables=("L",),
    linear=(coefficient("floor"), coefficient("k")),
    nonlinear=(_rate_of("gamma", "L"),),
    basis=lambda x, t: (1.0, np.exp(-t["gamma"] * x["L"])),
    report=lambda p: {"eps": 1 - p["floor"], "k": p["k"], "gamma": p["gamma"]},
    source="loss to accuracy, Gadre et al. 2024 (there as error = eps - k exp(-gamma L)); the floor is 1 - eps",
)

COUPLED, FARSEER, OVERFITTING = coupled(), farseer(), overfitting()

_ONE_VARIABLE = {"power": lambda x: power(x, offset=False), "power_offset": power, "saturating": saturating}
"""Laws in one variable, as functions of its name."""

LAWS: dict[str, Law] = {name: make("x") for name, make in _ONE_VARIABLE.items()} | {
    law.name: law
    for law in (
        CHINCHILLA,
        KAPLAN,
        COUPLED,
        FARSEER,
        OVERTRAINED,
        REPEATED,
        REPEATED_DATA,
        OVERFITTING,
        LINK_SIGMOID,
        LINK_EXPONENTIAL,
    )
}
"""Name -> law; those in x go on any variable: `power_offset:N`."""


def find_law(name: str) -> Law:
    """A law by name; `power_offset:N` puts a one-variable law on a named variable or column.

    Raises:
        AnalysisError: the name is unknown.
    """
    base, _, variable = name.partition(":")
    if base in _ONE_VARIABLE and variable:
        return _ONE_VARIABLE[base](variable)
    if name not in LAWS:
        raise AnalysisError(f"There is no law named {name!r}; {did_you_mean(base, LAWS, 'such as')}")
    return LAWS[name]
