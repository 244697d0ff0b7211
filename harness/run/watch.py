"""Ranks that watch each other: one that dies, stands still or is cut off ends the others within `ENDS_WITHIN_S`.

A backend may not notice (NCCL waits for half an hour), and the rank that would notice may be the one that hangs. So
every rank beats into the folder of the run's holder, looks at the beats of the others, and leaves the first failure
there for all to find. A rank that waits for its data is at work; only a step that lasts is a rank that hangs.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from aimscale.harness.run.directory import EXIT_CRASHED, ReasonClass, RunDir
from aimscale.harness.run.fence import LeaseLost, check_fence
from aimscale.harness.run.lease import Lease, join_fence, running_time

BEAT_S = 5.0
"""A rank beats, and looks at the others, this often."""
SILENCE_S = 40.0
"""A rank that was not heard of for this long is gone."""
GRACE_S = 5.0
"""What a rank is given to end by itself, in its own words, before its watch ends it."""
ENDS_WITHIN_S = 60.0
"""From the silence of one rank to the end of all: the three above, and a little for the file system."""
STEP_S, STEP_FACTOR = 60.0, 10.0
"""A step that takes longer than this, and than this many times the longest before it, hangs. The first may compile."""
_FAILURE_FILE, _LEFT = "failure.json", "left"


@contextlib.contextmanager
def execute(run: RunDir, *, group: str, rank: int, world_size: int, also: Iterable[Path] = ()) -> Iterator[RankWatch]:
    """Hold a run for the block, as one rank of the group that bears this name.

    Args:
        run: its first rank takes the lease, the others join its fence.
        group: names this start of the run on all its ranks.
        also: folders beside the run's own that are written into.

    Raises:
        LeaseHeld: another live process holds it.
    """
    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(run.hold(group=group, also=also)) if rank == 0 else None
        folder = lease.folder if lease else stack.enter_context(join_fence(run.lease, group, also))
        yield RankWatch(run, lease, folder, rank, world_size)


def node_name() -> str:
    """Slurm's name of this node, by which it can be excluded; elsewhere the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


class RankWatch:
    """The watch of one rank; without other ranks it only keeps the first failure."""

    def __init__(self, run: RunDir, lease: Lease | None, folder: Path, rank: int, world_size: int) -> None:
        """`lease` is the first rank's, `folder` that of its holder, which all ranks write into."""
        self._run, self._lease, self._folder, self._rank = run, lease, folder, rank
        self._others = [other for other in range(world_size) if other != rank]
        self._beats = 0
        self._heard: dict[int, tuple[str, float]] = {}
        self._step_started: float | None = None
        self._longest_step_s: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def check(self) -> None:
        """Call often, and before anything is written for good.

        Raises:
            LeaseLost: the run is not this group's any more.
        """
        if self._lease is None:
            check_fence(self._run.status)
        else:
            self._lease.check()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for the block. A rank that leaves it is not waited for."""
        if not self._others:
            yield
            return
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join()
            with contextlib.suppress(OSError):
                self._beat_file(self._rank).write_text(_LEFT)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A step that all ranks entered at the same moment: the block may not take much longer than those before."""
        started = self._step_started = running_time()
        try:
            yield
        finally:
            self._step_started = None
            self._longest_step_s = max(self._longest_step_s or 0.0, running_time() - started)

    def note_failure(self, reason: str, reason_class: ReasonClass, node: str | None = None) -> None:
        """Leave a failure on this rank's node, or another's, for all and in `status.json`, unless there was one."""
        words = {"rank": self._rank, "host": node_name(), "reason": reason, "reason_class": reason_class}
        with contextlib.suppress(FileExistsError, LeaseLost):
            check_fence(self._run.status)
            with (self._folder / _FAILURE_FILE).open("x") as file:
                json.dump(words, file)
            failed_on = node or node_name()
            self._run.write_status(
                state="failed", phase="", reason=reason, reason_class=reason_class, failed_on=failed_on
            )

    def _beat_file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}"

    def _watch(self) -> None:
        last = running_time()
        while not self._stop.wait(BEAT_S if self._beats else 0):
            now = running_time()
            if now - last > SILENCE_S / 2:
                # This process or the file system stood still: what was missed meanwhile counts against no rank.
                self._heard = {rank: (beat, now) for rank, (beat, _) in self._heard.items()}
                self._step_started = now if self._step_started else None
            last = now
            try:
                problem = self._problem(now)
            except OSError:
                continue  # once is no reason to end; if it stays, this rank falls silent and the others end
            if problem is not None:
                self._end(problem)
                return

    def _problem(self, now: float) -> str | None:
        """Beat, and look for a reason to end."""
        self._beats += 1
        try:
            check_fence(self._run.status)
        except LeaseLost:
            return "the first rank is gone, or another process took the run over"
        self._beat_file(self._rank).write_text(f"{self._beats} on {node_name()}")
        with contextlib.suppress(FileNotFoundError, ValueError):
            words = json.loads((self._folder / _FAILURE_FILE).read_text())
            return f"rank {words['rank']} on {words['host']} failed: {words['reason']}"
        for rank in self._others:
            with contextlib.suppress(FileNotFoundError):
                beat = self._beat_file(rank).read_text()
                if beat and beat != self._heard.get(rank, ("", 0.0))[0]:
                    self._heard[rank] = beat, now
        for rank, (beat, heard) in self._heard.items():
            if beat != _LEFT and now - heard > SILENCE_S:
                node = beat.partition(" on ")[2]
                reason = f"rank {rank} on {node} was not heard of for {now - heard:.0f} s"
                self.note_failure(reason, "node", node)
                return reason
        started, longest_s = self._step_started, self._longest_step_s
        if started is not None and longest_s is not None and now - started > max(STEP_S, STEP_FACTOR * longest_s):
            reason = f"rank {self._rank} on {node_name()} has been in one step for {now - started:.0f} s"
            self.note_failure(reason, "node")
            return reason
        return None

    def _end(self, problem: str) -> None:
        """End this process, which may hang; what it has not renamed yet stays unseen."""
        if self._stop.wait(GRACE_S):
            return
        print(f"aimscale: rank {self._rank} ends: {problem}", file=sys.stderr, flush=True)
        os._exit(EXIT_CRASHED)
