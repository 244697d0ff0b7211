"""Execution of a job by one of its ranks: hold the folder, do the work, and report how it ended.

A job trains a run, or evaluates or probes it; all three have a folder of the same kind. When a rank ends, or keeps the
others waiting for too long (`Group.collectives_within`), their collectives fail, and the program that started the ranks
(torchrun, srun) ends those that are left.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aimscale.aim.errors import UserError
from aimscale.harness.distributed.group import Group, find_placement, start_group, stop_group
from aimscale.harness.run.directory import EXIT_CRASHED, EXIT_FINISHED, EXIT_PREEMPTED, RunDir
from aimscale.harness.run.failures import (
    DivergedError,
    OffTrackError,
    PreemptedError,
    StopFlag,
    TooLargeError,
    blames_another_rank,
    classify,
    stop_signals,
)
from aimscale.harness.run.lock import LockLost, check_writer, writing_through

HEARTBEAT_S = 5.0
"""Seconds between heartbeats in `status.json`."""
WORD_S = 10.0
"""Seconds that a rank which lost another waits for that one to record what happened."""
EXIT_S = 60.0
"""Seconds after which a rank that failed ends even if its exit hangs."""
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
_DIVERGED = {"state": "diverged", "reason_class": "nan"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that the work of a rank needs."""

    folder: RunDir
    """Folder of the status, the lock and the logs."""
    group: Group
    flag: StopFlag
    exits: contextlib.ExitStack
    """Contexts of this rank that are left after the status says how the job ended, so that slow exits keep no other
    rank waiting."""

    def update_status(self, **changes: Any) -> None:
        """Change `status.json`, on the first rank alone."""
        if self.group.is_first:
            self.folder.write_status(**changes)

    def progress_callback(self) -> Callable[..., None]:
        """Make the function that all ranks call together, often: it obeys signals and updates the heartbeat.

        It raises PreemptedError if a signal asked to stop, and LockLost.
        """
        last_beat = 0.0

        def report_progress(*_: object) -> None:
            nonlocal last_beat
            if self.group.any(self.flag.is_raised):
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
    _record_collectives(folder.logs)
    with contextlib.ExitStack() as stack:
        group = start_group(find_placement(), device)
        stack.callback(stop_group)
        flag = stack.enter_context(stop_signals())
        writer_folder = stack.enter_context(_hold(folder, group))
        job = Job(folder=folder, group=group, flag=flag, exits=stack)
        try:
            if group.is_first:
                folder.write_start()
                folder.logs.mkdir(exist_ok=True)
            work(job)
            job.update_status(state="finished", phase="", heartbeat=time.time())
        except PreemptedError:
            job.update_status(state="preempted", phase="", reason="stopped by a signal; what was done is kept")
            return EXIT_PREEMPTED
        except (DivergedError, OffTrackError) as error:
            ended = {"state": "off-track"} if isinstance(error, OffTrackError) else _DIVERGED
            job.update_status(**ended, phase="", reason=str(error))
            if group.is_first:
                print(f"aimscale: {error}", file=sys.stderr)
            return error.exit_code
        except Exception as error:
            _note_failure(job, writer_folder / "failure.json", error)
            if group.world_size > 1:
                _end_within(EXIT_S)
            raise
    return EXIT_FINISHED


@contextlib.contextmanager
def _hold(run: RunDir, group: Group) -> Iterator[Path]:
    """Hold a run for the block: the first rank takes the lock, and the others write in its name; yields the writer's
    folder.

    Raises:
        LockHeld: another process has it; raised on all ranks.
    """
    with contextlib.ExitStack() as stack:
        folder = group.from_first(lambda: stack.enter_context(run.hold()))
        if not group.is_first:
            stack.enter_context(writing_through(run.path, folder))
        yield folder


def _note_failure(job: Job, note: Path, error: Exception) -> None:
    """Record this rank's failure in `note` and `status.json`, unless another rank's was recorded before.

    A rank whose failure only reports another's first gives that one time to record it.
    """
    reason_class, reason = classify(error)
    is_about_another = job.group.world_size > 1 and blames_another_rank(reason)
    deadline = time.monotonic() + WORD_S
    while is_about_another and not note.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    # Slurm's name of the node, by which it can be excluded; elsewhere the host's.
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    words = f"rank {job.group.rank} on {node} failed: {reason}"
    changes: dict[str, Any] = {"too_large": error.executed} if isinstance(error, TooLargeError) else {}
    try:
        check_writer(job.folder.status)
        with note.open("x") as file:
            json.dump(words, file)
        changes |= {"reason": reason, "reason_class": reason_class, "failed_on": None if is_about_another else node}
        job.folder.write_status(state="failed", phase="", **changes)
    except FileExistsError:
        with contextlib.suppress(OSError, ValueError):
            print(f"aimscale: rank {job.group.rank} ends: {json.loads(note.read_text())}", file=sys.stderr, flush=True)
    except (OSError, LockLost, UserError):
        pass  # the error itself is raised


def _end_within(seconds: float) -> None:
    """End this process after a time, even if its exit waits for a collective of a rank that is gone."""
    timer = threading.Timer(seconds, os._exit, [EXIT_CRASHED])
    timer.daemon = True
    timer.start()


def _record_collectives(logs: Path) -> None:
    """Have NCCL's flight recorder leave in `logs` what each rank did last when a collective times out (torch 2.9)."""
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(logs / "nccl-rank-"))


def _die_with_torchrun() -> None:
    """Have the kernel kill this rank when torchrun is killed; otherwise it would train on unnoticed.

    torchrun starts ranks in sessions of their own, which a KILL to its process group, as a launcher sends after the
    second Ctrl-C, does not reach.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
