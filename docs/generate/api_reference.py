"""The reference of the Python API: every public name of `aimscale.analysis`, from its docstring."""

from __future__ import annotations

import inspect
import types

from aimscale import analysis


def markdown() -> str:
    """The page; functions first, then the module of laws."""
    parts = ["# Python API\n\n`from aimscale.analysis import ...`; imports neither torch nor the trainer.\n"]
    for name in dir(analysis):
        value = getattr(analysis, name)
        if isinstance(value, types.ModuleType):
            continue
        kind = "autoclass" if inspect.isclass(value) else "autofunction"
        parts.append(f"```{{eval-rst}}\n.. {kind}:: {value.__module__}.{name}\n```\n")
    laws = "".join(f"- `{name}`: {law.formula} ({law.source})\n" for name, law in analysis.laws.LAWS.items())
    return "\n".join([*parts, f"## Laws\n\n{laws}"])
