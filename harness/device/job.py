"""A job as one of its ranks executes it: hold the folder, do the work, and say how it ended.

A job is the training of a run, or an evaluation or probes beside it; all three have a folder of the same kind.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from aimscale.harness.device.distributed import Group, Placement, find_placement
from aimscale.harness.run.directory import EXIT_DIVERGED, EXIT_FINISHED, EXIT_PREEMPTED, RunDir
from aimscale.harness.run.failures import DivergedError, PreemptedError, StopFlag, classify, stop_signals
from aimscale.harness.run.watch import RankWatch, execute

HEARTBEAT_S = 5.0
"""`status.json` is told this often that work goes on."""
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What the work of a rank needs to know."""

    folder: RunDir
    """Of the status, the lease and the logs."""
    placement: Placement
    watch: RankWatch
    flag: StopFlag
    stack: contextlib.ExitStack
    """Left when the end is told: a group whose end hangs must not keep a failure from the other ranks."""

    def tell(self, **changes: Any) -> None:
        """Change `status.json`, if this is the first rank."""
        if self.placement.rank == 0:
            self.folder.write_status(**changes)

    def pausing(self, group: Group) -> Callable[[], None]:
        """What all ranks call together, often: obeys a signal and a lost lease, and beats now and then.

        The call raises PreemptedError where a signal asked to stop, and LeaseLost.
        """
        told = 0.0

        def pause() -> None:
            nonlocal told
            self.watch.check()
            if group.any(self.flag.is_raised):
                raise PreemptedError
            if time.monotonic() - told > HEARTBEAT_S:
                self.tell(durable=False, heartbeat=time.time())
                told = time.monotonic()

        return pause


def execute_job(folder: RunDir, work: Callable[[Job], None], *, also: Iterable[Path] = ()) -> int:
    """Hold the folder, do the work and return the exit code (`run.directory`).

    Args:
        also: folders beside the job's own that the work writes into.

    Raises:
        LeaseHeld: another process executes this job.
        Exception: what the work raised; `status.json` says why, too.
    """
    _die_with_torchrun()
    placement = find_placement()
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(
            execute(folder, group=placement.name, rank=placement.rank, world_size=placement.world_size, also=also)
        )
        flag = stack.enter_context(stop_signals())
        job = Job(folder=folder, placement=placement, watch=watch, flag=flag, stack=stack)
        if placement.rank == 0:
            folder.write_start()
        stack.enter_context(watch.watching())
        try:
            work(job)
            job.tell(state="finished", phase="", heartbeat=time.time())
        except PreemptedError:
            job.tell(state="preempted", phase="", reason="stopped by a signal; what was done is kept")
            return EXIT_PREEMPTED
        except DivergedError as error:
            job.tell(state="diverged", phase="", reason=str(error), reason_class="nan")
            if placement.rank == 0:
                print(f"aimscale: {error}", file=sys.stderr)
            return EXIT_DIVERGED
        except Exception as error:
            reason_class, reason = classify(error)
            watch.note_failure(reason, reason_class)
            raise
    return EXIT_FINISHED


def _die_with_torchrun() -> None:
    """Have the kernel kill this rank when torchrun is killed, or it would train on with nobody to know of it.

    torchrun starts ranks in sessions of their own, which a KILL to its process group does not reach: a launcher's,
    after the second Ctrl-C.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
