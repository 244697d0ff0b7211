"""What a killed probe goes on from."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import torch

from aimscale.harness.device.distributed import Group
from aimscale.harness.run.files import written_aside

SAVE_EVERY_S = 10.0
"""Training of heads is saved at this distance, or at `SAVE_RATIO` times what saving takes if that is longer."""
SAVE_RATIO = 20


class ProbeProgress:
    """What a killed probe goes on from: a file for each part of its work, rewritten whenever some of it is done.

    `key` names everything the state depends on; a file with another key, or a damaged one, is ignored. A task's lock
    keeps other processes away.
    """

    def __init__(self, folder: Path, task: str, key: str):
        self._folder, self._task, self._key = folder, task, key

    def _path(self, part: str) -> Path:
        return self._folder / f"{self._task}.{part}.partial.pt"

    def save(self, part: str, state: dict[str, Any]) -> None:
        """Write tensors and plain values aside, then rename."""
        with written_aside(self._path(part), durable=False) as aside:
            torch.save({**state, "key": self._key}, aside)

    def load(self, part: str) -> dict[str, Any] | None:
        """The state of a part; None when there is nothing to go on from."""
        path = self._path(part)
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a file that it cannot read
            print(f"{path} is damaged ({type(error).__name__}); that part of the work is done again", flush=True)
            return None
        return state if state["key"] == self._key else None

    def clear(self) -> None:
        """Remove the files: the task is done."""
        for path in self._folder.glob(f"{self._task}.*.partial.*"):
            path.unlink(missing_ok=True)


class StepSaver:
    """Saves a training by time: each rank writes its part of the state, and all go on from one step.

    With `is_shared` every rank has the whole state, and the first writes it.
    """

    def __init__(self, progress: ProbeProgress | None, part: str, group: Group, *, is_shared: bool = False):
        self._progress, self._part, self._group = progress, part, group
        self._writes = group.is_first or not is_shared
        self._owner = "all" if is_shared else f"{group.rank}-of-{group.world_size}"
        self._saved_at = time.monotonic()
        self._took_s = 0.0

    def _name(self, step: int) -> str:
        return f"{self._part}.{step}.{self._owner}"

    def is_due(self) -> bool:
        """Whether to save now; the same on all ranks."""
        if self._progress is None:
            return False
        waited = time.monotonic() - self._saved_at
        due: bool = self._group.from_first(waited > max(SAVE_EVERY_S, SAVE_RATIO * self._took_s))
        return due

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after `step`; the one before goes when all ranks have written."""
        if self._progress is None:
            return
        started = time.monotonic()
        before = self._steps()
        if self._writes:
            self._progress.save(self._name(step), state)
        self._group.wait()
        self._remove(set(before) - {step})
        self._saved_at = time.monotonic()
        self._took_s = self._saved_at - started

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """The last step that all ranks have, with this rank's state; None where there is none."""
        if self._progress is None:
            return None
        states = {step: state for step in self._steps() if (state := self._progress.load(self._name(step)))}
        common = set.intersection(*(set(steps) for steps in self._group.gather(list(states))))
        return (max(common), states[max(common)]) if common else None

    def _steps(self) -> list[int]:
        assert self._progress is not None
        pattern = re.escape(self._progress._path(self._name(0)).name).replace(r"\.0\.", r"\.(\d+)\.", 1)
        names = (path.name for path in self._progress._folder.glob(f"{self._progress._task}.{self._part}.*.partial.pt"))
        return sorted(int(found[1]) for name in names if (found := re.fullmatch(pattern, name)))

    def _remove(self, steps: set[int]) -> None:
        assert self._progress is not None
        for step in steps:
            self._progress._path(self._name(step)).unlink(missing_ok=True)
