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
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from aimscale.aim.errors import UserError
from aimscale.harness.distributed.group import (
    PHASE_TIMEOUT_S,
    Group,
    LaunchError,
    find_placement,
    start_group,
    stop_group,
)
from aimscale.harness.run.directory import EXIT_FINISHED, EXIT_PREEMPTED, SHARED, RunDir
from aimscale.harness.run.failures import (
    EXIT_S,
    DivergedError,
    OffTrackError,
    PreemptedError,
    StopFlag,
    TooLargeError,
    blames_another_rank,
    classify,
    end_within,
    is_of_network,
    is_shared,
    stop_signals,
)
from aimscale.harness.run.lock import LockLost, check_writer, writing_through

HEARTBEAT_S = 5.0
"""Seconds between heartbeats in `status.json`."""
WORD_S = 10.0
"""Seconds that a rank which lost another waits for that one to record what happened."""
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that the work of a rank needs."""

    folder: RunDir
    """Folder of the status, the lock and the logs."""
    group: Group
    flag: StopFlag
    nodes: Sequence[str]
    """Node of each rank: Slurm's name, by which it can be excluded, or else the host's."""
    exits: contextlib.ExitStack
    """Contexts that are left after the status says how the job ended, since they may be slow."""

    def update_status(self, **changes: Any) -> None:
        """Change `status.json`, on the first rank alone."""
        if self.group.is_first:
            self.folder.write_status(**changes)

    def progress_callback(self) -> Callable[..., None]:
        """Make the function that all ranks call together, often: it obeys signals and updates the heartbeat.

        It raises PreemptedError if a signal asked to stop, and LockLost. From now on, ranks wait for each other for
        `PHASE_TIMEOUT_S`.
        """
        self.group.limit_collectives(PHASE_TIMEOUT_S)
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

    Raises:
        LockHeld: another process executes this job; raised on all ranks.
        Exception: what the work raised; `status.json` says why, too.
    """
    _die_with_torchrun()
    _record_collectives(folder.logs)
    with contextlib.ExitStack() as stack:
        with _naming_lost_ranks():
            group = start_group(find_placement(), device)
            stack.callback(stop_group)
            flag = stack.enter_context(stop_signals())
            nodes = group.gather(os.environ.get("SLURMD_NODENAME") or socket.gethostname())
            writer_folder = stack.enter_context(_hold(folder, group))
        job = Job(folder=folder, group=group, flag=flag, nodes=nodes, exits=stack)
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
            job.update_status(**error.ended, phase="", reason=str(error))
            if group.is_first:
                print(f"aimscale: {error}", file=sys.stderr)
            return error.exit_code
        except Exception as error:
            timer = end_within(EXIT_S)  # the disk may hang, or an exit that waits for a rank that is gone
            about_another = _note_failure(job, writer_folder / "failure.json", error)
            if group.world_size == 1:
                timer.cancel()  # a caller may go on
            if about_another:
                raise LaunchError(about_another) from error  # where this rank met it tells nothing
            raise
    return EXIT_FINISHED


@contextlib.contextmanager
def _naming_lost_ranks() -> Iterator[None]:
    """Raise LaunchError if another rank is lost while ranks meet: nobody can write yet what happened."""
    try:
        yield
    except Exception as error:
        kind, sentence = classify(error)
        if isinstance(error, UserError | OSError) or kind != "node":
            raise
        raise LaunchError(sentence) from error


@contextlib.contextmanager
def _hold(run: RunDir, group: Group) -> Iterator[Path]:
    """Hold a run for the block: the first rank takes the lock, for all; yields the writer's folder."""
    with contextlib.ExitStack() as stack:
        folder = group.from_first(lambda: stack.enter_context(run.hold()))
        if not group.is_first:
            stack.enter_context(writing_through(run.path, folder))
        yield folder


def _note_failure(job: Job, note: Path, error: Exception) -> str | None:
    """Record this rank's failure in `note` and `status.json`, unless another rank's was recorded before; one that only
    reports another's failure gives that one time, and returns a sentence about it."""
    reason_class, reason = classify(error)
    is_about_another = len(job.nodes) > 1 and blames_another_rank(reason)
    deadline = time.monotonic() + WORD_S
    while is_about_another and not note.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    rank = getattr(error, "failed_rank", job.group.rank)
    words = f"rank {rank} on {job.nodes[rank]} failed: {reason}"
    failed_on: str | None = job.nodes[rank]
    if is_about_another or (is_of_network(error) and len(set(job.nodes)) > 1):
        failed_on = None
    elif is_shared(error, job.folder.path):
        failed_on = SHARED
    changes: dict[str, Any] = {"too_large": error.executed} if isinstance(error, TooLargeError) else {}
    try:
        check_writer(job.folder.status)
        with note.open("x") as file:
            json.dump(words, file)
        changes |= {"reason": reason, "reason_class": reason_class, "failed_on": failed_on}
        job.folder.write_status(state="failed", phase="", **changes)
    except FileExistsError:
        with contextlib.suppress(OSError, ValueError):
            reason = f"rank {job.group.rank} ends: {json.loads(note.read_text())}"
            if not is_about_another:
                print(f"aimscale: {reason}", file=sys.stderr, flush=True)
    except (OSError, LockLost, UserError):
        pass  # the error itself is raised
    return reason if is_about_another else None


def _record_collectives(logs: Path) -> None:
    """Have NCCL's flight recorder leave in `logs` what each rank did last when a collective times out (torch 2.9)."""
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(logs / "nccl-rank-"))
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
        if not os.environ.get(name, "0").isdecimal():  # torch 2.13 would stand still
            raise LaunchError(f"the environment variable {name} is no whole number; correct or unset it")


def _die_with_torchrun() -> None:
    """Have the kernel kill this rank when torchrun is killed: it starts ranks in sessions of their own, which a KILL to
    its process group does not reach."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
