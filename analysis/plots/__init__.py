"""Figures, by the class of the result that they show."""

from aimscale.analysis.correlation import Correlations
from aimscale.analysis.effects.recipes import Recipes
from aimscale.analysis.effects.result import Contrasts
from aimscale.analysis.fitting.held_out import HeldOut
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.forecasts.forecast import Forecast
from aimscale.analysis.forecasts.trajectory import Trajectory
from aimscale.analysis.optimum.approaches import Approaches
from aimscale.analysis.plots import accuracy, scaling
from aimscale.analysis.published import Comparison
from aimscale.analysis.tuning.result import Rates

DRAWINGS = {
    Fit: scaling.plot_fit,
    HeldOut: scaling.plot_held_out,
    Forecast: scaling.plot_forecast,
    Trajectory: scaling.plot_trajectory,
    Approaches: scaling.plot_approaches,
    Rates: scaling.plot_rates,
    Recipes: scaling.plot_recipes,
    Contrasts: accuracy.plot_contrasts,
    Correlations: accuracy.plot_correlations,
    Comparison: accuracy.plot_comparison,
}
"""Class of a result -> the function that draws it."""
