"""Progress of a run: its saved budgets, and those that can still branch off its trunk; torch is not imported.

A finished run keeps the last saved point of its trunk, from which a longer budget goes on. Points before it are gone.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from aimscale.aim.errors import some
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import WEIGHTS_CRC32, RunDir, RunDirError
from aimscale.harness.run.files import file_crc32
from aimscale.harness.run.init import read_about
from aimscale.harness.run.schedule import Schedule, unchecked_schedule


def saved_budgets(run: RunDir) -> dict[int, dict[str, Any]]:
    """Return each budget whose weights are saved, ascending, with what training knew of it; empty if imported."""
    paths = run.root.glob("budgets/[0-9]*/model.safetensors")
    return dict(sorted((int(path.parent.name), read_about(path)) for path in paths))


def chosen_budgets(run: RunDir, images_seen: int | None) -> list[int]:
    """Return the saved budget of `images_seen` images as a list, or for None all saved budgets, ascending."""
    saved = list(saved_budgets(run))
    if not saved:
        raise RunDirError(f"{run.root} has no finished budget yet (no budgets/<images seen>/model.safetensors)")
    if images_seen not in (None, *saved):
        raise RunDirError(f"{run.root} has no saved budget of {images_seen} images; it has {some(saved)}")
    return saved if images_seen is None else [images_seen]


def check_weights(run: RunDir, images_seen: int) -> Path:
    """Compare a budget's weights with the CRC-32 that writing them left in its row, if any, and return their path.

    Raises:
        RunDirError: they are damaged.
    """
    path, rows = run.model_file(images_seen), {row["images_seen"]: row for row in run.read_rows()}
    expected = rows.get(images_seen, {}).get(WEIGHTS_CRC32)
    if expected is not None and path.is_file() and file_crc32(path) != expected:
        raise RunDirError(
            f"{path} is damaged: its CRC-32 is not that of the weights that were written; restore it from a copy, or "
            f"delete {run.root} to train it again"
        )
    return path


def trunk_position(run: RunDir, schedule: Schedule) -> int:
    """Return the images seen at the furthest saved point of the trunk; 0 without one."""
    points = [schedule.branch_point(budget) for budget in saved_budgets(run)]
    for path in run.checkpoints.glob("[0-9]*/manifest.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            manifest = json.loads(path.read_text())
            branch = manifest["branch"]
            points.append(manifest["images_seen"] if branch is None else schedule.branch_point(branch))
    return max(points, default=0)


def missing_budgets(run: RunDir, config: RunConfig) -> list[int]:
    """Return the budgets that are still to be trained."""
    done = {row["images_seen"] for row in run.read_rows()} | saved_budgets(run).keys()
    missing = [budget for budget in config.evaluation.budgets if budget not in done]
    schedule = unchecked_schedule(config)
    position = trunk_position(run, schedule)
    for budget in missing:
        if (point := schedule.branch_point(budget)) < position:
            raise RunDirError(
                f"budget {budget} of {run.root} needs a checkpoint at {point} images, and the earliest one kept is at "
                f"{position}; leave that budget out, or train it in another --root"
            )
    if missing and position and not (run.checkpoint_dir(position) / "manifest.json").exists():
        in_branch = any(run.checkpoints.glob("[0-9]*-decay-*/manifest.json"))
        if not in_branch:
            raise RunDirError(
                f"{run.root} cannot be extended to {missing[-1]} images: its last checkpoint before the decay, "
                f"checkpoints/{position}, is missing; train longer budgets in another --root"
            )
    return missing
