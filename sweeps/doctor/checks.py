"""What one check of `aimscale doctor` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """What was found about one thing."""

    name: str
    """The thing."""
    level: Level
    """`ok`; `warn`: works, but something may go wrong or be slow; `fail`: something needed does not work."""
    found: str
    """What there is."""
    advice: str = ""
    """One sentence on what to do; empty where nothing is to be done."""
