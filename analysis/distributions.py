"""Quantiles and tails of the usual distributions, by `scipy.special`: `scipy.stats` has them too, and takes half a
second to import."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import chdtri, fdtrc, ndtri, stdtr, stdtrit


def t_quantile(p: Any, degrees: Any) -> Any:
    """Return the value below which Student's t lies with probability p."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(degrees), ndtri(p), stdtrit(degrees, p))


def t_below(x: Any, degrees: Any) -> Any:
    """Return the probability that Student's t lies below x."""
    return stdtr(degrees, x)


def t_above(x: Any, degrees: Any) -> Any:
    """Return the probability that Student's t lies above x."""
    return stdtr(degrees, np.negative(x))


def f_above(x: Any, more: Any, free: Any) -> Any:
    """Return the probability that Fisher's F of (more, free) degrees of freedom lies above x."""
    return fdtrc(more, free, x)


def chi2_quantile(p: Any, degrees: Any) -> Any:
    """Return the value below which chi-squared lies with probability p."""
    return chdtri(degrees, 1 - p)


def normal_quantile(p: Any) -> Any:
    """Return the value below which the standard normal lies with probability p."""
    return ndtri(p)
