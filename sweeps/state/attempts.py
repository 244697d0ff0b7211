"""Ends of attempts: why they ended, and whether to retry; retries are bounded by progress, not by a count of attempts.

Only a worker that holds the run's claim writes here.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from aimscale.harness.run.directory import (
    EXIT_CRASHED,
    EXIT_DIVERGED,
    EXIT_FINISHED,
    EXIT_OFF_TRACK,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    SHARED,
    ReasonClass,
)
from aimscale.harness.run.failures import WATCHDOG, blames_another_rank
from aimscale.harness.run.lock import Holder
from aimscale.harness.run.timeouts import RANK_EXIT_TIMEOUT_S
from aimscale.sweeps.state.record import WORKER_BEGINS, RunRecord

Outcome = Literal["finished", "preempted", "retry", "failed", "released", "claim lost"]
"""Outcome of an attempt. `preempted`: stopped, can resume later; `retry`: failed, try again now; `failed`: failed for
good, until a person clears the failure; `released`: failed before its first step, which may be the node's fault, so
that another node tries it; `claim lost`: another process executes the run."""

MAX_ATTEMPTS_WITHOUT_PROGRESS: dict[ReasonClass, int] = {
    "interrupted": 6, "node": 3, "timeout": 3, "oom": 2, "code": 2, "data": 1, "nan": 1, "config": 1,
}  # fmt: skip
"""Number of consecutive attempts without new progress after which an attempt that fails for this reason is the last.
Nodes and time limits are not the run's fault, memory and crashes may be another process's once; the others repeat.
Interruptions (a preemption, a restart of the job, a cancelled job) count for one another alone."""
STOPPED: dict[ReasonClass, str] = {
    "timeout": "give it more time (slurm.time_limit_min) or save more often (runtime.checkpoint_every_images)",
    "interrupted": "save more often (runtime.checkpoint_every_images), and see whether it takes its nodes down",
}
"""Reasons to stop a run, and what to do if it is stopped again and again before it saves anything new."""
NODE_REASONS = ("node", "code", "data")
"""Reasons that a broken node may have: an error of its GPU or its driver, a folder that is not mounted."""

EXIT_CODES = {
    "finished": EXIT_FINISHED, "preempted": EXIT_PREEMPTED, "diverged": EXIT_DIVERGED, "off-track": EXIT_OFF_TRACK,
    "failed": EXIT_CRASHED,
}  # fmt: skip
"""Exit code that the state in a run's status implies."""

_FAILED_TASK = re.compile(r"^srun: error: (\S+): tasks? [\d,-]+: (.*)$", re.MULTILINE)
"""Words of srun about a rank that failed: its node, and how it ended."""
_OUT_OF_MEMORY = re.compile(r"oom.?kill|exceeded .*memory limit|out.of.memory", re.IGNORECASE)


