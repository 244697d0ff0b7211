"""What a run lacks: budgets to train, and what is to be measured on those that are there; torch is not imported.

One list for all who ask: the trainer works it off, launchers start runs that have one, `aimscale status` counts it.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator
from typing import Any, Literal

from aimscale.harness.probe.files import finished_entries, validation_name
from aimscale.harness.run.config import ProbeSection, RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.trunk import missing_budgets, saved_budgets


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lacking:
    """One thing that a run lacks at one of its budgets."""

    what: Literal["training", "validation", "probe"]
    images_seen: int
    """The budget."""
    section: ProbeSection | None = None
    """The task of a probe."""

    def __str__(self) -> str:
        return f"{self.section.task if self.section else self.what} at {self.images_seen}"


def lacking(run: RunDir, config: RunConfig) -> list[Lacking]:
    """What `config` asks of a run and is not there: the run is finished when nothing is left.

    Something is there when its file is, of the present weights, settings and data, and the budget's row says so too.
    Data that cannot be looked at count as unchanged.

    Raises:
        RunDirError: no saved point of the trunk leads to a budget that is still to be trained.
        UserError: `results.json` is damaged.
    """
    found = [Lacking(what="training", images_seen=budget) for budget in missing_budgets(run, config)]
    rows = {row["images_seen"]: row for row in run.read_rows()}
    for budget in saved_budgets(run):
        if budget in config.evaluation.budgets:
            found += _unmeasured(run, config, budget, rows.get(budget, {}))
    return found


def _unmeasured(run: RunDir, config: RunConfig, budget: int, row: dict[str, Any]) -> Iterator[Lacking]:
    name = validation_name(run, config, budget)
    is_named = row.get("val_loss") is not None and fnmatch.fnmatch(str(row.get("validation")), name)
    if not is_named or not run.validation_file(budget).exists():
        yield Lacking(what="validation", images_seen=budget)
    there = row.get("probes") or []
    for section in config.evaluation.probes:
        entries = finished_entries(run, config, budget, section)
        if entries is None or not all(entry in there for entry in entries):
            yield Lacking(what="probe", images_seen=budget, section=section)
