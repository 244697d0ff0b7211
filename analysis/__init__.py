"""Tables in, laws and figures out. Imports neither torch nor the other rooms.

    from aimscale.analysis import fit, laws, read_table

    result = fit(laws.CHINCHILLA, read_table("results.parquet"))
    result            # a few lines in a shell, a table in a notebook
    result.summary()  # everything in words
    result.plot()     # a matplotlib figure

Everything public is a name of this package, loaded when it is first used, so that `aimscale --help` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from aimscale.analysis import display

if TYPE_CHECKING:
    from aimscale.analysis import laws as laws
    from aimscale.analysis.baselines.comparison import compare as compare
    from aimscale.analysis.choice.backtest import choose as choose
    from aimscale.analysis.choice.proposal import propose as propose
    from aimscale.analysis.downstream.correlation import correlate as correlate
    from aimscale.analysis.downstream.links import forecast as forecast
    from aimscale.analysis.downstream.links import leaves_chance as leaves_chance
    from aimscale.analysis.downstream.links import link as link
    from aimscale.analysis.effects.contrasts import contrast as contrast
    from aimscale.analysis.effects.noise_sources import noise as noise
    from aimscale.analysis.effects.repetition import repeats as repeats
    from aimscale.analysis.errors import AnalysisError as AnalysisError
    from aimscale.analysis.fitting.curves import extrapolate as extrapolate
    from aimscale.analysis.fitting.estimate import fit as fit
    from aimscale.analysis.fitting.heldout import held_out as held_out
    from aimscale.analysis.fitting.influences import influence as influence
    from aimscale.analysis.fitting.profiles import profile as profile
    from aimscale.analysis.forecasts.ahead import ahead as ahead
    from aimscale.analysis.forecasts.collapse import collapse as collapse
    from aimscale.analysis.frontier.approaches import all_approaches as all_approaches
    from aimscale.analysis.frontier.definitions import by_definition as by_definition
    from aimscale.analysis.plots.curves import plot_collapse as plot_collapse
    from aimscale.analysis.plots.intervals import plot_contrasts as plot_contrasts
    from aimscale.analysis.plots.intervals import plot_definitions as plot_definitions
    from aimscale.analysis.plots.intervals import plot_noise as plot_noise
    from aimscale.analysis.plots.intervals import plot_repeats as plot_repeats
    from aimscale.analysis.plots.laws import plot_approaches as plot_approaches
    from aimscale.analysis.plots.laws import plot_cloud as plot_cloud
    from aimscale.analysis.plots.laws import plot_forecasts as plot_forecasts
    from aimscale.analysis.plots.laws import plot_frontier as plot_frontier
    from aimscale.analysis.plots.laws import plot_profile as plot_profile
    from aimscale.analysis.plots.laws import plot_surface as plot_surface
    from aimscale.analysis.plots.scaling import plot_fit as plot_fit
    from aimscale.analysis.plots.scaling import plot_points as plot_points
    from aimscale.analysis.plots.scaling import plot_residuals as plot_residuals
    from aimscale.analysis.plots.style import save as save
    from aimscale.analysis.report.page import write_report as write_report
    from aimscale.analysis.tables.inputs import read_tables as read_tables
    from aimscale.analysis.tables.results import probe_frame as probe_frame
    from aimscale.analysis.tables.results import read_table as read_table

_HOMES = {
    "baselines.comparison": ["compare"],
    "choice.backtest": ["choose"],
    "choice.proposal": ["propose"],
    "downstream.correlation": ["correlate"],
    "downstream.links": ["forecast", "leaves_chance", "link"],
    "effects.contrasts": ["contrast"],
    "effects.noise_sources": ["noise"],
    "effects.repetition": ["repeats"],
    "errors": ["AnalysisError"],
    "fitting.curves": ["extrapolate"],
    "fitting.estimate": ["fit"],
    "fitting.heldout": ["held_out"],
    "fitting.influences": ["influence"],
    "fitting.profiles": ["profile"],
    "forecasts.ahead": ["ahead"],
    "forecasts.collapse": ["collapse"],
    "frontier.approaches": ["all_approaches"],
    "frontier.definitions": ["by_definition"],
    "plots.curves": ["plot_collapse"],
    "plots.intervals": ["plot_contrasts", "plot_definitions", "plot_noise", "plot_repeats"],
    "plots.laws": [
        "plot_approaches", "plot_cloud", "plot_forecasts", "plot_frontier", "plot_profile", "plot_surface",
    ],
    "plots.scaling": ["plot_fit", "plot_points", "plot_residuals"],
    "plots.style": ["save"],
    "report.page": ["write_report"],
    "tables.inputs": ["read_tables"],
    "tables.results": ["probe_frame", "read_table"],
}  # fmt: skip
"""Module -> its public names; a test holds it equal to the imports above, which type checkers and editors read."""
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
_DRAWN_BY = {
    "Approaches": "plot_approaches",
    "Collapse": "plot_collapse",
    "Contrasts": "plot_contrasts",
    "Definitions": "plot_definitions",
    "Fit": "plot_fit",
    "Frontier": "plot_frontier",
    "Noise": "plot_noise",
    "Profile": "plot_profile",
    "Repeats": "plot_repeats",
}
display.FIGURES.update({kind: f"{__name__}.{_HOME_OF[plot]}:{plot}" for kind, plot in _DRAWN_BY.items()})

__all__ = ["laws", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name == "laws":
        return importlib.import_module(f"{__name__}.laws")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