def record_end(
    run: RunRecord,
    attempt: int,
    exit_code: int,
    *,
    claims: tuple[str, str | None],
    stop_requested: bool,
    is_interrupted: bool = False,
    nodes: Sequence[str] = (),
    is_early: bool = False,
    off_track: str = "",
) -> Outcome:
    """Record how an attempt ended and return what follows; the caller holds the claim.

    If the process left no reason (killed, or dead before its first line), its status is written here.

    Args:
        exit_code: of the process, negative for a signal.
        claims: token of the claim under which the attempt started, and the token that `status.json` held before.
        stop_requested: whether a person asked the run to stop.
        is_interrupted: whether its Slurm job was ended before its time was up.
        nodes: nodes that executed the attempt.
        is_early: whether it ended before its first step.
        off_track: why a worker asked the run to end, if it did because of its forecast.
    """
    if _is_held_elsewhere(run, exit_code, claims):
        return "claim lost"  # this attempt never got the run's lock, or lost it
    if deviation := run.read_deviation():
        run.write_status(durable=False, **deviation)
    exit_code = _rank_exit_code(run, attempt, exit_code, claims[0])
    is_killed_as_asked = stop_requested and exit_code == -signal.SIGKILL  # by a second Ctrl-C
    if exit_code in (EXIT_PREEMPTED, -signal.SIGTERM, -signal.SIGUSR2, -signal.SIGINT) or is_killed_as_asked:
        if off_track:
            run.write_status(state="off-track", reason=off_track, reason_class=None)
            _append_attempt(run, attempt, exit_code, off_track, None)
            return "failed"
        classified: ReasonClass | None = None if stop_requested else "interrupted" if is_interrupted else "timeout"
        return _record_preemption(run, attempt, exit_code, classified)
    if exit_code in (EXIT_FINISHED, EXIT_OFF_TRACK):
        is_finished = exit_code == EXIT_FINISHED
        _append_attempt(run, attempt, exit_code, None if is_finished else run.read_status().reason, None)
        return "finished" if is_finished else "failed"
    reason, reason_class = _failure_reason(run, attempt, exit_code)
    state = "diverged" if exit_code == EXIT_DIVERGED else "failed"
    failed_on = run.write_status(state=state, reason=reason, reason_class=reason_class).failed_on
    node = failed_on if failed_on is not None else _culprit_node(run, attempt, reason, nodes, is_early)
    may_be_node = is_early and node != SHARED and reason_class in NODE_REASONS
    given_back = bool(may_be_node and not set(run.failed_nodes(given_back=True)) - {node})
    _append_attempt(run, attempt, exit_code, reason, reason_class, node, given_back=given_back)
    if given_back:
        return "released"
    return "retry" if may_retry(run.read_attempts(), reason_class) else "failed"


def _culprit_node(run: RunRecord, attempt: int, reason: str, nodes: Sequence[str], is_early: bool) -> str:
    """Return the node whose rank failed first, before any rank could write that down; `SHARED` if it is unknown.

    Of several nodes, srun names the first in the log. A rank that lost another may be the first to end, though, while
    the other one stands still.
    """
    if len(nodes) == 1:
        return nodes[0]
    node, how = _first_failed_task(run, attempt)
    is_about_another = any(words in reason for words in WATCHDOG) or (
        blames_another_rank(reason) and how.startswith("Exited")
    )
    return SHARED if not is_early or node not in nodes or is_about_another else node


def _first_failed_task(run: RunRecord, attempt: int) -> tuple[str, str]:
    """Return the node of the rank that srun saw fail first, and how it ended; empty if srun names none."""
    match = _FAILED_TASK.search(_read_text(run.attempt_log(attempt)))
    return (match[1], match[2]) if match else ("", "")


def _first_failed_rank(run: RunRecord, attempt: int) -> tuple[str, int | None]:
    """Return the words for the rank that failed first and the exit code if a signal ended it, as the program that
    started the ranks tells; empty and None if it tells of none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        failure = json.loads(run.failed_rank(attempt).read_text())
        return f"rank {failure['rank']}", min(0, failure["exit_code"]) or None
    node, how = _first_failed_task(run, attempt)
    numbers = signal.valid_signals() - {signal.SIGTERM}  # by which srun ends the others
    exit_codes = (-number for number in numbers if how.startswith(signal.strsignal(number) or "-"))
    return (f"a rank on {node}", exit_code) if (exit_code := next(exit_codes, None)) else ("", None)


def _is_held_elsewhere(run: RunRecord, exit_code: int, claims: tuple[str, str | None]) -> bool:
    """Return whether another process holds the run, or has held it since the attempt started.

    The processes of a killed run get time to exit.
    """
    deadline = time.monotonic() + (RANK_EXIT_TIMEOUT_S if exit_code == -signal.SIGKILL else 0)
    while exit_code != EXIT_FINISHED and run.is_held():
        if time.monotonic() >= deadline:
            return True
        time.sleep(0.1)
    return run.read_status().claim not in claims


def _rank_exit_code(run: RunRecord, attempt: int, exit_code: int, claim: str) -> int:
    """Return the exit code that the run's status implies; the program that started ranks returns one code for all."""
    status, by_signal = run.read_status(), exit_code > 128
    may_tell = status.claim == claim and (by_signal or exit_code in (EXIT_CRASHED, EXIT_PREEMPTED))
    if may_tell and status.state != "finished" and status.state in EXIT_CODES:
        return EXIT_CODES[status.state]
    if not by_signal:
        return exit_code
    # after one rank has failed, srun terminates the others, and returns their signal
    _, how = _first_failed_task(run, attempt)
    if how.startswith("Exited with exit code "):
        return int(how.split()[4])
    return -signal.SIGKILL if how.startswith("Killed") else 128 - exit_code


