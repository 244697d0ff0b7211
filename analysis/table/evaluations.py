"""Names of tasks in a table, which tell evaluations of other settings or images apart."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

Row = dict[str, Any]


def name_tasks(rows: Sequence[Row], requested: Mapping[str, Collection[str]]) -> list[Row]:
    """Rename the tasks of rows' `probes` to `task@evaluation`, but for one evaluation of each task.

    A task keeps its bare name for the evaluations that were requested, or for its only one if none was.

    Args:
        requested: task -> patterns of the evaluations that keep its name.
    """
    found: dict[str, set[str]] = {}
    for entry in (entry for row in rows for entry in row.get("probes") or ()):
        found.setdefault(entry["task"], set()).add(entry.get("evaluation", "*"))
    bare = {task: names for task, names in found.items() if len(names) == 1} | dict(requested)

    def named(entry: Row) -> Row:
        task, evaluation = entry["task"], entry.get("evaluation")
        if evaluation is None or any(fnmatch(evaluation, pattern) for pattern in bare.get(task, ())):
            return entry
        return entry | {"task": f"{task}@{evaluation}"}

    return [row | {"probes": [*map(named, row["probes"])]} if row.get("probes") else row for row in rows]
