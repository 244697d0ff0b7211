"""The joint law of two recipes: terms that both share, and terms of each one's own."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import numpy as np

from aimscale.analysis.laws.base import Array, Columns, Law, Params, coefficient, exponent

TERMS = ("E", "A", "B", "alpha", "beta")
"""Parameters of L = E + A N^-alpha + B D^-beta that two recipes may share."""


def _terms(x: Columns, t: Params, *, share: frozenset[str]) -> tuple[Array, ...]:
    level = x.log("G") / np.log(2.0)
    power = {
        "E": [np.ones_like(level)] * 2,
        "A": [np.exp(-t["alpha" + ("" if "alpha" in share else own)] * x.log("N")) for own in ("", "_2")],
        "B": [np.exp(-t["beta" + ("" if "beta" in share else own)] * x.log("D")) for own in ("", "_2")],
    }
    parts = list[Array]()
    for name, (first, second) in power.items():
        both = (1 - level) * first, level * second
        parts += [both[0] + both[1]] if name in share else both
    return tuple(parts)


def pair(share: Collection[str] = ("E", "alpha", "beta")) -> Law:
    """Make Chinchilla's law of two recipes, G = 1 and G = 2; what they do not share has a second parameter, as A_2."""
    names = {name: [name] if name in share else [name, f"{name}_2"] for name in TERMS}
    own = ", ".join(name for name in TERMS if name not in share) or "nothing"
    return Law(
        name="pair",
        formula=f"L = E + A N^-alpha + B D^-beta, each recipe with its own {own}",
        variables=("N", "D", "G"),
        linear=tuple(coefficient(each) for name in "EAB" for each in names[name]),
        nonlinear=tuple(exponent(each) for name in ("alpha", "beta") for each in names[name]),
        basis=partial(_terms, share=frozenset(share)),
        source="Hoffmann et al. 2022, approach 3, of two recipes",
    )
