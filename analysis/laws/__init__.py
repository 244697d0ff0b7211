"""Scaling laws: what a law is, and the catalogue. `laws.CHINCHILLA` is a law, `laws.LAWS` holds all of them by name."""

from aimscale.analysis.laws.base import Law, Parameter, coefficient, exponent  # noqa: F401
from aimscale.analysis.laws.catalogue import (  # noqa: F401
    CHINCHILLA,
    COUPLED,
    FARSEER,
    KAPLAN,
    LAWS,
    LINK_SIGMOID,
    OVERTRAINED,
    PENALISED,
    REPEATED,
    REPEATED_BOTH,
    find_law,
    repeated,
)
