"""What a Slurm job executes: one trainer a task, watched by a process without torch that decides what follows.

The trainer (`python -m aimscale.harness.train RUN_DIR`) saves when it is told to and exits; nothing collective happens
in a signal handler. Rank 0's watcher then records how the attempt ended and requeues the job where there is more to do.
submitit's own handler is replaced: it would requeue on rank 0 while the other ranks are still saving.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from aimscale.harness.run.directory import EXIT_PREEMPTED
from aimscale.harness.run.lease import STALE_S
from aimscale.harness.run.watch import node_name
from aimscale.sweeps.plan.sweepfile import SweepError
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.state.claims import Claim, RunRecord
from aimscale.sweeps.state.retries import Outcome, Words, conclude, explain
from aimscale.sweeps.state.sweep_dir import lock_file

POLL_S = 0.5
PEER_GRACE_S = 60.0
"""Ranks that a failed peer leaves waiting in a collective are ended after this."""
REQUEUE_WAIT_S = 120.0
"""Slurm ends a requeued job within its KillWait; until then the watcher waits."""


class JobError(RuntimeError):
    """A run ended in a way that a person must look at; makes Slurm's job FAILED."""


class SlurmJob:
    """The callable that submitit pickles; it carries the work's directory and nothing else."""

    def __init__(self, path: Path, worker: tuple[str, ...] = ("-m", "aimscale.harness.train")) -> None:
        self.path = path
        self.worker = worker

    def __call__(self) -> str:
        """Execute one attempt of the run.

        Raises:
            JobError: the run failed for good.
        """
        return _Watcher(RunRecord(self.path), self.worker).watch()

    def checkpoint(self) -> Any:
        """Asked for by submitit when it is told to stop before the watcher took over: the same call again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


class _Watcher:
    def __init__(self, record: RunRecord, worker: tuple[str, ...]) -> None:
        self.record, self.worker = record, worker
        self.rank = int(os.environ.get("SLURM_PROCID", "0"))
        self.job_id = slurm.own_job_id() or ""
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.child: subprocess.Popen[bytes] | None = None
        self.told_to_save = False  # USR2: a limit is near, or `aimscale cancel`
        self.told_to_end = False  # TERM: Slurm cancels, preempts or requeues the job itself
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.told_to_save |= number == signal.SIGUSR2
        self.told_to_end |= number == signal.SIGTERM
        if self.child is not None and self.child.poll() is None and number != signal.SIGCONT:
            self.child.send_signal(number)

    def watch(self) -> str:
        if not self._take_over():
            return "not this job's run any more"
        self._wait_for_lease()
        attempt = self.record.next_attempt()
        exit_code = self._run_child(attempt)
        if exit_code not in (0, EXIT_PREEMPTED):
            self._tell_the_others(attempt, exit_code)
        if self.rank:
            return f"rank {self.rank} ended with {exit_code}"
        if not self._is_ours():
            return "another incarnation of this job took over"
        failed_peer = None if exit_code in (0, EXIT_PREEMPTED) else self._failed_peer(attempt)
        where, asked = f"slurm {self.job_id}", not self._is_claimed()
        said: Words | None = (failed_peer["reason"], failed_peer["reason_class"]) if failed_peer else None
        said = said if failed_peer and failed_peer["rank"] else None  # its own words are in the status
        node = failed_peer["node"] if failed_peer else ""
        outcome = conclude(self.record, attempt, exit_code, where, asked=asked, peer=said, node=node)
        if outcome in ("finished", "stop"):
            self._give_back()
        return self._follow(outcome)

    def _take_over(self) -> bool:
        """Whether the launcher's claim names this job; the first rank then enters which restart of it this is."""
        with lock_file(self.record.home / "launch.lock"):
            claim = self.record.read_claim()
            if claim is None or claim.job_id != self.job_id or claim.restarts > self.restarts:
                return False
            if self.rank == 0:
                nodes = os.environ.get("SLURM_JOB_NODELIST", "")
                self.record.write_claim(dataclasses.replace(claim, restarts=self.restarts, nodes=nodes))
        return True

    def _claim(self) -> Claim | None:
        claim = self.record.read_claim()
        return claim if claim and claim.job_id == self.job_id else None

    def _give_back(self) -> None:
        """The work of this job is over."""
        with lock_file(self.record.home / "launch.lock"):
            if (claim := self.record.find_claim()) and claim.job_id == self.job_id:
                self.record.drop_claim()

    def _is_claimed(self) -> bool:
        """Whether the run has not been cancelled meanwhile."""
        return self._claim() is not None

    def _is_ours(self) -> bool:
        """Whether no later incarnation of this job has started (after a node was given up for lost)."""
        claim = self.record.read_claim()
        return claim is None or (claim.job_id == self.job_id and claim.restarts <= self.restarts)

    def _wait_for_lease(self) -> None:
        """A trainer of an earlier attempt, cut off from Slurm, gives the lease up when it notices."""
        for _ in range(int(2 * STALE_S / POLL_S)):
            if self.rank or not self.record.is_held() or self.told_to_end:
                return
            time.sleep(POLL_S)

    def _run_child(self, attempt: int) -> int:
        self.record.logs.mkdir(parents=True, exist_ok=True)
        with self.record.log_file(attempt, self.rank).open("ab") as log:
            self.child = subprocess.Popen(
                [sys.executable, *self.worker, str(self.record.path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"LOCAL_WORLD_SIZE": str(tasks_on_node(os.environ))},
            )
        if self.told_to_end or self.told_to_save:
            self.child.send_signal(signal.SIGTERM)  # the signal came between the handler and the child
        deadline = float("inf")
        while (exit_code := self.child.poll()) is None:
            time.sleep(POLL_S)
            if deadline == float("inf") and self._failed_peer(attempt) is not None:
                deadline = time.time() + PEER_GRACE_S
            if time.time() > deadline:
                self.child.kill()
        return exit_code

    def _peer_file(self, attempt: int) -> Path:
        return self.record.logs / f"attempt-{attempt}.restart-{self.restarts}.failed-rank.json"

    def _tell_the_others(self, attempt: int, exit_code: int) -> None:
        """Say why this rank failed: its death explains more than the connection that it broke on the others."""
        reason, kind = explain(self.record, attempt, exit_code, self.rank)
        here = node_name()
        words: dict[str, Any] = {"reason": f"rank {self.rank} on {here}: {reason}", "reason_class": kind}
        node = self.record.checked_status().failed_on or here  # a rank that ended because another fell silent
        words |= {"rank": self.rank, "node": node}
        # The others fail because of the first to fail.
        with contextlib.suppress(FileExistsError), self._peer_file(attempt).open("x") as file:
            json.dump(words, file)

    def _failed_peer(self, attempt: int) -> dict[str, Any] | None:
        try:
            words: dict[str, Any] = json.loads(self._peer_file(attempt).read_text())
        except (OSError, ValueError):
            return None
        return words

    def _to_exclude(self) -> list[str]:
        """Nodes on which this run failed, where others are left for it."""
        failed = self.record.failed_nodes()
        num_left = len(set(slurm.node_names(os.environ.get("SLURM_JOB_PARTITION"))) - set(failed)) if failed else 0
        return failed if num_left >= int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) else []

    def _follow(self, outcome: Outcome) -> str:
        """Requeue where there is more to do and Slurm does not do it itself."""
        # After TERM alone Slurm is cancelling or requeueing the job itself; after USR2 it is up to us.
        goes_on = (outcome == "again" and not self.told_to_end) or (outcome == "preempted" and self.told_to_save)
        if goes_on and self._is_claimed():
            try:
                # One element; SLURM_JOB_ID may be the id of its whole array.
                slurm.requeue(self.job_id, self._to_exclude())
            except SweepError as error:
                raise JobError(f"could not requeue ({error}); `aimscale launch` resumes the run") from error
            time.sleep(REQUEUE_WAIT_S)
            return "requeued"
        if outcome in ("preempted", "again"):
            return "to be gone on with"
        if outcome == "stop":
            status = self.record.checked_status()
            raise JobError(f"{status.reason_class}: {status.reason}")
        return outcome


def tasks_on_node(environment: Mapping[str, str]) -> int:
    """Tasks of this step on this node, by Slurm's list for all of them: `2(x3),1` with SLURM_NODEID."""
    listed = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or "1"
    counts: list[int] = []
    for part in listed.split(","):
        num, _, times = part.partition("(x")
        counts += [int(num)] * int(times.rstrip(")") or 1)
    return counts[min(int(environment.get("SLURM_NODEID", "0")), len(counts) - 1)]
