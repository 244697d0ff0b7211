"""Expected losses of a run, forecast from the finished runs of its sweep.

A worker writes `expected.json` into the run directory (`sweeps.engine.forecasts`), renews it as more runs finish, and
compares the run with it while that trains. Torch is not imported here.
"""

from __future__ import annotations

import dataclasses

from pydantic import TypeAdapter

from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.files import read_as

FILE = "expected.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedPoint:
    """Forecast of a validation loss."""

    images_seen: int
    loss: float
    low: float
    """Low end of the 95 % interval of one run."""
    high: float
    """High end."""
    sd: float
    """Standard deviation of one run's ln loss about the forecast."""
    noise: float
    """Part of `sd` that belongs to this point alone; the rest is shared with the points nearby."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """Contents of `expected.json`."""

    basis: str
    """Runs that the forecast follows from, in words."""
    points: tuple[ExpectedPoint, ...]
    """Forecasts at points of the stable phase, ascending; none where no smaller run has come."""
    budgets: tuple[ExpectedPoint, ...] = ()
    """Forecasts at budgets, after their decays."""
    memory: float
    """Distance in ln images at which an error that points share is forgotten (to 1/e)."""
    alarm_sd: float | None = None
    """Deviation to either side beyond which an alarm is raised (null: never) ..."""
    false_alarm_rate: float = 0.0
    """... by this share of sound runs above, and as many below, at any of their points."""
    stop_sd: float | None = None
    """Deviation from which an alarm also stops the run; null for never."""


_EXPECTED = TypeAdapter(Expected)


def read_expected(run: RunDir) -> Expected | None:
    """Read the forecast of a run; None if there is none."""
    return read_as(run.root / FILE, _EXPECTED)
