"""The catalogue of scaling laws: N parameters, D samples seen, U unique samples, C training FLOPs, L loss, x any scale.

Each is an `analysis.laws.base.Law`; `LAWS` lists them by the name that `aimscale fit --law` takes. Those whose terms
multiply are written around the data's geometric mean (n0, d0, u0), where their parameters are nearly independent;
`report` turns these into the parameters of the formula.
"""

from __future__ import annotations

import numpy as np

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.laws.base import Array, Bounds, Columns, Law, Parameter, Params, coefficient, exponent, scale_of
from aimscale.analysis.words import did_you_mean

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


def power(x: str = "x", *, offset: bool = True) -> Law:
    """Power law in one variable, with or without an offset."""
    head, ones = ((coefficient("E"),), (1.0,)) if offset else ((), ())
    return Law(
        name="power_offset" if offset else "power",
        formula=f"L = {'E + ' if offset else ''}A {x}^-a",
        variables=(x,),
        linear=(*head, coefficient("A")),
        nonlinear=(exponent("a"),),
        basis=lambda v, t: (*ones, np.exp(-t["a"] * v.log(x))),
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


def _falling(z: Array) -> Array:
    """1 / (1 + e^z), also of complex z (for the complex step) and of large z."""
    is_large = np.real(z) > 30
    return np.exp(-np.where(is_large, z, np.log1p(np.exp(np.where(is_large, 0, z)))))


CHINCHILLA = Law(
    name="chinchilla",
    formula="L = E + A N^-alpha + B D^-beta",
    variables=("N", "D"),
    linear=(coefficient("E"), coefficient("A"), coefficient("B")),
    nonlinear=(exponent("alpha"), exponent("beta")),
    basis=lambda x, t: (1.0, np.exp(-t["alpha"] * x.log("N")), np.exp(-t["beta"] * x.log("D"))),
    derived=OPTIMAL_EXPONENTS,
    source="Hoffmann et al. 2022, approach 3; a and b are the exponents of N*(C) and D*(C)",
)


def _kaplan(n0: float = 1.0, d0: float = 1.0) -> Law:
    """Kaplan's law as K ((N/n0)^-p + w d0/D)^aD with p = aN/aD, so that one coefficient is linear."""

    def report(p: Params) -> dict[str, Array]:
        n_c = n0 * p["K"] ** (1 / p["aN"])
        return {"aN": p["aN"], "aD": p["aD"], "Nc": n_c, "Dc": p["w"] * d0 * p["K"] ** (1 / p["aD"])}

    def basis(x: Columns, t: Params) -> tuple[Array, ...]:
        size = np.exp(-t["aN"] / t["aD"] * (x.log("N") - np.log(n0)))
        return (np.exp(t["aD"] * np.log(size + t["w"] * d0 / x["D"])),)

    return Law(
        name="kaplan",
        formula="L = ((Nc/N)^(aN/aD) + Dc/D)^aD",
        variables=("N", "D"),
        linear=(coefficient("K"),),
        nonlinear=(exponent("aN", 0.005, 2.0), exponent("aD", 0.005, 2.0), exponent("w", 1e-6, 1e6)),
        basis=basis,
        report=report,
        magnitudes=("Nc", "Dc"),
        centred=lambda x: _kaplan(_centre(x, "N"), _centre(x, "D")),
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
    basis=lambda x, t: (1.0, _falling(t["k"] * (x["L"] - t["L0"]))),
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


def _coupled_terms(x: Columns, t: Params, n0: float, d0: float) -> Array:
    """(A N^-alpha + B D^-beta)^c over its value at the centre's N."""
    size = np.exp(-t["alpha"] * (x.log("N") - np.log(n0)))
    data = np.exp(-t["beta"] * (x.log("D") - np.log(d0)))
    return np.exp(t["c"] * np.log(size + t["w"] * data))


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
        nonlinear=(exponent("alpha"), exponent("beta"), exponent("c", 0.02), exponent("w", 1e-3, 1e3)),
        basis=lambda x, t: (1.0, _coupled_terms(x, t, n0, d0)),
        report=lambda p: _coupled_report(p, n0, d0),
        magnitudes=("A", "B"),
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

    def basis(x: Columns, t: Params) -> tuple[Array, ...]:
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

    def basis(x: Columns, t: Params) -> tuple[Array, ...]:
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


def find_law(name: str | Law) -> Law:
    """A law by name, or the law itself; `power_offset:N` puts a one-variable law on a named variable or column.

    Raises:
        AnalysisError: the name is unknown, or something else stands in the law's place.
    """
    if isinstance(name, Law):
        return name
    if not isinstance(name, str):
        raise AnalysisError(f"A {type(name).__name__} is no law; give the table first, as in fit(table, 'chinchilla').")
    base, _, variable = name.partition(":")
    if base in _ONE_VARIABLE and variable:
        return _ONE_VARIABLE[base](variable)
    if name not in LAWS:
        raise AnalysisError(f"There is no law named {name!r}; {did_you_mean(base, LAWS, 'the laws are')}")
    return LAWS[name]
