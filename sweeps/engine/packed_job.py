"""A Slurm job that executes several runs of one device as a local queue on its own cards.

Each run has its directory, log, lease and failure as anywhere else. Told to stop, the queue lets every run save; the
job is requeued while it has runs to go on with.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from aimscale.aim.errors import UserError
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.lease import STALE_S
from aimscale.sweeps.engine.devices import visible_gpus
from aimscale.sweeps.engine.local_queue import LaunchResult, print_events, run_queue, worker_command
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.slurm.job import REQUEUE_WAIT_S, JobError
from aimscale.sweeps.state.claims import Claim, RunRecord
from aimscale.sweeps.state.decision import Decision, JobKind, decide


class PackedJob:
    """The callable that submitit pickles; it carries run directories and nothing else of them."""

    def __init__(self, paths: list[Path], runs_per_device: int, devices: int, worker: tuple[str, ...]) -> None:
        self.paths, self.runs_per_device = paths, runs_per_device
        self.devices, self.worker = devices, worker

    def __call__(self) -> str:
        """Execute what is left of the runs.

        Raises:
            JobError: a run failed for good, or the job could not be requeued.
        """
        job_id, restarts = slurm.own_job_id() or "", int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        runs = list(self._runs())
        kind = self._kind(job_id, restarts)
        _wait_for_leases([RunRecord(path) for path in self.paths])
        gpus = visible_gpus()[: self.devices]
        result = run_queue(
            runs,
            kind=kind,
            slots=self.devices * self.runs_per_device,
            gpus=gpus,
            command=lambda path, devices: worker_command(path, devices, self.worker),
            report=print_events,
            job_id=job_id,
        )
        for decision in result.left:
            print(f"left {decision.record.title}: {decision.why or decision.verdict}", flush=True)
        return self._follow(result, job_id)

    def _runs(self) -> Iterator[Run]:
        """Those that can be read; a damaged one is named and left."""
        for path in self.paths:
            try:
                config = RunDir(path).load_config()
            except UserError as error:
                print(f"skipped {path.name}: {error}", flush=True)
                continue
            yield Run(run_id=path.name, config=config, cell={}, devices=1)

    def checkpoint(self) -> Any:
        """Asked for by submitit when it is told to stop before the queue took over: the same call again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def _kind(self, job_id: str, restarts: int) -> JobKind:
        def decide_own(run: Run, record: RunRecord, is_queued: Callable[[Claim], bool]) -> Decision:
            claim = record.read_claim()
            if claim is None or claim.job_id != job_id or claim.restarts > restarts:
                return Decision(run=run, record=record, verdict="queued", why="not this job's run any more")
            return decide(run, record, lambda claim: False)

        def claim_own(record: RunRecord, run: Run, claim: Claim) -> None:
            record.write_status(state="queued", reason=None, reason_class=None)
            record.write_claim(replace(claim, restarts=restarts, nodes=os.environ.get("SLURM_JOB_NODELIST", "")))

        by_id = {path.name: path for path in self.paths}
        home = RunRecord(self.paths[0]).home
        return JobKind(
            name="",
            lock=home / "launch.lock",
            record=lambda run: RunRecord(by_id[run.run_id]),
            decide=decide_own,
            claim=claim_own,
            worker=self.worker,
        )

    def _follow(self, result: LaunchResult, job_id: str) -> str:
        records = [RunRecord(path) for path in self.paths]
        waiting = [record for record in records if (claim := record.find_claim()) and claim.job_id == job_id]
        if waiting and result.stopped_by == signal.SIGUSR2:
            try:
                slurm.requeue(job_id)
            except slurm.SlurmError as error:
                raise JobError(f"could not requeue ({error}); `aimscale launch` resumes the runs") from error
            time.sleep(REQUEUE_WAIT_S)
            return "requeued"
        if result.failed:
            raise JobError(f"failed: {', '.join(result.failed)}; `aimscale status` says why")
        return f"{len(result.finished)} runs finished"


def _wait_for_leases(records: list[RunRecord]) -> None:
    """Trainers of an earlier incarnation of this job, cut off from Slurm, give their leases up when they notice."""
    deadline = time.monotonic() + 2 * STALE_S
    while time.monotonic() < deadline and any(map(_seems_held, records)):
        time.sleep(1.0)


def _seems_held(record: RunRecord) -> bool:
    try:
        return record.is_held()
    except UserError:
        return False  # the queue names what is damaged
