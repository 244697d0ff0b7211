"""Watch over ranks: one that dies, hangs or is cut off ends the others within `ENDS_WITHIN_S`.

A backend may not notice (NCCL waits for half an hour), and the rank that would notice may be the one that hangs. So a
thread of every rank regularly tells the first rank, over connections of their own, that it is alive, and hears how the
others are; a second thread, which waits for nobody, watches the clock. A rank that waits for its data is at work; only
a step that takes too long counts as a hang.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from aimscale.aim.errors import UserError
from aimscale.harness.device.distributed import Group
from aimscale.harness.run.directory import EXIT_CRASHED, ReasonClass, RunDir
from aimscale.harness.run.failures import TooLargeError, blames_another_rank, classify
from aimscale.harness.run.fence import LockLost, check_fence, fenced

BEAT_S = 5.0
"""Seconds between messages of the ranks, and between the first rank's checks of the fence."""
SILENCE_S = 35.0
"""Seconds of silence after which the first rank counts another as gone, once they have trained a step together: until
then a rank may come late or compile. The others allow the first rank `2 * GRACE_S` more."""
GRACE_S = 5.0
"""Seconds that a rank has to end by itself, with its own error message, before its watch ends it."""
ENDS_WITHIN_S = 60.0
"""Bound on the time from the silence of one rank to the end of all: `BEAT_S + SILENCE_S + 3 * GRACE_S` and a little."""
STEP_S, STEP_FACTOR = 60.0, 10.0
"""Limits on a step: one that takes longer than both `STEP_S` and `STEP_FACTOR` times the longest before it hangs."""

_GONE = "died, or its connection broke"


@contextlib.contextmanager
def hold_run(run: RunDir, group: Group) -> Iterator[RankWatch]:
    """Hold a run for the block: the first rank takes the lock, and the others write in its name.

    Raises:
        LockHeld: another process has it; raised on all ranks.
    """
    with contextlib.ExitStack() as stack:
        folder = group.from_first(lambda: stack.enter_context(run.hold()))
        if not group.is_first:
            stack.enter_context(fenced(run.path, folder))
        yield RankWatch(run, folder, group)


