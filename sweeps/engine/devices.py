"""The cards of this machine (or, without cards, places for processes) and how much of each is free."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

from aimscale.sweeps.plan.planner import Run

LIST_TIMEOUT_S = 30


class Devices:
    """A run with several devices takes whole ones; one with a single device takes its share of one."""

    def __init__(self, cards: Sequence[str], slots: int) -> None:
        """With more slots than cards, cards are shared evenly; without cards, each slot is a place for a process."""
        self.cards = tuple(cards[:slots])
        self.num = len(self.cards) or slots
        self.runs_per_device = -(-slots // self.num)
        self._free = [self.runs_per_device] * self.num

    def take(self, num: int) -> tuple[int, ...] | None:
        """Devices for a run, the fullest that still have room; None while there is none."""
        fits = sorted((free, i) for i, free in enumerate(self._free) if free >= self._places(num))
        if len(fits) < num:
            return None
        taken = tuple(sorted(i for _, i in fits[:num]))
        for i in taken:
            self._free[i] -= self._places(num)
        return taken

    def give_back(self, taken: Sequence[int]) -> None:
        """The run on these devices ended."""
        for i in taken:
            self._free[i] += self._places(len(taken))

    def _places(self, num: int) -> int:
        """What a run of so many devices takes of each."""
        return 1 if num == 1 else self.runs_per_device

    def environment(self, taken: Sequence[int]) -> dict[str, str]:
        """What a worker on these devices is told."""
        if not self.cards:
            return {}
        told = {"CUDA_VISIBLE_DEVICES": ",".join(self.cards[i] for i in taken)}
        if len(taken) == 1 and self.runs_per_device > 1:
            told["AIMSCALE_DEVICE_SHARE"] = f"{1 / self.runs_per_device:.6f}"
        return told


def visible_gpus() -> list[str]:
    """Cards that a local launch may use: CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [card for card in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if card]
    return [str(i) for i in range(len(listed_cards()))]


def listed_cards() -> list[str]:
    """Names of the NVIDIA cards that the driver knows, whatever torch sees."""
    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        listed = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=LIST_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in listed.stdout.splitlines() if line.strip()]


def default_slots(runs: Sequence[Run], gpus: Sequence[str], runs_per_device: int) -> int:
    """So many slots a card, or as many processes as the cores feed."""
    threads = max(run.config.runtime.num_threads for run in runs)
    return runs_per_device * len(gpus) or max(1, len(os.sched_getaffinity(0)) // threads)
