"""What a run has counted so far: kept in checkpoints, told in the rows of its budgets."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(kw_only=True)
class Tally:
    """What a stretch of training took."""

    wall_s: float = 0.0
    """Wall time of steps and checkpoints."""
    device_s: float = 0.0
    """The same times the number of devices."""
    num_images: int = 0
    num_skipped_steps: int = 0
    """Non-finite steps."""
    num_bad_samples: int = 0
    """Undecodable samples, replaced."""
    num_loss_spikes: int = 0
    """Losses far above those before them."""

    def __add__(self, other: Tally) -> Tally:
        ours, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return Tally(**{key: ours[key] + theirs[key] for key in ours})


class Counters:
    """The counts of a run on its trunk and on the branch that it is on."""

    def __init__(self) -> None:
        self.images_done = 0
        """Images trained on, decay branches included."""
        self.num_bad = 0
        """Undecodable samples among them."""
        self.consecutive_skipped = 0
        """Non-finite steps since the last finite one."""
        self.trunk, self.branch = Tally(), Tally()
        self._is_on_branch = False

    @property
    def current(self) -> Tally:
        """Of the trunk or the branch, wherever the run is."""
        return self.branch if self._is_on_branch else self.trunk

    @property
    def num_skipped_steps(self) -> int:
        """Non-finite steps on the way from the start of the trunk to here."""
        return self.trunk.num_skipped_steps + self.branch.num_skipped_steps * self._is_on_branch

    def enter(self, *, is_branch: bool, from_its_start: bool) -> None:
        """Go on on the trunk or on a branch, whose counts begin with it."""
        self._is_on_branch = is_branch
        if is_branch and from_its_start:
            self.branch = Tally()

    def add_step(self, num_images: int, *, was_applied: bool) -> None:
        """Count a step."""
        self.images_done += num_images
        self.current.num_images += num_images
        self.current.num_skipped_steps += not was_applied
        self.consecutive_skipped = 0 if was_applied else self.consecutive_skipped + 1

    def add_bad_samples(self, number: int) -> None:
        """Count samples that could not be decoded."""
        self.num_bad += number
        self.current.num_bad_samples += number

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "images_done": self.images_done,
            "num_bad_done": self.num_bad,
            "trunk": dataclasses.asdict(self.trunk),
            "branch": dataclasses.asdict(self.branch),
            "consecutive_skipped": self.consecutive_skipped,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`; runs begun under earlier versions lack some."""
        self.images_done = state["images_done"]
        self.num_bad = state.get("num_bad_done", 0)
        self.trunk, self.branch = Tally(**state["trunk"]), Tally(**state["branch"])
        self.consecutive_skipped = state.get("consecutive_skipped", 0)