def _record_preemption(run: RunRecord, attempt: int, exit_code: int, reason_class: ReasonClass | None) -> Outcome:
    """Record an attempt that was told to stop (by a person, without a class): it can resume, unless `_may_resume`."""
    reason = run.read_status().reason if exit_code == EXIT_PREEMPTED else "stopped before it could save"
    if run.cancelled.exists():
        reason = "cancelled"
    _append_attempt(run, attempt, exit_code, reason, reason_class)
    return _after_stop(run, reason, reason_class)


def _after_stop(run: RunRecord, reason: str | None, reason_class: ReasonClass | None) -> Outcome:
    """Write that a run was stopped and can resume, or that it was stopped too often before it saved anything new."""
    if reason_class is not None and not may_retry(run.read_attempts(), reason_class):
        num = MAX_ATTEMPTS_WITHOUT_PROGRESS[reason_class]
        advice = "give it more time, or let it save more often" if run.is_of_program else STOPPED[reason_class]
        reason = f"stopped {num} times before it saved anything new ({reason}); {advice}"
        run.write_status(state="failed", reason=reason, reason_class=reason_class)
        return "failed"
    run.write_status(state="preempted", reason=reason, reason_class=None)
    return "preempted"


def _failure_reason(run: RunRecord, attempt: int, exit_code: int) -> tuple[str, ReasonClass]:
    """Return the reason and its class, from the run's status or its log where they state one."""
    status = run.read_status()
    reason = status.reason if status.state in ("failed", "diverged") else None
    who, by_signal = "", min(0, exit_code) or None
    if not reason or blames_another_rank(reason):
        rank, of_rank = _first_failed_rank(run, attempt)
        who, by_signal = f"{rank} was " if of_rank else "", of_rank or by_signal
    if by_signal == -signal.SIGKILL:
        advice = "give it more" if run.is_of_program else "use a smaller micro-batch"
        return f"{who}killed by the system (SIGKILL), usually out of memory; {advice}", "oom"
    if by_signal is None and reason and status.reason_class:
        return reason, status.reason_class
    lines = [line.strip() for line in _read_text(run.attempt_log(attempt)).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("srun:", "slurmstepd"))] or lines
    for words in WATCHDOG if by_signal else ():
        if said := next((line[line.index(words) :] for line in lines if words in line), None):
            return f"{who}ended by NCCL, as it waited for another in vain or met an error: {said[:300]}", "node"
    how = f"signal {-by_signal}" if by_signal else f"exit code {exit_code}"
    ended = f"{who}ended with {how}" if who or not lines else ""
    kinds: dict[int, ReasonClass] = {EXIT_DIVERGED: "nan", EXIT_USER_ERROR: "config"}
    reason_class = (status.reason_class if reason else None) or kinds.get(exit_code, "code")
    return ": ".join(filter(None, [ended, lines[-1][:300] if lines else ""])), reason_class


