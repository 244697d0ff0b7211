"""A scaling law as a small object: `y = sum_j c_j g_j(x; t)`, linear in the coefficients c, non-linear in t.

Linearity in c makes a global optimum cheap (`analysis.fitting.problem`). A new law is ten lines (docs/extending.md):
names, bounds, and the g_j in numpy, of real and complex parameters: gradients are taken by the complex step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

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
