"""Tables in, laws and pictures out. Imports neither torch nor the other rooms.

from aimscale.analysis import fit, laws, read_table
result = fit(laws.CHINCHILLA, read_table("results.parquet"))
print(result.sentence())
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "fit": "aimscale.analysis.fitting.estimate",
    "held_out": "aimscale.analysis.fitting.heldout",
    "correlate": "aimscale.analysis.downstream.correlation",
    "all_approaches": "aimscale.analysis.frontier.approaches",
    "read_table": "aimscale.analysis.tables.results",
}
"""Public functions, imported at first use so that `aimscale --help` stays quick."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'analysis' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
