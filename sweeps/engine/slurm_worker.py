"""Worker of a Slurm job: executes runs on the nodes that Slurm allocated, until none is left for it.

The worker is the batch script itself, not a step of srun. It can therefore start steps on several nodes, and it alone
receives the warning before the time limit, early enough for its runs to save. SIGTERM from Slurm reaches all processes
of the job.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aimscale.sweeps.engine.devices import Machine, visible_gpus
from aimscale.sweeps.engine.launch import launch_decision, load_plan, prepare_launch
from aimscale.sweeps.engine.worker import LaunchResult, Worker, print_events, run_worker
from aimscale.sweeps.plan.checks import raise_on_problems
from aimscale.sweeps.plan.costs import grace_period_s
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import Sweep, SweepError
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.slurm.submit import JobShape, Submission, submit
from aimscale.sweeps.state.record import RunRecord


class WorkerJobError(RuntimeError):
    """Error that needs a person; it ends the Slurm job as FAILED."""


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """Callable that submitit pickles; it reads the sweep anew when the job starts."""

    directory: Path
    """Directory of the sweep."""
    shape: JobShape
    """Nodes and devices that the job requested."""

    def __call__(self) -> str:
        """Execute runs until none is left for this machine, or until the job has to end.

        Raises:
            WorkerJobError: a run failed for good, or no run can be started.
        """
        sweep, runs, _ = load_plan(str(self.directory), self.directory.parent)
        machine = self._build_machine(sweep)
        runnable = [run for run in runs if machine.can_run(run)]
        end = float(os.environ.get("SLURM_JOB_END_TIME") or time.time() + 60 * sweep.file.slurm.time_min)
        deadline = end - max((grace_period_s(run) for run in runnable), default=0)
        nodes, job_id = slurm.current_nodes(), slurm.current_job_id()
        with _relay_warnings():
            while True:
                worker = Worker(
                    sweep=sweep,
                    machine=machine,
                    waiting=list(runs),
                    job_id=job_id,
                    deadline=deadline,
                    skip_failed_on=nodes,
                )
                result = run_worker(worker, print_events)
                exclude = self._nodes_to_exclude(sweep, result.remaining)
                if result.interrupted or not result.remaining or exclude or not nodes:
                    break
                nodes = []  # no other node is left for the runs that failed here
            for number in (signal.SIGUSR2, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # submitit's handlers would requeue the job a second time
        return _requeue_or_finish(result, exclude)

    def checkpoint(self) -> Any:
        """Return the same call for a requeue; submitit calls this if it is stopped before the worker has taken over."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def _build_machine(self, sweep: Sweep) -> Machine:
        section = sweep.file.slurm
        gpus = visible_gpus() if section.gpus and self.shape.nodes == 1 else []
        if gpus and len(gpus) < self.shape.devices:
            raise WorkerJobError(f"Slurm gave this job {len(gpus)} GPUs and not {self.shape.devices}; see slurm.gpus")
        return Machine(
            devices=self.shape.devices,
            gpus=tuple(gpus[: self.shape.devices]),
            nodes=self.shape.nodes,
            allow_fewer_devices=False,
            srun=section.srun,
            # The worker already runs inside its container; ranks on other nodes must enter it.
            python=tuple(shlex.split(section.python)) if section.python and self.shape.nodes > 1 else (sys.executable,),
        )

    def _nodes_to_exclude(self, sweep: Sweep, remaining: Sequence[str]) -> tuple[str, ...]:
        """Return the nodes on which the remaining runs failed, unless too few other nodes exist."""
        failed = [node for run_id in remaining for node in RunRecord(sweep.run_dir(run_id)).failed_nodes()]
        partition = os.environ.get("SLURM_JOB_PARTITION")
        return slurm.nodes_to_exclude(failed, partition, self.shape.nodes)


def _requeue_or_finish(result: LaunchResult, exclude: Sequence[str]) -> str:
    """Requeue this job if it can continue later, and return a message for submitit.

    After TERM, Slurm requeues the job itself.

    Raises:
        WorkerJobError: a run failed for good, the job is too short, or it cannot be requeued.
    """
    job_id = slurm.current_job_id()
    if result.remaining and result.stopped_by in (None, signal.SIGUSR2) and job_id:
        if not (result.stopped_by or result.finished or result.stopped or exclude):
            raise WorkerJobError("this job is too short for any run to save; raise slurm.time_min")
        try:
            job = slurm.jobs().get(job_id)
            if job and job.state == "RUNNING":  # else it was cancelled, or is requeued already
                slurm.command("scontrol", "requeue", job_id)
                if exclude:
                    slurm.command("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(exclude)}")
                return "requeued"
        except SweepError as error:
            raise WorkerJobError(f"could not requeue ({error}); `aimscale launch` goes on") from error
    if result.failed:
        raise WorkerJobError(f"failed: {', '.join(result.failed)}")
    return "nothing is left" if not result.remaining else "to be continued"


def launch_slurm(
    sweep: Sweep, runs: Sequence[Run], *, retry: bool = False, dry_run: bool = False, allow_dirty: bool = False
) -> list[Submission]:
    """Submit the jobs that the runs need and return at once; a dry run asks Slurm nothing and writes nothing.

    Raises:
        SweepError, DataError: as in `launch` and `submit`.
    """
    if dry_run:
        raise_on_problems(sweep, [run for run in runs if launch_decision(sweep, run, retry=retry).startable])
    else:
        prepare_launch(sweep, runs, retry=retry)
    return submit(
        sweep,
        lambda: [run for run in runs if launch_decision(sweep, run, retry=retry and dry_run).startable],
        lambda shape: WorkerJob(directory=sweep.directory, shape=shape),
        allow_dirty=allow_dirty,
        dry_run=dry_run,
    )


@contextlib.contextmanager
def _relay_warnings() -> Iterator[None]:
    """Run an idle job step beside the batch script, and forward the signals that end it to this process.

    Slurm signals only steps before a preemption and on `scancel --signal`.
    """
    if shutil.which("srun") is None:  # in a container
        yield
        return
    words = ["srun", "--overlap", "--nodes=1", "--ntasks=1", "--mem=0", "--quiet", "sleep", "infinity"]
    quiet = subprocess.DEVNULL
    step = subprocess.Popen(words, stdin=quiet, stdout=quiet, stderr=quiet)

    def listen() -> None:
        if step.wait() in (128 + signal.SIGTERM, 128 + signal.SIGUSR2):
            os.kill(os.getpid(), signal.SIGUSR2)

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield
    finally:
        step.kill()
