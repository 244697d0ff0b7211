"""Execution of a job by one of its ranks: hold the folder, do the work, and report how it ended.

A job trains a run, or evaluates or probes it; all three have a folder of the same kind.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from aimscale.harness.device.distributed import Group, find_placement, start_group, stop_group
from aimscale.harness.device.ranks import RankWatch, hold_run
from aimscale.harness.run.directory import EXIT_DIVERGED, EXIT_FINISHED, EXIT_PREEMPTED, RunDir
from aimscale.harness.run.failures import DivergedError, PreemptedError, StopFlag, stop_signals

HEARTBEAT_S = 5.0
"""Seconds between heartbeats in `status.json`."""
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that the work of a rank needs."""

    folder: RunDir
    """Folder of the status, the lock and the logs."""
    group: Group
    watch: RankWatch
    flag: StopFlag
    exits: contextlib.ExitStack
    """Contexts of this rank that are left after the status says how the job ended, so that slow exits keep no other
    rank waiting."""

    def update_status(self, **changes: Any) -> None:
        """Change `status.json`, on the first rank alone."""
        if self.group.is_first:
            self.folder.write_status(**changes)

    def progress_callback(self) -> Callable[..., None]:
        """Make the function that all ranks call together, often: it obeys signals and a lost lock, and updates the
        heartbeat.

        It raises PreemptedError if a signal asked to stop, and LockLost.
        """
        last_beat = 0.0

        def report_progress(*_: object) -> None:
            nonlocal last_beat
            self.watch.check()
            is_asked = self.group.any(self.flag.is_raised)
            self.watch.is_at_work = True
            if is_asked:
                raise PreemptedError
            if time.monotonic() - last_beat > HEARTBEAT_S:
                self.update_status(durable=False, heartbeat=time.time())
                last_beat = time.monotonic()

        return report_progress


def execute_job(folder: RunDir, device: str, work: Callable[[Job], None]) -> int:
    """Join the ranks, hold the folder, do the work and return the exit code (`run.directory`).

    Args:
        device: auto, cpu or cuda.

    Raises:
        LockHeld: another process executes this job; raised on all ranks.
        Exception: what the work raised; `status.json` says why, too.
    """
    _die_with_torchrun()
    with contextlib.ExitStack() as stack:
        group = start_group(find_placement(), device)
        stack.callback(stop_group)
        flag = stack.enter_context(stop_signals())
        watch = stack.enter_context(hold_run(folder, group))
        job = Job(folder=folder, group=group, watch=watch, flag=flag, exits=stack)
        stack.enter_context(watch.watching())
        try:
            if group.is_first:
                folder.write_start()
            work(job)
            job.update_status(state="finished", phase="", heartbeat=time.time())
        except PreemptedError:
            job.update_status(state="preempted", phase="", reason="stopped by a signal; what was done is kept")
            return EXIT_PREEMPTED
        except DivergedError as error:
            job.update_status(state="diverged", phase="", reason=str(error), reason_class="nan")
            if group.is_first:
                print(f"aimscale: {error}", file=sys.stderr)
            return EXIT_DIVERGED
        except Exception as error:
            watch.note_failure(error)
            raise
    return EXIT_FINISHED


def _die_with_torchrun() -> None:
    """Have the kernel kill this rank when torchrun is killed; otherwise it would train on unnoticed.

    torchrun starts ranks in sessions of their own, which a KILL to its process group, as a launcher sends after the
    second Ctrl-C, does not reach.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
