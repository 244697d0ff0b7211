"""Plans: the runs of a sweep file, their checks and their cost cards."""

from pathlib import Path

DEFAULT_ROOT = Path("aimscale-runs")
"""Folder of sweeps, unless another is named."""
