"""What a killed probe goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from aimscale.harness.run.files import written_aside


class ProbeProgress:
    """What a killed probe goes on from: a file for each part of its work, rewritten whenever some of it is done.

    `key` names everything the state depends on; a file with another key is ignored. A task's lock keeps other
    processes away.
    """

    def __init__(self, folder: Path, task: str, key: str):
        self._folder = folder
        self._task = task
        self._key = key

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
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state if state["key"] == self._key else None

    def clear(self) -> None:
        """Remove the files: the task is done."""
        for path in self._folder.glob(f"{self._task}.*.partial.*"):
            path.unlink()
