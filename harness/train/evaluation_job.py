"""Evaluate a run as a job: `python -m aimscale.harness.train.evaluation_job RUN_DIR/evaluating`.

`RUN_DIR/evaluating/` holds the job's configuration (the run's, with what is to be measured now), status, lease and
logs, so that it neither waits for the training of the same run nor disturbs it.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import torch

from aimscale.harness.device.distributed import find_placement
from aimscale.harness.probe.run import join_ranks
from aimscale.harness.run.directory import EXIT_FINISHED, EXIT_PREEMPTED, RunDir
from aimscale.harness.run.failures import PreemptedError, classify, run_worker, stop_signals
from aimscale.harness.run.watch import execute
from aimscale.harness.train.evaluate import evaluate_run, pausing


def evaluation_job(path: Path) -> int:
    """Execute the job in `path` and return the exit code, as `harness.train.loop` does.

    Raises:
        UserError: something cannot be measured; `status.json` says why, too.
        LeaseHeld: another process executes this job.
    """
    job, run = RunDir(path), RunDir(path.parent)
    config = job.load_config()
    placement = find_placement()
    is_first = placement.rank == 0
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(
            execute(
                job,
                group=placement.name,
                rank=placement.rank,
                world_size=placement.world_size,
                also=[run.path / folder for folder in ("validation", "completions", "probes")],
            )
        )
        flag = stack.enter_context(stop_signals())
        if is_first:
            job.write_start()
        try:
            stack.enter_context(watch.watching())
            torch.set_num_threads(config.runtime.num_threads)
            group = stack.enter_context(join_ranks(config.runtime.device))
            evaluate_run(run, config, group, pausing(group, flag, watch.check, job), shown_in=job)
        except PreemptedError:
            if is_first:
                job.write_status(state="preempted", phase="", reason="stopped by a signal; what was done is kept")
            return EXIT_PREEMPTED
        except Exception as error:
            reason_class, reason = classify(error)
            watch.note_failure(reason, reason_class)
            raise
        if is_first:
            job.write_status(state="finished", phase="", heartbeat=time.time())
    return EXIT_FINISHED


def main() -> None:
    """Entry point of the launchers."""
    run_worker(evaluation_job, "aimscale.harness.train.evaluation_job RUN_DIR/evaluating")


if __name__ == "__main__":
    main()
