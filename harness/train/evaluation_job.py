"""Evaluate a run as a job: `python -m aimscale.harness.train.evaluation_job RUN_DIR/evaluating`.

`RUN_DIR/evaluating/` holds the job's configuration (the run's, with what is to be measured now), status, lease and
logs, so that it neither waits for the training of the same run nor disturbs it.
"""

from __future__ import annotations

from pathlib import Path

from aimscale.harness.device.job import Job, execute_job
from aimscale.harness.probe.run import join_ranks
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.failures import run_worker
from aimscale.harness.train.evaluate import evaluate_run


def evaluation_job(path: Path) -> int:
    """Execute the job in `path` and return the exit code (`run.directory`).

    Raises:
        UserError: something cannot be measured; `status.json` says why, too.
        LeaseHeld: another process executes this job.
    """
    folder, run = RunDir(path), RunDir(path.parent)
    config = folder.load_config()

    def work(job: Job) -> None:
        group = job.stack.enter_context(join_ranks(config.runtime.device, config.runtime.num_threads))
        evaluate_run(run, config, group, job)

    return execute_job(folder, work, also=[run.path / name for name in ("validation", "completions", "probes")])


if __name__ == "__main__":
    run_worker(evaluation_job, "aimscale.harness.train.evaluation_job RUN_DIR/evaluating")
