"""Train a run, or evaluate one beside its training: `python -m aimscale.harness.train RUN_DIR|RUN_DIR/evaluating`.

`RUN_DIR/evaluating/` holds an evaluation's configuration (the run's, with what is to be measured now), status, lease
and logs, so that it neither waits for the training of the same run nor disturbs it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from aimscale.harness.data.stream.loader import start_server
from aimscale.harness.device.distributed import find_placement, start_group, stop_group
from aimscale.harness.device.job import Job, execute_job
from aimscale.harness.probe.run import join_ranks
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import EVALUATION, EXIT_FINISHED, RunDir
from aimscale.harness.run.failures import run_worker
from aimscale.harness.run.trunk import missing_budgets
from aimscale.harness.train.evaluate import evaluate_run, missing_evaluations
from aimscale.harness.train.loop import Trainer


def train(path: Path) -> int:
    """Train, evaluate if that is to be done here, or resume the run in `path`; returns the exit code (`run.directory`).

    Raises:
        UserError: the configuration or the data cannot be used; `status.json` says why, too.
        LeaseHeld: another process executes this run.
    """
    run = RunDir(path)
    config = run.load_config()
    if find_placement().world_size == 1 and _is_finished(run, config):
        print(f"{path} has finished; extend its budgets or probes in the sweep file, and launch, to go on")
        return EXIT_FINISHED

    def work(job: Job) -> None:
        torch.set_num_threads(config.runtime.num_threads)
        if config.runtime.num_workers:
            start_server()  # it imports PyTorch while the engine is built
        group = start_group(job.placement, config.runtime.device)
        job.stack.callback(stop_group)
        if missing_budgets(run, config):
            trainer = Trainer(run, config, group, job.watch, job.flag)
            try:
                trainer.walk()
            finally:
                trainer.close()  # frees the device: what comes next needs the memory of the training state
        if config.runtime.evaluate == "inline":
            evaluate_run(run, config, group, job)

    return execute_job(run, work)


def _is_finished(run: RunDir, config: RunConfig) -> bool:
    if run.read_status().state != "finished" or missing_budgets(run, config):
        return False
    return config.runtime.evaluate != "inline" or not missing_evaluations(run, config)


def evaluate(path: Path) -> int:
    """Execute the evaluation in `path`, RUN_DIR/evaluating, and return the exit code (`run.directory`).

    Raises:
        UserError: something cannot be measured; `status.json` says why, too.
        LeaseHeld: another process executes this job.
    """
    folder, run = RunDir(path), RunDir(path.parent)
    config = folder.load_config()

    def work(job: Job) -> None:
        group = job.stack.enter_context(join_ranks(config.runtime.device, config.runtime.num_threads))
        evaluate_run(run, config, group, job)

    return execute_job(folder, work, also=[run.path / name for name in ("validation", "probes")])


def main() -> None:
    """Entry point of the launchers."""
    run_worker(lambda path: (evaluate if path.name == EVALUATION else train)(path), "aimscale.harness.train RUN_DIR")
