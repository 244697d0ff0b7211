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

MOST_PENALTY = 100.0
"""Largest penalty for repeats at the table's mean N/U, in units of the loss: beyond any loss that falls. A finite end
keeps the fit from measuring it at the table's mean scale, where often nothing is repeated and it is zero."""
OPTIMAL_EXPONENTS = {
    "a": lambda p: p["beta"] / (p["alpha"] + p["beta"]),
    "b": lambda p: p["alpha"] / (p["alpha"] + p["beta"]),
}
"""Exponents of N*(C) and D*(C) where the law falls by N^-alpha and D^-beta."""


def _centre(x: Columns, variable: str) -> float:
    """Return the geometric mean of a variable."""
    return float(np.exp(np.mean(x.log(variable))))


def power(x: str = "x", *, offset: bool = True) -> Law:
    """Make a power law in one variable, with or without an offset."""
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
    """Make a power law that levels off at small scale too."""
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
    """Return 1 / (1 + e^z), also of complex z (for the complex step) and of large z."""
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
    """Write Kaplan's law as K ((N/n0)^-p + w d0/D)^aD with p = aN/aD, so that one coefficient is linear."""

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
        scales={"Nc": "log", "Dc": "log"},
        centred=lambda x: _kaplan(_centre(x, "N"), _centre(x, "D")),
        source="Kaplan et al. 2020, equation 1.5",
    )


KAPLAN = _kaplan()


def effective(pool: Array, seen: Array, worth: Array) -> Array:
    """Return U + U R (1 - exp(-(seen/U - 1) / R)), U = min(pool, seen): what is seen, in new samples."""
    unique = np.minimum(pool, seen)
    return unique + unique * worth * -np.expm1((1.0 - seen / unique) / worth)


def repeated(*, sizes: bool = True) -> Law:
    """Make Chinchilla's law of effective data; without sizes its data half, for a table of one size."""
    coefficients, exponents = ((coefficient("A"),), (exponent("alpha"),)) if sizes else ((), ())

    def basis(x: Columns, t: Params) -> tuple[Array, ...]:
        data = effective(x["U"], x["D"], t["R_D"]) ** -t["beta"]
        return (1.0, np.exp(-t["alpha"] * x.log("N")), data) if sizes else (1.0, data)

    return Law(
        name="repeated",
        formula=f"L = E + {'A N^-alpha + ' * sizes}B D'^-beta, D' = U + U R_D (1 - exp(-(D/U - 1)/R_D))",
        variables=("N", "D", "U") if sizes else ("D", "U"),
        linear=(coefficient("E"), *coefficients, coefficient("B")),
        nonlinear=(*exponents, exponent("beta"), exponent("R_D", 0.1, 1e3)),
        basis=basis,
        scales={"R_D": "reciprocal"},
        source="Muennighoff et al. 2023, the data half",
    )


REPEATED = repeated()

REPEATED_BOTH = Law(
    name="repeated_both",
    formula="L = E + A N'^-alpha + B D'^-beta, D' = U + U R_D (1 - exp(-(D/U - 1)/R_D)), N' likewise of V with R_N",
    variables=("N", "D", "U", "V"),
    linear=(coefficient("E"), coefficient("A"), coefficient("B")),
    nonlinear=(exponent("alpha"), exponent("beta"), exponent("R_D", 0.1, 1e3), exponent("R_N", 0.1, 1e3)),
    basis=lambda x, t: (
        1.0,
        effective(x["V"], x["N"], t["R_N"]) ** -t["alpha"],
        effective(x["U"], x["D"], t["R_D"]) ** -t["beta"],
    ),
    scales={"R_D": "reciprocal", "R_N": "reciprocal"},
    source="Muennighoff et al. 2023, in full; V is the compute-optimal size for U new samples (theirs: 0.051 U)",
)