def record_lost_attempt(run: RunRecord, worker: Holder | None, job_state: str | None) -> None:
    """Record the end of an attempt that was lost together with its worker; the caller holds the claim.

    Without this record, a run that kills every worker would be retried for ever.

    Args:
        worker: the holder of the claim before.
        job_state: Slurm's state of its job, from squeue or sacct; None if neither knows it.
    """
    status = run.read_status()
    if worker is None or status.state not in ("running", "queued") or run.is_held():
        return
    nodes, job_id = "", worker.facts.get("job_id")
    reason: str = worker.facts.get("ended") or "killed with its launcher, or the machine stopped"
    reason_class: ReasonClass = "node"
    if job_id and "ended" not in worker.facts:
        nodes = str(worker.facts.get("nodes") or "")
        reason, reason_class = _job_failure(job_state, run.job_log(job_id), nodes)
    ended = status.heartbeat or time.time()
    _append_attempt(run, run.next_attempt(), None, reason, reason_class, nodes, ended=ended)
    if reason_class == "interrupted":
        _after_stop(run, reason, reason_class)
    else:
        run.write_status(state="failed", reason=reason, reason_class=reason_class)


def _job_failure(job_state: str | None, log: Path, nodes: str) -> tuple[str, ReasonClass]:
    """Return reason and reason class after a Slurm job that ended without a message from the run.

    A job that Slurm preempted or started again, or a person cancelled, is `interrupted`: as a rule no fault of its node
    or its run.
    """
    state = (job_state or "").split(" ")[0]
    last_start = _read_text(log).rpartition(WORKER_BEGINS)[2]  # slurmstepd writes there why it killed a process
    if state == "OUT_OF_MEMORY" or (state == "FAILED" and _OUT_OF_MEMORY.search(last_start)):
        return "Slurm killed the job: out of memory; raise mem in slurm.extra", "oom"
    match state:
        case "NODE_FAIL" | "BOOT_FAIL":
            return f"node {nodes or '(unknown)'} failed", "node"
        case "TIMEOUT" | "DEADLINE":
            return "the time limit came before it could save; set runtime.checkpoint_every_images", "timeout"
        case "CANCELLED":
            return "its job was cancelled before it could save", "interrupted"
        case "FAILED":
            return f"the job failed and gave no reason; see {log}", "code"
        case "":
            return "Slurm no longer knows the job", "node"
    return f"its job was preempted or started again before it could save ({state})", "interrupted"


def _read_text(log: Path) -> str:
    try:
        return log.read_text(errors="replace")
    except OSError:
        return ""


def may_retry(attempts: Sequence[dict[str, Any]], reason_class: ReasonClass | None) -> bool:
    """Return whether a run with these ended attempts, the last of which failed for this reason, may be retried.

    Counts the last attempts in a row that saved nothing new, including the one that saved last. Attempts that finished,
    that a person stopped or that were given back are not counted, and interrupted ones only among themselves.
    """
    num, saved = 0, None
    for ended in attempts:
        if ended.get("forgiven"):
            num, saved = 0, None
        elif ended["reason_class"] is None or ended.get("given_back"):
            continue
        elif (ended["reason_class"] == "interrupted") == (reason_class == "interrupted"):
            num = num + 1 if ended["saved"] == saved else 1
            saved = ended["saved"]
    return reason_class is None or num < MAX_ATTEMPTS_WITHOUT_PROGRESS[reason_class]


def clear_failure(run: RunRecord) -> None:
    """Clear a failure, so that the next worker resumes the run; the caller holds the claim."""
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
    given_back: bool = False,
    ended: float | None = None,
) -> None:
    """Append an attempt to the record; `ended` is the Unix time of its end, now by default."""
    ended = ended or time.time()
    # With several nodes it is unknown which one failed.
    is_known = (reason_class == "node" or given_back) and node and not set(node) & set(",[")
    run.append_attempt(
        attempt=attempt,
        started=run.read_status().started,
        ended=ended,
        host=run.read_status().host,
        device_hours=run.attempt_device_hours(ended),
        exit_code=exit_code,
        saved=run.saved_progress(),
        reason_class=reason_class,
        reason=reason,
        failed_nodes=[node] if is_known else [],
        **({"given_back": True} if given_back else {}),
    )
