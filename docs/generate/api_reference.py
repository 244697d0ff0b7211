"""The reference of the Python API: every public name of `aimscale.analysis` and `aimscale.sweeps`, by its docstring."""

from __future__ import annotations

import inspect
import types

from aimscale import analysis, sweeps

INTRODUCTION = """\
# Python API

`from aimscale.analysis import ...` imports neither torch nor the trainer. Every result has `headline()`, `table`,
`summary()` and `to_json()`. [The gallery](gallery.md) shows the figures with their calls.
"""
SWEEPS = """\
## Sweeps

`from aimscale.sweeps import ...` plans and launches; [a page](your-own-data.md#from-python) shows how.
"""
GROUPS = {
    "Tables": ("table",),
    "Laws": ("fitting",),
    "Compute-optimal frontiers": ("optimum",),
    "Learning rates": ("tuning",),
    "Loss and accuracy": ("correlation",),
    "What a change does": ("effects",),
    "Forecasts and what to run next": ("forecasts", "next"),
    "Figures": ("plots",),
    "Published models and the report": ("published", "report"),
    "Errors": ("errors",),
}
"""Heading -> packages of `analysis` whose public names stand under it."""


def markdown() -> str:
    """Write the page; the list of laws stands with their fit."""
    public = {name: getattr(analysis, name) for name in dir(analysis)}
    names = {name: each for name, each in public.items() if not isinstance(each, types.ModuleType)}
    laws = "".join(f"- `{name}`: `{law.formula}` ({law.source})\n" for name, law in analysis.laws.LAWS.items())
    parts = [INTRODUCTION]
    for heading, packages in GROUPS.items():
        parts.append(f"## {heading}\n")
        for name in [name for name, each in names.items() if each.__module__.split(".")[2] in packages]:
            kind = "autoclass" if inspect.isclass(names.pop(name)) else "autofunction"
            parts.append(f"```{{eval-rst}}\n.. {kind}:: aimscale.analysis.{name}\n```\n")
        if heading == "Laws":
            parts.append(f"The laws, by name:\n\n{laws}")
    if names:
        raise ValueError(f"no heading for {', '.join(names)}")
    parts.append(SWEEPS)
    for name in dir(sweeps):
        kind = "autoclass" if inspect.isclass(getattr(sweeps, name)) else "autofunction"
        parts.append(f"```{{eval-rst}}\n.. {kind}:: aimscale.sweeps.{name}\n```\n")
    return "\n".join(parts)
