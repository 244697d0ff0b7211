"""Tables in, laws and pictures out. Imports neither torch nor the other rooms.

from aimscale.analysis import fit, laws, read_table
result = fit(laws.CHINCHILLA, read_table("results.parquet"))
print(result.sentence())
result.plot()
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "fit": "fitting.estimate",
    "held_out": "fitting.heldout",
    "correlate": "downstream.correlation",
    "all_approaches": "frontier.approaches",
    "read_table": "tables.results",
}
"""Public functions, imported at first use so that `aimscale --help` stays quick."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'aimscale.analysis' has no attribute {name!r}")
    _offer_plots()
    return getattr(importlib.import_module(f"aimscale.analysis.{_HOMES[name]}"), name)


def _offer_plots() -> None:
    """Give results their `plot` method: they know nothing of pictures themselves."""
    from aimscale.analysis.fitting.profiles import Profile
    from aimscale.analysis.fitting.result import Fit
    from aimscale.analysis.frontier.optimum import Frontier
    from aimscale.analysis.plots.laws import plot_frontier, plot_profile
    from aimscale.analysis.plots.scaling import plot_fit

    for kind, draw in ((Fit, plot_fit), (Frontier, plot_frontier), (Profile, plot_profile)):
        kind.plot = draw  # type: ignore[union-attr]
