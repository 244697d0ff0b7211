"""Execution of a job by one of its ranks: hold the folder, do the work, and report how it ended.

A job trains a run, or evaluates it; both have a folder of the same kind. When a rank ends, or keeps the
others waiting for too long (`Group.collective_timeout`), their collectives fail in gloo, while NCCL's watchdog ends the
process (SIGABRT). The program that started the ranks (`distributed.ranks`, torchrun, srun) ends those that are left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from aimscale.aim.errors import UserError
from aimscale.harness.distributed.group import Group, LaunchError, find_placement, start_group, stop_group
from aimscale.harness.run.directory import EXIT_FINISHED, EXIT_PREEMPTED, SHARED, RunDir
from aimscale.harness.run.failures import (
    DivergedError,
    PreemptedError,
    StopFlag,
    TooLargeError,
    blames_another_rank,
    classify,
    exit_after,
    is_of_network,
    is_shared,
    stop_signals,
)
from aimscale.harness.run.lock import LockLost, check_writer, writing_through
from aimscale.harness.run.timeouts import EXIT_TIMEOUT_S, FAILURE_NOTE_TIMEOUT_S, HEARTBEAT_S, PHASE_TIMEOUT_S

ProgressCallback = Callable[..., None]
"""Callback that all ranks call together, often: (what, done, total, unit). It shows progress, if there is a `what`, and
raises to stop the work."""


def ignore_progress(*_: object) -> None:
    """Ignore progress, and stop nothing."""


def numbered_progress(report_progress: ProgressCallback, number: int, count: int) -> ProgressCallback:
    """Prefix the names of one of several pieces of work with `number/count`."""
    if count == 1:
        return report_progress
    return lambda what="", *standing: report_progress(what and f"{number}/{count} {what}", *standing)


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

    def progress_callback(self) -> ProgressCallback:
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

    @contextlib.contextmanager
    def ending_in_time(self) -> Iterator[None]:
        """End this process `EXIT_TIMEOUT_S` after the block fails, even if the disk, the device or an exit that waits
        for a lost rank hangs; without other ranks, the exits cancel that, as a caller may go on."""
        try:
            yield
        except (PreemptedError, DivergedError):
            raise
        except Exception:
            timer = exit_after(EXIT_TIMEOUT_S)
            if self.group.world_size == 1:
                self.exits.callback(timer.cancel)
            raise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranks:
    """Ranks that met, which execute one job, or several in turn."""

    group: Group
    flag: StopFlag
    nodes: Sequence[str]
    """As in `Job`."""


@contextlib.contextmanager
def join_ranks(logs: Path, device: str) -> Iterator[Ranks]:
    """Join the ranks, and handle signals, for the block; `logs` is where NCCL's recorder writes."""
    _record_collectives(logs)
    with contextlib.ExitStack() as stack:
        with _naming_lost_ranks():
            group = start_group(find_placement(), device)
            stack.callback(stop_group)
            flag = stack.enter_context(stop_signals())
            nodes = group.all_gather_object(os.environ.get("SLURMD_NODENAME") or socket.gethostname())
        yield Ranks(group=group, flag=flag, nodes=nodes)


def execute_job(folder: RunDir, device: str, work: Callable[[Job], None]) -> int:
    """Join the ranks, and execute a job, as `execute_with` does."""
    with join_ranks(folder.logs, device) as ranks:
        return execute_with(ranks, folder, work)


def execute_with(ranks: Ranks, folder: RunDir, work: Callable[[Job], None]) -> int:
    """Hold the folder, do the work and return the exit code (`run.directory`).

    Raises:
        LockHeld: another process executes this job; raised on all ranks.
        Exception: what the work raised; `status.json` says why, too.
    """
    with contextlib.ExitStack() as stack:
        group = ranks.group
        with _naming_lost_ranks():
            writer_folder = stack.enter_context(_hold(folder, group))
        job = Job(folder=folder, group=group, flag=ranks.flag, nodes=ranks.nodes, exits=stack)
        try:
            if group.is_first:
                folder.write_start()
                folder.logs.mkdir(exist_ok=True)
            with job.ending_in_time():
                work(job)
            job.update_status(state="finished", phase="", heartbeat=time.time())
        except PreemptedError:
            job.update_status(state="preempted", phase="", reason="stopped by a signal; what was done is kept")
            return EXIT_PREEMPTED
        except DivergedError as error:
            job.update_status(**error.ended, phase="", reason=str(error))
            if group.is_first:
                print(f"aimscale: {error}", file=sys.stderr)
            return error.exit_code
        except Exception as error:
            if about_another := _note_failure(job, writer_folder / "failure.json", error):
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
        folder = group.broadcast_from_rank0(lambda: stack.enter_context(run.hold()))
        if not group.is_first:
            stack.enter_context(writing_through(run.root, folder))
        yield folder


def _note_failure(job: Job, note: Path, error: Exception) -> str | None:
    """Record this rank's failure in `note` and `status.json`, unless another rank's was recorded before; one that only
    reports another's failure gives that one time, and returns a sentence about it."""
    reason_class, reason = classify(error)
    is_about_another = len(job.nodes) > 1 and blames_another_rank(reason)
    deadline = time.monotonic() + FAILURE_NOTE_TIMEOUT_S
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
