"""The cards of this machine (or, without cards, places for processes) and how much of each is free."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from fractions import Fraction

from aimscale.sweeps.plan.device_fit import runs_on_a_device
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import Sweep

WHOLE = Fraction(1)
LIST_TIMEOUT_S = 30


class Devices:
    """A run with several devices takes whole ones; one with a single device may take a share of it."""

    def __init__(self, cards: Sequence[str], slots: int) -> None:
        """With more slots than cards, cards are shared; without cards, each slot is a place for a process."""
        self.cards = tuple(cards[:slots])
        self.num = len(self.cards) or slots
        self._slots = slots
        self._free = [WHOLE] * self.num

    @property
    def share(self) -> Fraction:
        """What a run of one device takes where nothing else is said."""
        return Fraction(1, -(-self._slots // self.num))

    def take(self, num: int, share: Fraction) -> tuple[int, ...] | None:
        """Devices for a run, the fullest that still have room; None while there is none."""
        share = share if num == 1 else WHOLE
        fits = sorted((free, i) for i, free in enumerate(self._free) if free >= share)
        if len(fits) < num:
            return None
        taken = tuple(sorted(i for _, i in fits[:num]))
        for i in taken:
            self._free[i] -= share
        return taken

    def give_back(self, taken: Sequence[int], share: Fraction) -> None:
        """The run on these devices ended."""
        for i in taken:
            self._free[i] += share if len(taken) == 1 else WHOLE

    def environment(self, taken: Sequence[int], share: Fraction) -> dict[str, str]:
        """What a worker on these devices is told."""
        if not self.cards:
            return {}
        told = {"CUDA_VISIBLE_DEVICES": ",".join(self.cards[i] for i in taken)}
        if len(taken) == 1 and share < 1:
            told["AIMSCALE_DEVICE_SHARE"] = f"{float(share):.6f}"
        return told


def sharing(sweep: Sweep) -> Callable[[Run], Fraction]:
    """How much of a card each run takes by `runs_per_device`."""
    return lambda run: Fraction(1, runs_on_a_device(sweep, run))


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


def default_slots(runs: Sequence[Run], gpus: Sequence[str]) -> int:
    """A slot a card, or as many processes as the cores feed."""
    threads = max(run.config.runtime.num_threads for run in runs)
    return len(gpus) or max(1, len(os.sched_getaffinity(0)) // threads)
