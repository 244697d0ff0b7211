"""What an ended attempt means, and whether to try again: bounded by progress, not by a count of attempts.

What is written here is written by a worker that holds the run's claim.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from aimscale.harness.run.directory import (
    EXIT_CRASHED,
    EXIT_DIVERGED,
    EXIT_FINISHED,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    ReasonClass,
)
from aimscale.harness.run.lock import Holder
from aimscale.sweeps.state.record import RunRecord

Outcome = Literal["finished", "preempted", "again", "stop", "elsewhere"]
"""`preempted`: saved, to go on when it may; `again`: try now; `stop`: a person must look; `elsewhere`: another process
has the run."""

MAX_ATTEMPTS_WITHOUT_PROGRESS: dict[ReasonClass, int] = {
    "node": 3,
    "timeout": 3,
    "oom": 2,
    "code": 2,
    "data": 1,
    "nan": 1,
    "config": 1,
}
"""Attempts in a row that saved nothing new, whatever ended them, after which one that ends for this reason is the last.

A node or a time limit is nobody's fault; memory and code may have failed by a neighbour's or a network's doing, once;
the others would fail again.
"""
RANK_EXIT_TIMEOUT_S = 10.0
"""A process on a GPU takes seconds to give its memory back."""

_OUT_OF_MEMORY = re.compile(r"oom.?kill|exceeded .*memory limit|out.of.memory", re.IGNORECASE)


def record_end(
    run: RunRecord, attempt: int, exit_code: int, *, claims: tuple[str, str | None], stop_requested: bool
) -> Outcome:
    """Record how an attempt ended and decide what follows; hold the claim.

    Args:
        exit_code: of the process, negative for a signal.
        claims: token of the claim under which the attempt was started, and the one that `status.json` bore before.
        asked: whether a person told it to stop.

    Where the reason is unknown (killed, or dead before the first line), the status is written here.
    """
    if _is_held_elsewhere(run, exit_code, claims):
        return "elsewhere"  # this attempt was refused, or lost the run to the one that has it now
    exit_code = _rank_exit_code(run, exit_code, claims[0])
    if exit_code == EXIT_FINISHED:
        _append_attempt(run, attempt, exit_code, None, None)
        return "finished"
    is_killed_as_asked = stop_requested and exit_code == -signal.SIGKILL  # by a second Ctrl-C
    if exit_code in (EXIT_PREEMPTED, -signal.SIGTERM, -signal.SIGUSR2, -signal.SIGINT) or is_killed_as_asked:
        return _record_preemption(run, attempt, exit_code, stop_requested)
    reason, reason_class = failure_reason(run, attempt, exit_code)
    run.write_status(
        state="diverged" if exit_code == EXIT_DIVERGED else "failed", reason=reason, reason_class=reason_class
    )
    _append_attempt(run, attempt, exit_code, reason, reason_class, run.read_status().failed_on or "")
    return "again" if may_retry(run) else "stop"


def _is_held_elsewhere(run: RunRecord, exit_code: int, claims: tuple[str, str | None]) -> bool:
    """Whether another process has the run, or had it since: the ranks of a killed torchrun take a moment to die."""
    deadline = time.monotonic() + (RANK_EXIT_TIMEOUT_S if exit_code == -signal.SIGKILL else 0)
    while exit_code != EXIT_FINISHED and run.is_held():
        if time.monotonic() >= deadline:
            return True
        time.sleep(0.1)
    return run.read_status().claim not in claims


def _rank_exit_code(run: RunRecord, exit_code: int, claim: str) -> int:
    """torchrun and srun give one code for all ranks, whichever failed first; what the run says tells which it was."""
    status, by_signal = run.read_status(), exit_code > 128
    if status.claim == claim and (by_signal or exit_code in (EXIT_CRASHED, EXIT_PREEMPTED)):
        codes = {"preempted": EXIT_PREEMPTED, "diverged": EXIT_DIVERGED, "failed": EXIT_CRASHED}
        if status.state in codes:
            return codes[status.state]
    return 128 - exit_code if by_signal else exit_code


def _record_preemption(run: RunRecord, attempt: int, exit_code: int, stop_requested: bool) -> Outcome:
    """An attempt that was told to stop: to be gone on with, unless it is stopped again and again before it saves."""
    reason = run.read_status().reason if exit_code == EXIT_PREEMPTED else "stopped before it could save"
    if run.cancelled.exists():
        reason = "cancelled"
    _append_attempt(run, attempt, exit_code, reason, None if stop_requested else "timeout")
    if not stop_requested and not may_retry(run, "timeout"):
        reason = (
            f"stopped {MAX_ATTEMPTS_WITHOUT_PROGRESS['timeout']} times before it saved anything new; give it more time "
            f"(slurm.time_min) or save more often (runtime.checkpoint_every_images)"
        )
        run.write_status(state="failed", reason=reason, reason_class="timeout")
        return "stop"
    run.write_status(state="preempted", reason=reason, reason_class=None)
    return "preempted"


def failure_reason(run: RunRecord, attempt: int, exit_code: int) -> tuple[str, ReasonClass]:
    """Why a process failed: in its own words where it had any."""
    status = run.read_status()
    if exit_code == -signal.SIGKILL:
        return "killed by the system (SIGKILL), usually out of memory; use a smaller micro-batch", "oom"
    if status.state in ("failed", "diverged") and status.reason and status.reason_class:
        return status.reason, status.reason_class
    reason = _last_log_line(run, attempt) or (
        f"ended by signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}"
    )
    kinds: dict[int, ReasonClass] = {EXIT_DIVERGED: "nan", EXIT_USER_ERROR: "config"}
    return reason, kinds.get(exit_code, "code")


def record_lost_attempt(run: RunRecord, worker: Holder | None, job_state: Callable[[str], str | None]) -> None:
    """Record the end of an attempt whose worker was lost with it: a node that died, a container out of memory.

    Else a run that takes every worker with it would be tried for ever. Hold the claim.

    Args:
        worker: that held the claim before.
        job_state: Slurm's word for a job, from squeue or sacct; None where it has none.
    """
    status = run.read_status()
    if worker is None or status.state not in ("running", "queued") or run.is_held():
        return
    job_id = worker.facts.get("job_id")
    if job_id:
        nodes = str(worker.facts.get("nodes") or "")
        reason, reason_class, state = job_failure(job_state(job_id), run.job_log(job_id), nodes)
    else:
        nodes = ""
        reason, reason_class, state = "killed with its launcher, or the machine stopped", "node", "failed"
    if reason_class is not None:
        _append_attempt(run, run.next_attempt(), None, reason, reason_class, nodes, was_lost=True)
    run.write_status(state=state, reason=reason, reason_class=reason_class)


def job_failure(
    job_state: str | None, log: Path, nodes: str
) -> tuple[str, ReasonClass | None, Literal["failed", "preempted"]]:
    """Reason, kind and state of a run whose job ended in this state without leaving a word of its own."""
    state = (job_state or "").split(" ")[0]
    last_start = _read_text(log).rpartition("Starting with")[2]  # in which slurmstepd says why it killed something
    if state == "OUT_OF_MEMORY" or (state == "FAILED" and _OUT_OF_MEMORY.search(last_start)):
        return "Slurm killed the job: out of memory; raise mem in slurm.extra", "oom", "failed"
    match state:
        case "NODE_FAIL" | "BOOT_FAIL":
            return f"node {nodes or '(unknown)'} failed", "node", "failed"
        case "TIMEOUT" | "DEADLINE":
            return "the time limit came before it could save; raise slurm.signal_delay_s", "timeout", "failed"
        case "CANCELLED":
            return "cancelled before it could save", None, "preempted"
        case "FAILED":
            return f"the job failed and gave no reason; see {log}", "code", "failed"
        case "":
            return "Slurm no longer knows the job", "node", "failed"
        case _:  # the same job is there again, or something else became of it
            return f"its job lost its node, or was started again before it could save ({state})", "node", "failed"


def _read_text(log: Path) -> str:
    try:
        return log.read_text(errors="replace")
    except OSError:
        return ""


def may_retry(run: RunRecord, reason_class: ReasonClass | None = None) -> bool:
    """Whether a run that failed for this reason, by default the one in its status, has tries left.

    Attempts at the end of the record count that saved nothing new, the one that saved last among them; one that a
    person stopped, or that finished, counts for nothing.
    """
    reason_class = reason_class or run.read_status().reason_class
    num, saved = 0, None
    for ended in run.read_attempts():
        if ended.get("forgiven"):
            num, saved = 0, None
        elif ended["reason_class"] is not None:
            num = num + 1 if ended["saved"] == saved else 1
            saved = ended["saved"]
    return reason_class is None or num < MAX_ATTEMPTS_WITHOUT_PROGRESS[reason_class]


def clear_failure(run: RunRecord) -> None:
    """Clear a failure, so that the next worker resumes the run; hold the claim."""
    run.write_status(state="preempted", reason="to be tried again", reason_class=None)
    run.append_attempt(forgiven=True, ended=time.time())


def _append_attempt(
    run: RunRecord,
    attempt: int,
    exit_code: int | None,
    reason: str | None,
    reason_class: str | None,
    node: str = "",
    *,
    was_lost: bool = False,
) -> None:
    """`was_lost`: it ended some time ago, soon after its last sign of life."""
    now = (run.read_status().heartbeat if was_lost else None) or time.time()
    run.append_attempt(
        attempt=attempt,
        ended=now,
        device_hours=run.attempt_device_hours(now),
        exit_code=exit_code,
        saved=run.saved_progress(),
        reason_class=reason_class,
        reason=reason,
        # Of several nodes it is not known which one failed.
        failed_nodes=[node] if reason_class == "node" and node and not set(node) & set(",[") else [],
    )


def _last_log_line(run: RunRecord, attempt: int) -> str | None:
    """Last line of an attempt's log that says something."""
    lines = _read_text(run.attempt_log(attempt)).splitlines()
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), None)
