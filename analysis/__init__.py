"""Tables in, laws and figures out. Imports neither torch nor the other packages.

    from aimscale.analysis import fit, laws, read_table

    result = fit(read_table("results.parquet"), laws.CHINCHILLA)
    result            # a few lines in a shell, a table in a notebook
    result.summary()  # everything in words
    result.plot()     # a matplotlib figure

Everything public is a name of this package, listed in `__init__.pyi` and loaded when it is first used, so that
`aimscale --help` stays quick.
"""

from collections.abc import Callable, Mapping
from typing import Any

import lazy_loader

from aimscale.analysis.display import Drawing

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def _drawings() -> Mapping[type, Callable[..., Any]]:
    from aimscale.analysis.plots import DRAWINGS  # matplotlib is slow to import

    return DRAWINGS


Drawing.functions = _drawings
