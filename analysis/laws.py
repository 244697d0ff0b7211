"""Scaling laws: a law as a small object, `y = sum_j c_j g_j(x; t)`, linear in the coefficients c, non-linear in t, and
the catalogue: N parameters, D samples seen, U unique samples, C training FLOPs, L loss, x any scale.

Linearity in c makes a global optimum cheap (`analysis.fitting.problem`). A new law is ten lines (docs/extending.md):
names, bounds, and the g_j in numpy, of real and complex parameters: gradients are taken by the complex step. `LAWS`
lists them by the name that `aimscale fit --law` takes. Those whose terms multiply are written over the data's geometric
means (N0, D0, U0); `report` turns their parameters into the formula's. All functions are at module level, so that laws
and fits can be pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from aimscale.analysis.display import did_you_mean
from aimscale.analysis.errors import AnalysisError

Array = Any  # float64 ndarray; `Any` because numpy's stubs do not follow broadcasting
Bounds = tuple[float, float]
PLATEAU_STEPS = 700
"""Training steps before which a loss stands on its first plateau and follows no law, at the rate of the recipe `small`.
In steps at that rate, CIFAR-10's runs had left it at 880, Fashion-MNIST's at 540 and not at 270, the demo's hardly at
630."""


class Columns(dict[str, Array]):
    """The variables of a law, name -> float64 array (n,), with their logarithms kept after the first use."""

    def log(self, name: str) -> Array:
        """Natural logarithm of a variable."""
        key = f"ln {name}"
        if key not in self:
            self[key] = np.log(self[name])
        return self[key]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a law."""

    name: str
    bounds: Bounds | Callable[[Columns], Bounds]
    """Lowest and highest value, or a function of the data that returns them."""
    log: bool = False
    """Search on a logarithmic scale (exponents, scales)."""


def coefficient(name: str) -> Parameter:
    """Make a linear parameter that cannot be negative."""
    return Parameter(name=name, bounds=(0.0, np.inf))


def exponent(name: str, lower: float = 0.005, upper: float = 5.0) -> Parameter:
    """Make a positive exponent or rate, searched on a logarithmic scale."""
    return Parameter(name=name, bounds=(lower, upper), log=True)


