"""Worker of a Slurm job: executes runs on the nodes that Slurm allocated, until none is left for it.

The worker (`python -m aimscale.sweeps.engine.slurm_worker SWEEP_DIR NODES DEVICES`) is the batch script itself, not a
step of srun. It can therefore start steps on several nodes, and it alone receives the warning before the time limit,
early enough for its runs to save. SIGTERM from Slurm reaches all processes of the job.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from aimscale.aim.errors import UserError, log_to_console
from aimscale.sweeps.engine.devices import Machine, visible_gpus
from aimscale.sweeps.engine.launch import prepare_launch
from aimscale.sweeps.engine.worker import LaunchResult, Worker, print_events, run_worker
from aimscale.sweeps.planning.checks import raise_on_problems
from aimscale.sweeps.planning.sections import SlurmSection
from aimscale.sweeps.planning.sweepfile import Sweep, SweepError, load_sweep
from aimscale.sweeps.slurm import commands as slurm
from aimscale.sweeps.slurm.jobs import WORKER_ENDS, JobShape, live_jobs
from aimscale.sweeps.slurm.submit import Submission, job_shape, submit, submit_like, time_limit_min
from aimscale.sweeps.state.planned_sweep import PlannedSweep, plan_sweep
from aimscale.sweeps.state.record import WORKER_BEGINS, RunRecord

_log = logging.getLogger("aimscale.sweeps.engine.slurm_worker")  # run as `python -m`, it is called `__main__`


class WorkerJobError(UserError):
    """Error that needs a person; it ends the Slurm job as FAILED, and `status` shows it."""

    exit_code = 1


def execute_job(directory: Path, shape: JobShape) -> str:
    """Execute runs until none is left for this machine, or until the job has to end; returns how it ended.

    Raises:
        WorkerJobError: no run can be executed here, and the job cannot go on elsewhere or later.
    """
    nodes, job_id = slurm.current_nodes(), slurm.current_job_id()
    avoid_failed_nodes = bool(nodes)
    with _relay_warnings():
        while True:
            planned = plan_sweep(directory, directory.parent)
            sweep, runs = planned.sweep, planned.longest_first
            machine, broken = _find_machine(sweep.file.slurm, shape)
            runnable = [run for run in runs if machine.can_run(run)]
            end = float(os.environ.get("SLURM_JOB_END_TIME") or time.time() + 60 * sweep.file.slurm.time_limit_min)
            worker = Worker(
                sweep=sweep,
                machine=machine,
                waiting=runs,
                job_id=job_id,
                deadline=end - max((run.grace_s for run in runnable), default=0),
                nodes=nodes,
                avoid_failed_nodes=avoid_failed_nodes,
                broken=broken,
            )
            report = functools.partial(_submit_evaluations, planned, served=set())
            result = run_worker(worker, report)
            exclude = _nodes_to_exclude(sweep, result, shape, nodes)
            if result.interrupted or result.broken or exclude:
                break
            if result.remaining and avoid_failed_nodes:
                avoid_failed_nodes = False  # no other node is left for the runs that failed here
            elif result.remaining or load_sweep(str(directory), directory.parent).text == sweep.text:
                break
    is_time_up = result.stopped_by is None or time.time() > worker.deadline - 60
    anew = functools.partial(_submit_anew, planned, shape, result, exclude) if is_time_up else lambda: None
    return _requeue_or_finish(result, exclude, has_worked=bool(worker.ended), submit_anew=anew)


def _submit_evaluations(planned: PlannedSweep, worker: Worker, served: set[str]) -> None:
    """Print the worker's messages; for runs that it has trained on several nodes, submit a job that evaluates them on
    the devices which that takes, if none waits already; it follows this job where `max_jobs` allows no more."""
    print_events(worker)
    trained = {key for key, outcome in worker.ended if outcome == "finished"} - served
    if worker.machine.nodes == 1 or not trained:
        return
    served |= trained
    runs = [each.run for each in planned.look() if each.state.startable and each.run.stage == "evaluate"]
    shapes = {job_shape(run, planned.sweep.file.slurm) for run in runs}
    for shape in shapes:
        try:
            live = live_jobs(planned.sweep, slurm.jobs())
            if any(job.shape == shape for job in live):
                continue
            job_id, minutes = slurm.current_job_id() or "", time_limit_min(planned, runs, 1)
            is_after = len(live) >= planned.sweep.file.slurm.max_jobs
            new = submit_like(planned.sweep, job_id, shape, minutes, is_after=is_after)
            _log.info("submitted job %s of %d devices: evaluation", new, shape.devices)
        except SweepError as error:
            _log.warning("could not submit the evaluation (%s); `aimscale launch` does", error)


def describe_step(planned: PlannedSweep, shape: JobShape) -> str:
    """Return the command by which a job of several nodes starts its ranks, as a shell would be given it; empty for one
    node."""
    run = next((run for run in planned.runs if job_shape(run, planned.sweep.file.slurm) == shape), None)
    if run is None or shape.nodes == 1:
        return ""
    machine, _ = _find_machine(planned.sweep.file.slurm, shape)
    return shlex.join(machine.command(run, [planned.sweep.run_dir(run.run_id)], shape.devices))


def _find_machine(section: SlurmSection, shape: JobShape) -> tuple[Machine, str | None]:
    """Return this job's devices, and what they lack of what the job requested, if anything."""
    gpus = visible_gpus() if section.gpus else []
    broken = None
    if section.gpus and len(gpus) < shape.devices:
        broken = f"{socket.gethostname()} shows this job {len(gpus)} GPUs, and not {shape.devices}"
    python: Sequence[str] = [sys.executable]
    if section.python and shape.nodes > 1:  # ranks on other nodes start by the same
        python = shlex.split(section.python)
    machine = Machine(
        devices=shape.devices,
        gpus=tuple(gpus[: shape.devices]) if shape.nodes == 1 else (),
        nodes=shape.nodes,
        allow_fewer_devices=False,
        needs_gpus=bool(section.gpus),
        srun=(f"--cpus-per-task={section.cpus_per_task}", *section.srun),  # older srun do not inherit it
        python=tuple(python),
    )
    return machine, broken


