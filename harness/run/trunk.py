"""How far the trunk of a run has come, and which budgets can still branch off it; torch is not imported here.

A finished run keeps the last saved point of its trunk, from which a longer budget goes on. Points before it are gone.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir, RunDirError
from aimscale.harness.run.schedule import Schedule, unchecked_schedule


def saved_budgets(run: RunDir) -> dict[int, dict[str, Any]]:
    """Budget -> `model.json` beside its weights, for all whose weights are saved, ascending."""
    found = {}
    for path in (run.path / "budgets").glob("[0-9]*/model.json"):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            document = json.loads(path.read_text())
            if isinstance(document, dict):
                found[int(path.parent.name)] = document
    return dict(sorted(found.items()))


def trunk_position(run: RunDir, schedule: Schedule) -> int:
    """Images seen at the furthest point of the trunk that was saved; 0 where there is none."""
    points = [schedule.branch_point(budget) for budget in saved_budgets(run)]
    for path in run.checkpoints.glob("[0-9]*/manifest.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            manifest = json.loads(path.read_text())
            branch = manifest["branch"]
            points.append(manifest["images_seen"] if branch is None else schedule.branch_point(branch))
    return max(points, default=0)


def missing_budgets(run: RunDir, config: RunConfig) -> list[int]:
    """Budgets that are still to be trained.

    Raises:
        RunDirError: no saved point of the trunk leads to one of them; nothing was touched.
        ValueError, TypeError, KeyError: `results.json` is damaged.
    """
    recorded = {row["images_seen"] for row in run.read_rows()}
    saved = saved_budgets(run)
    missing = [budget for budget in config.evaluation.budgets if budget not in recorded and budget not in saved]
    schedule = unchecked_schedule(config)
    position = trunk_position(run, schedule)
    for budget in missing:
        check_branch(run, schedule, budget, position)
    if missing and position and not (run.checkpoint_dir(position) / "manifest.json").exists():
        in_branch = any(run.checkpoints.glob("[0-9]*-decay-*/manifest.json"))
        if not in_branch:
            raise RunDirError(
                f"{run.path} cannot be extended to {missing[-1]} images: the end of its trunk, checkpoints/{position}, "
                f"is not there (removed, or finished under an earlier version); train longer budgets in another --root"
            )
    return missing


def check_branch(run: RunDir, schedule: Schedule, budget: int, position: int) -> None:
    """Raise RunDirError where a budget leaves the trunk before `position`, the earliest point that is kept."""
    point = schedule.branch_point(budget)
    if point < position:
        raise RunDirError(
            f"budget {budget} of {run.path} leaves the trunk at image {point}, which has gone on to image {position}; "
            f"leave that budget out, or train it in another --root"
        )