Params = Mapping[str, Array]
Basis = Callable[[Columns, Params], tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class Law:
    """A formula with its variables, its parameters and their bounds."""

    name: str
    formula: str
    variables: tuple[str, ...]
    """Names of the inputs: N parameters, D samples, C FLOPs, U unique samples, x anything, L loss."""
    linear: tuple[Parameter, ...]
    """Coefficients c_j, in the order of the basis."""
    nonlinear: tuple[Parameter, ...]
    """Parameters t inside the basis functions."""
    basis: Basis
    """(x, t) -> the g_j, each broadcastable to (..., n); t holds arrays (..., 1), and `constants`."""
    report: Callable[[Params], dict[str, Array]] | None = None
    """Published parameters where those differ (Kaplan's Nc, Dc), from the law's own and `constants`."""
    constants: Mapping[str, float] = field(default_factory=dict)
    """N0, D0 or U0, over which the basis takes variables, so that parameters are nearly independent (`centred`)."""
    derived: Mapping[str, Callable[[Params], Array]] = field(default_factory=dict)
    """Further quantities that deserve an interval, e.g. the exponent of N*(C)."""
    scales: Mapping[str, str] = field(default_factory=dict)
    """Parameter -> the scale of its interval where that is not its own: `log`, or `reciprocal` without an upper end."""
    source: str = ""
    """Paper and equation."""

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Linear first, then non-linear: the order of every parameter vector."""
        return self.linear + self.nonlinear

    @property
    def names(self) -> tuple[str, ...]:
        """Names of `parameters`."""
        return tuple(p.name for p in self.parameters)

    def centred(self, x: Columns) -> Law:
        """Set the constants to the geometric means of the data."""
        return replace(self, constants={name: float(np.exp(np.mean(x.log(name[:-1])))) for name in self.constants})

    def value(self, x: Mapping[str, Array], params: Params) -> Array:
        """Return y of the law; parameters may carry leading batch dimensions, the result is (..., n)."""
        columns = x if isinstance(x, Columns) else Columns({k: np.asarray(v, float) for k, v in x.items()})
        t = {name: np.asarray(value)[..., None] for name, value in params.items()}
        parts = self.basis(columns, {**t, **self.constants})
        return sum(t[p.name] * g for p, g in zip(self.linear, parts, strict=True))

    def quantities(self, params: Params) -> dict[str, Array]:
        """Return the law's own parameters, and `reported` ones in place of those of their name."""
        return {**params, **self.reported(params)}

    def reported(self, params: Params) -> dict[str, Array]:
        """Return the published parameters and derived quantities, from the fitted parameters."""
        shown = dict(params) if self.report is None else self.report({**params, **self.constants})
        return {**shown, **{name: function(params) for name, function in self.derived.items()}}


Terms = tuple[Array | float, ...]


def _power(v: Columns, t: Params, *, x: str, offset: bool) -> Terms:
    return *[1.0] * offset, np.exp(-t["a"] * v.log(x))


def power(x: str = "x", *, offset: bool = True) -> Law:
    """Make a power law in one variable, with or without an offset."""
    return Law(
        name="power_offset" if offset else "power",
        formula=f"L = {'E + ' * offset}A {x}^-a",
        variables=(x,),
        linear=(*[coefficient("E")] * offset, coefficient("A")),
        nonlinear=(exponent("a"),),
        basis=partial(_power, x=x, offset=offset),
        source="M2 of Alabdulmohsin et al. 2022" if offset else "Kaplan et al. 2020; M1 of Alabdulmohsin et al. 2022",
    )


def _chinchilla(x: Columns, t: Params) -> Terms:
    return 1.0, np.exp(-t["alpha"] * x.log("N")), np.exp(-t["beta"] * x.log("D"))


def _size_exponent(p: Params) -> Array:
    return p["beta"] / (p["alpha"] + p["beta"])


def _data_exponent(p: Params) -> Array:
    return p["alpha"] / (p["alpha"] + p["beta"])


OPTIMAL_EXPONENTS = {"a": _size_exponent, "b": _data_exponent}
"""Exponents of N*(C) and D*(C) where the law falls by N^-alpha and D^-beta."""

CHINCHILLA = Law(
    name="chinchilla",
    formula="L = E + A N^-alpha + B D^-beta",
    variables=("N", "D"),
    linear=(coefficient("E"), coefficient("A"), coefficient("B")),
    nonlinear=(exponent("alpha"), exponent("beta")),
    basis=_chinchilla,
    derived=OPTIMAL_EXPONENTS,
    source="Hoffmann et al. 2022, approach 3; a and b are the exponents of N*(C) and D*(C)",
)


def _coupled(x: Columns, t: Params) -> Terms:
    size = np.exp(-t["alpha"] * (x.log("N") - np.log(t["N0"])))
    data = np.exp(-t["beta"] * (x.log("D") - np.log(t["D0"])))
    return 1.0, np.exp(t["c"] * np.log(size + t["w"] * data))


def _kaplan(x: Columns, t: Params) -> Terms:
    size = np.exp(-t["aN"] / t["aD"] * (x.log("N") - np.log(t["N0"])))
    return (np.exp(t["aD"] * np.log(size + t["w"] * t["D0"] / x["D"])),)


def _kaplan_report(p: Params) -> dict[str, Array]:
    n_c, d_c = p["N0"] * p["K"] ** (1 / p["aN"]), p["w"] * p["D0"] * p["K"] ** (1 / p["aD"])
    return {"aN": p["aN"], "aD": p["aD"], "Nc": n_c, "Dc": d_c}


KAPLAN = Law(
    name="kaplan",
    formula="L = ((Nc/N)^(aN/aD) + Dc/D)^aD",
    variables=("N", "D"),
    linear=(coefficient("K"),),
    nonlinear=(exponent("aN", 0.005, 2.0), exponent("aD", 0.005, 2.0), exponent("w", 1e-6, 1e6)),
    basis=_kaplan,
    report=_kaplan_report,
    constants={"N0": 1.0, "D0": 1.0},
    scales={"Nc": "log", "Dc": "log"},
    source="Kaplan et al. 2020, equation 1.5",
)


def effective(pool: Array, seen: Array, worth: Array) -> Array:
    """Return U + U R (1 - exp(-(seen/U - 1) / R)), U = min(pool, seen): what is seen, in new samples."""
    unique = np.minimum(pool, seen)
    return unique + unique * worth * -np.expm1((1.0 - seen / unique) / worth)


def _repeated(x: Columns, t: Params) -> Terms:
    data = effective(x["U"], x["D"], t["R_D"]) ** -t["beta"]
    if "R_N" in t:
        return 1.0, effective(x["V"], x["N"], t["R_N"]) ** -t["alpha"], data
    return (1.0, np.exp(-t["alpha"] * x.log("N")), data) if "alpha" in t else (1.0, data)


def repeated(*, sizes: bool = True) -> Law:
    """Make Chinchilla's law of effective data; without sizes its data half, for a table of one size."""
    return Law(
        name="repeated",
        formula=f"L = E + {'A N^-alpha + ' * sizes}B D'^-beta, D' = U + U R_D (1 - exp(-(D/U - 1)/R_D))",
        variables=("N", "D", "U") if sizes else ("D", "U"),
        linear=(coefficient("E"), *[coefficient("A")] * sizes, coefficient("B")),
        nonlinear=(*[exponent("alpha")] * sizes, exponent("beta"), exponent("R_D", 0.1, 1e3)),
        basis=_repeated,
        scales={"R_D": "reciprocal"},
        source="Muennighoff et al. 2023, the data half",
    )


REPEATED = repeated()

REPEATED_BOTH = Law(
    name="repeated_both",
    formula="L = E + A N'^-alpha + B D'^-beta, D' = U + U R_D (1 - exp(-(D/U - 1)/R_D)), N' likewise of V with R_N",
    variables=("N", "D", "U", "V"),
    linear=CHINCHILLA.linear,
    nonlinear=(*CHINCHILLA.nonlinear, exponent("R_D", 0.1, 1e3), exponent("R_N", 0.1, 1e3)),
    basis=_repeated,
    scales={"R_D": "reciprocal", "R_N": "reciprocal"},
    source="Muennighoff et al. 2023, in full; V is the compute-optimal size for U new samples (theirs: 0.051 U)",
)


def _penalised(x: Columns, t: Params) -> Terms:
    unique = np.minimum(x["U"], x["D"])
    return *_chinchilla(x, t), x["N"] / unique * (x["D"] / unique - 1.0)


PENALISED = Law(
    name="penalised",
    formula="L = E + A N^-alpha + B D^-beta + G (N/U) (D/U - 1)",
    variables=("N", "D", "U"),
    linear=(*CHINCHILLA.linear, coefficient("G")),
    nonlinear=CHINCHILLA.nonlinear,
    basis=_penalised,
    source="Lovelace et al. 2026 (arXiv 2605.01640), with exponents of 1",
)
"""Chinchilla's law with a penalty for repeats, larger for large models; `repeated` tells what a repeat is worth."""


def _overtrained(x: Columns, t: Params) -> Terms:
    per_parameter = x.log("D") - x.log("N")
    return 1.0, np.exp(t["h"] * (per_parameter - x.log("C"))), np.exp(-t["h"] * (per_parameter + x.log("C")))


OVERTRAINED = Law(
    name="overtrained",
    formula="L = E + (a M^h + b M^-h) C^-h, M = D/N",
    variables=("N", "D", "C"),
    linear=(coefficient("E"), coefficient("a"), coefficient("b")),
    nonlinear=(exponent("h"),),
    basis=_overtrained,
    source="Gadre et al. 2024, equation 4",
)


def _loss_range(x: Columns) -> Bounds:
    low, high = float(x["L"].min()), float(x["L"].max())
    return low - 2 * (high - low), high + 2 * (high - low)


def _loss_rates(x: Columns) -> Bounds:
    span = float(np.ptp(x["L"]))
    return 0.01 / span, 100.0 / span  # from hardly curved to a step over the data's range


def _sigmoid(x: Columns, t: Params) -> Terms:
    with np.errstate(over="ignore"):
        return 1.0, 1 / (1 + np.exp(t["k"] * (x["L"] - t["L0"])))


def _sigmoid_report(p: Params) -> dict[str, Array]:
    return {"floor": p["floor"], "ceiling": p["floor"] + p["height"], "k": p["k"], "L0": p["L0"]}


LINK_SIGMOID = Law(
    name="link_sigmoid",
    formula="accuracy = floor + (ceiling - floor) / (1 + exp(k (L - L0)))",
    variables=("L",),
    linear=(coefficient("floor"), coefficient("height")),
    nonlinear=(Parameter(name="k", bounds=_loss_rates, log=True), Parameter(name="L0", bounds=_loss_range)),
    basis=_sigmoid,
    report=_sigmoid_report,
    source="loss to accuracy, OLMo ladder (Bhagia et al. 2024)",
)


def _coupled_report(p: Params) -> dict[str, Array]:
    with np.errstate(over="ignore", divide="ignore"):
        level = p["K"] ** (1 / p["c"])
        a, b = level * p["N0"] ** p["alpha"], level * p["w"] * p["D0"] ** p["beta"]
    return {"E": p["E"], "A": a, "B": b, "alpha": p["alpha"], "beta": p["beta"], "c": p["c"]}


COUPLED = Law(
    name="coupled",
    formula="L = E + (A N^-alpha + B D^-beta)^c",
    variables=("N", "D"),
    linear=(coefficient("E"), coefficient("K")),
    nonlinear=(exponent("alpha"), exponent("beta"), exponent("c", 0.02), exponent("w", 1e-3, 1e3)),
    basis=_coupled,
    report=_coupled_report,
    constants={"N0": 1.0, "D0": 1.0},
    derived=OPTIMAL_EXPONENTS,
    source="Videau et al. 2026 (arXiv 2608.07222), their Skaling law; a and b are the exponents of N*(C) and D*(C)",
)
"""Chinchilla's law at c = 1, Kaplan's at E = 0 and beta = 1."""


def _bent_log(log_x: Array, bend: Array) -> Array:
    """Return (x^bend - 1) / bend: a logarithm that bends up or down, ln x at bend = 0."""
    small = np.abs(bend) < 1e-8
    safe = np.where(small, 1.0, bend)
    return np.where(small, log_x * (1 + 0.5 * bend * log_x), np.expm1(safe * log_x) / safe)


def _farseer(x: Columns, t: Params) -> Terms:
    """Return limit and data term. With h_i = ((N/N0)^g_i - 1) / g_i the limit is E exp(-s3 h_3), the exponent of D is
    d exp(s1 h_1), and the coefficient's logarithm falls by s2 h_2 beside what a changing exponent does to it at D0."""
    log_n, log_d0 = x.log("N") - np.log(t["N0"]), np.log(t["D0"])
    exponents = t["d"] * np.exp(t["s1"] * _bent_log(log_n, t["alpha"]))
    fall = (t["s2"] - t["d"] * t["s1"] * log_d0) * _bent_log(log_n, t["beta"])
    limit = np.exp(-t["s3"] * _bent_log(log_n, t["gamma"]))
    return limit, np.exp(-fall - (exponents - t["d"]) * log_d0 - exponents * (x.log("D") - log_d0))


def _farseer_report(p: Params) -> dict[str, Array]:
    log_d0 = np.log(p["D0"])
    with np.errstate(over="ignore", divide="ignore"):
        slopes = {1: (p["s1"], "alpha"), 2: (p["d"] * p["s1"] * log_d0 - p["s2"], "beta"), 3: (-p["s3"], "gamma")}
        a = {i: s * p["N0"] ** -p[bend] / p[bend] for i, (s, bend) in slopes.items()}
        levels = {1: np.log(p["d"]), 2: np.log(p["B"]) + p["d"] * log_d0, 3: np.log(p["E"])}
        b = {i: levels[i] - s / p[bend] for i, (s, bend) in slopes.items()}
    out = {f"{name}{i}": values[i] for i in (1, 2, 3) for name, values in (("a", a), ("b", b))}
    return {**out, "alpha": p["alpha"], "beta": p["beta"], "gamma": p["gamma"]}


FARSEER = Law(
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
    basis=_farseer,
    report=_farseer_report,
    constants={"N0": 1.0, "D0": 1.0},
    source="Farseer (Li et al. 2025)",
)

_ONE_VARIABLE: dict[str, Callable[[str], Law]] = {"power": partial(power, offset=False), "power_offset": power}
"""Laws in one variable, as functions of its name."""
_JOINT = (CHINCHILLA, KAPLAN, COUPLED, FARSEER, OVERTRAINED, REPEATED, REPEATED_BOTH, PENALISED)

LAWS = {law.name: law for law in (*(make("x") for make in _ONE_VARIABLE.values()), *_JOINT, LINK_SIGMOID)}
"""Name -> law; those in x go on any variable: `power_offset:N`."""


def find_law(name: str | Law) -> Law:
    """Find a law by name, or return it; `power_offset:N` puts a one-variable law on a named variable or column."""
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