class RankWatch:
    """Watch of one rank; on a single rank it only checks the fence and records the first failure."""

    def __init__(self, run: RunDir, folder: Path, group: Group) -> None:
        """Connect the ranks, which all call this together; `folder` is that of the run's writer
        (`harness.run.fence`)."""
        self._run, self._failure_file, self._group = run, folder / "failure.json", group
        # Slurm's name of each node, by which it can be excluded; elsewhere the host's.
        self._nodes = group.gather(os.environ.get("SLURMD_NODENAME") or socket.gethostname())
        self._others = [rank for rank in range(group.world_size) if rank != group.rank]
        if self._others:  # gloo's timeout would expire while all ranks are suspended; `_watch` allows for that
            self._channel = torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=365))
        self.is_at_work = False
        """Whether this rank has trained a step or measured with the others: from then on their silence counts."""
        self._heard = self._looked_at_fence = time.monotonic()
        self._awaited = 0
        self._problem: str | None = None
        self._step_started: float | None = None
        self._longest_step_s = 0.0
        self._leaves, self._wakes, self._knows = False, threading.Event(), threading.Event()

    def check(self) -> None:
        """Check the fence every `BEAT_S`, on the first rank alone; to be called often.

        Raises:
            LockLost: another process took the run over.
        """
        if self._group.is_first and time.monotonic() - self._looked_at_fence > BEAT_S:
            self._looked_at_fence = time.monotonic()
            with contextlib.suppress(OSError):  # a file server that is away may be back at the next check
                check_fence(self._run.status)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for the block, which all ranks leave together, or because one failed."""
        if not self._others:
            yield
            return
        exchange = threading.Thread(target=self._exchange, name="exchange", daemon=True)
        exchange.start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        try:
            yield
        except BaseException:
            self._end(self._first_failure("it ended without a word"))
            raise
        finally:
            self._leaves = True
            self._wakes.set()
            exchange.join()
            self._knows.set()  # with a problem, this process is ended soon even if its exit hangs

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Watch a step that all ranks entered together: it may not take much longer than those before."""
        started = self._step_started = time.monotonic()
        try:
            yield
        finally:
            self._step_started, self.is_at_work = None, True
            self._longest_step_s = max(self._longest_step_s, time.monotonic() - started)

    def note_failure(self, error: Exception) -> None:
        """Record this rank's failure for all ranks and in `status.json`, unless another was recorded before.

        A failure that only reports another rank's waits for that rank's own record.
        """
        reason_class, reason = classify(error)
        if self._others and blames_another_rank(reason):
            self._wakes.set()
            self._knows.wait(BEAT_S + GRACE_S)
        changes = {"too_large": error.executed} if isinstance(error, TooLargeError) else {}
        self._note(self._group.rank, f"failed: {reason}", reason_class, reason=reason, **changes)

    def _note(self, rank: int, what: str, reason_class: ReasonClass = "node", **changes: Any) -> str:
        """Record what befell a rank, and other `changes` of the status; returns the reason of the first failure."""
        node = self._nodes[rank]
        words = f"rank {rank} on {node} {what}"
        failure = {"rank": rank, "node": node, "reason": words, "reason_class": reason_class}
        with contextlib.suppress(OSError, LockLost, UserError):
            check_fence(self._run.status)
            with self._failure_file.open("x") as file:
                json.dump(failure, file)
            about = {"reason": words, "reason_class": reason_class, "failed_on": node}
            self._run.write_status(state="failed", phase="", **about | changes)
        return self._first_failure(words)

    def _first_failure(self, otherwise: str) -> str:
        with contextlib.suppress(OSError, ValueError):
            return str(json.loads(self._failure_file.read_text())["reason"])
        return otherwise

    def _end(self, problem: str) -> None:
        self._problem = self._problem or problem
        self._knows.set()

    def _exchange(self) -> None:
        """Exchange with the other ranks until all leave or one has failed."""
        are_well, leave = True, False
        while are_well and not leave:
            self._wakes.wait(BEAT_S)
            own = torch.tensor([self._problem is None, self._leaves])
            are_well, leave = (self._collect(own) if self._group.is_first else self._tell(own)).tolist()
            self._heard = time.monotonic()
        if not are_well:
            self._end(self._first_failure("another rank ended, or another process took the run over"))

    def _collect(self, own: torch.Tensor) -> torch.Tensor:
        """Hear from all other ranks, on the first rank, and send each what holds on all of them."""
        other, there = torch.empty_like(own), []
        for rank in self._others:
            self._awaited = rank
            try:
                torch.distributed.recv(other, rank, group=self._channel)
                own &= other
                there.append(rank)
            except RuntimeError:
                self._end(self._note(rank, _GONE))
                own[0] = False
        for rank in there:
            self._awaited = rank
            with contextlib.suppress(RuntimeError):  # the next round reports it
                torch.distributed.send(own, rank, group=self._channel)
        return own

    def _tell(self, own: torch.Tensor) -> torch.Tensor:
        """Send this rank's state to the first one, and return its answer."""
        try:
            torch.distributed.send(own, 0, group=self._channel)
            torch.distributed.recv(own, 0, group=self._channel)
        except RuntimeError:
            self._end(self._note(0, _GONE))
            own[0] = False
        return own

    def _watch(self) -> None:
        """Watch the clock; once there is a problem, end this process, which may hang."""
        last = time.monotonic()
        while not self._knows.wait(GRACE_S / 5):
            now = time.monotonic()
            if now - last > SILENCE_S / 2:  # this process was suspended: the silence is no other rank's fault
                self._heard = now
                self._step_started = now if self._step_started else None
            last = now
            self._look(now)
        if self._problem is not None:
            time.sleep(GRACE_S)
            print(f"aimscale: rank {self._group.rank} ends: {self._problem}", file=sys.stderr, flush=True)
            os._exit(EXIT_CRASHED)

    def _look(self, now: float) -> None:
        try:
            self.check()
        except LockLost as lost:
            self._end(str(lost))
        silent_s = now - self._heard
        if self.is_at_work and silent_s > SILENCE_S + (0 if self._group.is_first else 2 * GRACE_S):
            self._end(self._note(self._awaited, f"was not heard of for {silent_s:.0f} s"))
        started, longest_s = self._step_started, self._longest_step_s
        if started is not None and longest_s and now - started > max(STEP_S, STEP_FACTOR * longest_s):
            self._end(self._note(self._group.rank, f"has been in one step for {now - started:.0f} s"))
