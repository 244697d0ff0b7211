"""What an element of a Slurm array executes: the queue on the machine that Slurm gave it, until nothing is left for it.

The element is the batch script itself, not a step of srun: so it can start the steps of runs on several nodes, and it
alone hears of the time limit, in time for its runs to save. Slurm's TERM reaches all processes of the job.
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
from aimscale.sweeps.plan.checks import refuse
from aimscale.sweeps.plan.costs import grace_period_s
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import Sweep, SweepError
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.slurm.submit import JobShape, Submission, submit
from aimscale.sweeps.state.record import RunRecord


class WorkerJobError(RuntimeError):
    """A person must look; makes Slurm's job FAILED."""


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """The callable that submitit pickles: it reads the sweep as it stands when it starts."""

    directory: Path
    """Of the sweep."""
    shape: JobShape
    """What was asked for."""

    def __call__(self) -> str:
        """Execute runs until none is left that this machine can serve, or until the job has to end.

        Raises:
            ElementError: a run failed for good, or no run can be started.
        """
        sweep, runs, _ = load_plan(str(self.directory), self.directory.parent)
        machine = self._build_machine(sweep)
        runnable = [run for run in runs if machine.can_run(run)]
        end = float(os.environ.get("SLURM_JOB_END_TIME") or time.time() + 60 * sweep.file.slurm.time_min)
        deadline = end - max((grace_period_s(sweep, run) for run in runnable), default=0)
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
                exclude = self._nodes_to_exclude(sweep, result.to_do)
                if result.interrupted or not result.to_do or exclude or not nodes:
                    break
                nodes = []  # runs that failed here have nowhere else to go
            for number in (signal.SIGUSR2, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # submitit's handler would requeue, too
        return _requeue_or_finish(result, exclude)

    def checkpoint(self) -> Any:
        """Asked for by submitit when it is told to stop before the queue took over: the same call again."""
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
            # The worker is in its container already; ranks on other nodes are not.
            python=tuple(shlex.split(section.python)) if section.python and self.shape.nodes > 1 else (sys.executable,),
        )

    def _nodes_to_exclude(self, sweep: Sweep, to_do: Sequence[str]) -> tuple[str, ...]:
        """Nodes on which the runs that are left failed, where others are left for them."""
        failed = [node for run_id in to_do for node in RunRecord(sweep.run_dir(run_id)).failed_nodes()]
        partition = os.environ.get("SLURM_JOB_PARTITION")
        return slurm.nodes_to_exclude(failed, partition, self.shape.nodes)


def _requeue_or_finish(result: LaunchResult, exclude: Sequence[str]) -> str:
    """Put this one element back into Slurm's queue where it can go on later; after TERM, Slurm decides itself."""
    job_id = slurm.current_job_id()
    if result.to_do and result.stopped_by in (None, signal.SIGUSR2) and job_id:
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
    return "nothing is left" if not result.to_do else "to be continued"


def launch_slurm(
    sweep: Sweep, runs: Sequence[Run], *, retry: bool = False, dry_run: bool = False, allow_dirty: bool = False
) -> list[Submission]:
    """Submit the elements that the runs lack and return at once; a dry run asks Slurm nothing and writes nothing.

    Raises:
        SweepError, DataError: as `launch` and `submit`.
    """
    if dry_run:
        refuse(sweep, [run for run in runs if launch_decision(sweep, run, retry=retry).startable])
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
    """Keep a step beside the batch script: Slurm warns steps alone of a preemption, and by `scancel --signal`."""
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
