"""Names of tasks in a table: one evaluation of a task bears its name, others are `task@evaluation`.

So a table keeps apart what was measured with other settings or on other images, whoever reads it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from aimscale.harness.data.store.card import fingerprint
from aimscale.harness.run.config import ProbeSection
from aimscale.harness.run.identity import probe_evaluation
from aimscale.sweeps.plan.planner import Run

Row = dict[str, Any]


def with_task_names(rows: Sequence[Row], runs: Sequence[Run]) -> list[Row]:
    """The rows with every probe's task named.

    The bare name is for the evaluation that the plan asks for (the first of that task), or for the only one that there
    is of a task that it does not name. A probe of an earlier version that does not say what it is of keeps its name.
    """
    bare = _planned(runs)
    found: dict[str, set[str]] = {}
    for row in rows:
        for entry in row.get("probes") or ():
            found.setdefault(entry["task"], set()).add(entry.get("evaluation", "*"))
    bare |= {task: names for task, names in found.items() if task not in bare and len(names) == 1}

    def named(entry: Row) -> Row:
        task, evaluation = entry["task"], entry.get("evaluation")
        if evaluation is None or any(fnmatch.fnmatch(evaluation, own) for own in bare.get(task, ())):
            return entry
        return {**entry, "task": f"{task}@{evaluation}"}

    return [{**row, "probes": [named(entry) for entry in row["probes"]]} if row.get("probes") else row for row in rows]


def _planned(runs: Sequence[Run]) -> dict[str, set[str]]:
    """Task -> evaluations that runs of the plan ask for."""
    names: dict[ProbeSection, str] = {}
    planned: dict[str, set[str]] = {}
    for run in runs:
        for section in {task.task: task for task in reversed(run.config.evaluation.probes)}.values():
            if section not in names:
                train, test = fingerprint(section.train), fingerprint(section.test)
                names[section] = probe_evaluation(section.model_dump(mode="json"), train, test)
            planned.setdefault(section.task, set()).add(names[section])
    return planned