def overfitting(n0: float = 1.0, u0: float = 1.0) -> Law:
    """Add a penalty for repeats to Chinchilla's law: it grows with parameters per unique sample, and levels off.

    Where R0 lies beyond the repeats of the table it is the published law of one further coefficient, P = G/R0.
    """

    def basis(x: Columns, t: Params) -> tuple[Array, ...]:
        unique = np.minimum(x["U"], x["D"])
        repeats = x["D"] / unique - 1.0
        return *CHINCHILLA.basis(x, t), (x["N"] / n0) / (unique / u0) * repeats / (repeats + t["R0"])

    return Law(
        name="overfitting",
        formula="L = E + A N^-alpha + B D^-beta + G (N/U) R/(R + R0), R = D/U - 1",
        variables=("N", "D", "U"),
        linear=(*CHINCHILLA.linear, Parameter(name="G", bounds=(0.0, MOST_PENALTY))),
        nonlinear=(*CHINCHILLA.nonlinear, exponent("R0", 1.0, 1e4)),
        basis=basis,
        report=lambda p: {**p, "G": p["G"] * u0 / n0},
        scales={"R0": "reciprocal"},
        centred=lambda x: overfitting(_centre(x, "N"), _centre(x, "U")),
        source="the penalty of Lovelace et al. 2026 (arXiv 2605.01640) with exponents of 1; its levelling off is ours",
    )


OVERFITTING = overfitting()

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
    """Bound a location to the data's range widened by `margin` of it on both sides."""

    def bounds(x: Columns) -> Bounds:
        low, high = float(x[variable].min()), float(x[variable].max())
        return low - margin * (high - low), high + margin * (high - low)

    return Parameter(name=name, bounds=bounds)


def _rate_of(name: str, variable: str) -> Parameter:
    """Bound a rate per unit of a variable, from hardly curved to a step over the data's range."""

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


def coupled(n0: float = 1.0, d0: float = 1.0) -> Law:
    """Put Chinchilla's terms under one outer exponent; c = 1 is Chinchilla's law, E = 0 and beta = 1 Kaplan's."""

    def basis(x: Columns, t: Params) -> tuple[Array, ...]:
        size = np.exp(-t["alpha"] * (x.log("N") - np.log(n0)))
        data = np.exp(-t["beta"] * (x.log("D") - np.log(d0)))
        return 1.0, np.exp(t["c"] * np.log(size + t["w"] * data))

    def report(p: Params) -> dict[str, Array]:
        with np.errstate(over="ignore", divide="ignore"):
            level = p["K"] ** (1 / p["c"])
            a, b = level * n0 ** p["alpha"], level * p["w"] * d0 ** p["beta"]
        return {"E": p["E"], "A": a, "B": b, "alpha": p["alpha"], "beta": p["beta"], "c": p["c"]}

    return Law(
        name="coupled",
        formula="L = E + (A N^-alpha + B D^-beta)^c",
        variables=("N", "D"),
        linear=(coefficient("E"), coefficient("K")),
        nonlinear=(exponent("alpha"), exponent("beta"), exponent("c", 0.02), exponent("w", 1e-3, 1e3)),
        basis=basis,
        report=report,
        centred=lambda x: coupled(_centre(x, "N"), _centre(x, "D")),
        derived=OPTIMAL_EXPONENTS,
        source="Chinchilla's terms under Kaplan's outer exponent; a and b are the exponents of N*(C) and D*(C)",
    )


def _bent_log(log_x: Array, bend: Array) -> Array:
    """Return (x^bend - 1) / bend: a logarithm that bends up or down, ln x at bend = 0."""
    small = np.abs(bend) < 1e-8
    safe = np.where(small, 1.0, bend)
    return np.where(small, log_x * (1 + 0.5 * bend * log_x), np.expm1(safe * log_x) / safe)


def farseer(n0: float = 1.0, d0: float = 1.0) -> Law:
    """Make limit, coefficient and exponent of the data term stretched exponentials of the size.

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


COUPLED, FARSEER = coupled(), farseer()

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
        REPEATED_BOTH,
        OVERFITTING,
        LINK_SIGMOID,
        LINK_EXPONENTIAL,
    )
}
"""Name -> law; those in x go on any variable: `power_offset:N`."""


def find_law(name: str | Law) -> Law:
    """Find a law by name, or return it; `power_offset:N` puts a one-variable law on a named variable or column.

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