def _nodes_to_exclude(sweep: Sweep, result: LaunchResult, shape: JobShape, nodes: Sequence[str]) -> tuple[str, ...]:
    """Return the nodes on which the remaining runs failed, or that failed, unless too few other nodes exist."""
    failed = [node for run_id in result.remaining for node in RunRecord(sweep.run_dir(run_id)).failed_nodes()]
    if result.broken and not result.interrupted and len(nodes) == 1:
        failed += nodes
    if failed and (job_id := slurm.current_job_id()):
        with contextlib.suppress(SweepError):
            failed = [*slurm.excluded_nodes(job_id), *failed]
    return slurm.nodes_to_exclude(failed, os.environ.get("SLURM_JOB_PARTITION"), shape.nodes)


def _submit_anew(planned: PlannedSweep, shape: JobShape, result: LaunchResult, exclude: Sequence[str]) -> str | None:
    """Submit a longer job in place of this one, if the remaining runs are slower than planned, and return its id; None
    if this one is to be requeued, with its limit."""
    start, end = (float(os.environ.get(f"SLURM_JOB_{name}_TIME", 0)) for name in ("START", "END"))
    job_id = slurm.current_job_id()
    try:
        minutes = time_limit_min(planned, [run for run in planned.runs if run.run_id in result.remaining], 1)
        if job_id and start and 60 * minutes > end - start + 60:
            return submit_like(planned.sweep, job_id, shape, minutes, exclude)
    except SweepError as error:
        _log.warning("could not submit a longer job (%s); this one is requeued with its time limit", error)
    return None


def _requeue_or_finish(
    result: LaunchResult, exclude: Sequence[str], *, has_worked: bool, submit_anew: Callable[[], str | None]
) -> str:
    """Requeue this job if it can continue later or elsewhere, or replace it by a longer one, and say how it ends.

    After TERM, Slurm requeues the job itself.

    Raises:
        WorkerJobError: the node is broken, the job is too short, or it cannot be requeued.
    """
    job_id = slurm.current_job_id()
    goes_on = result.remaining and result.stopped_by in (None, signal.SIGUSR2) and job_id
    if goes_on and result.broken and not exclude:
        raise WorkerJobError(result.broken)
    if goes_on and (result.interrupted or exclude):
        if not (has_worked or result.stopped_by or exclude):
            raise WorkerJobError("this job is too short for any run to save; raise slurm.time_limit_min")
        try:
            job = slurm.jobs().get(goes_on)
            if job and job.state == "RUNNING":  # else it was cancelled, or is requeued already
                if result.interrupted and (new := submit_anew()):
                    return f"submitted anew, with more time, as {new}"
                slurm.command("scontrol", "requeue", goes_on)
                if exclude:
                    slurm.command("scontrol", "update", f"JobId={goes_on}", f"ExcNodeList={','.join(exclude)}")
                return "requeued"
        except SweepError as error:
            raise WorkerJobError(f"could not requeue ({error}); `aimscale launch` goes on") from error
    if result.failed:
        return f"failed: {', '.join(result.failed)}"
    return "nothing is left" if not result.remaining else "to be continued"


def launch_slurm(
    planned: PlannedSweep,
    *,
    retry: bool = False,
    stop_sd: float | None = None,
    dry_run: bool = False,
    allow_dirty: bool = False,
) -> list[Submission]:
    """Submit the jobs that the runs need and return at once; a dry run asks Slurm nothing and writes nothing.

    Raises:
        SweepError, DataError: as in `launch` and `submit`.
    """
    if dry_run:
        planned.states = planned.launch_states(retry=retry)
        raise_on_problems(planned.sweep, planned.startable())
    else:
        prepare_launch(planned, retry=retry, stop_sd=stop_sd)
    return submit(planned, allow_dirty=allow_dirty, dry_run=dry_run, retry=retry)


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


def main() -> int:
    """Be the worker of a job; the last line of its log says how it ended."""
    directory, *shape = sys.argv[1:]
    log_to_console()
    signal.signal(signal.SIGUSR2, lambda *_: None)  # unlike an ignored signal, this can be handled while runs execute
    print(f"{WORKER_BEGINS}: job {slurm.current_job_id()} on {os.environ.get('SLURM_JOB_NODELIST')}", flush=True)
    try:
        nodes, devices = map(int, shape)
        ending = execute_job(Path(directory), JobShape(nodes=nodes, devices=devices))
    except UserError as error:
        print(f"aimscale: {error}", flush=True)
        return error.exit_code
    print(f"{WORKER_ENDS}: {ending}", flush=True)
    return int(ending.startswith("failed"))


if __name__ == "__main__":
    sys.exit(main())
