"""An attempt at a run: `python -m aimscale.harness.train RUN_DIR` trains its missing budgets and evaluates them."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from aimscale.harness.distributed.group import find_placement
from aimscale.harness.distributed.job import Job, execute_job
from aimscale.harness.log.loggers import Logger, open_loggers
from aimscale.harness.probe.pending_evaluations import pending_work
from aimscale.harness.run.budgets import missing_budgets
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import EXIT_FINISHED, RunDir
from aimscale.harness.run.failures import memory_advice
from aimscale.harness.train.evaluate import evaluate_run
from aimscale.harness.train.loop import Trainer

_log = logging.getLogger(__name__)

SAVES_MEMORY = "lower runtime.micro_batch, use more ranks, or set runtime.activation_checkpointing to true"


def train(path: Path, config: RunConfig | None = None) -> int:
    """Train the missing budgets of the run in `path`, then evaluate what is pending; returns the exit code.

    Args:
        config: configuration of the run; by default the one in its directory, which the first rank may still be making.

    Raises:
        UserError: the configuration or the data cannot be used; `status.json` says why, too.
        LockHeld: another process executes this run.
    """
    run = RunDir(path)
    config = config or run.load_config()
    if find_placement().world_size == 1 and run.read_status().state == "finished" and not pending_work(run, config):
        _log.info("%s has finished; extend its budgets or probes in the sweep file, and launch, to go on", path)
        return EXIT_FINISHED

    def work(job: Job) -> None:
        torch.set_num_threads(config.runtime.num_threads)
        group = job.group
        loggers: list[Logger] = []
        group.from_first(lambda: loggers.extend(job.exits.enter_context(open_loggers(run, config))))
        if group.from_first(lambda: missing_budgets(run, config)):
            with memory_advice(SAVES_MEMORY):
                trainer = Trainer(run, config, job, loggers)
                try:
                    trainer.walk()
                finally:
                    trainer.close()  # evaluation needs the memory of the training state
        with memory_advice():
            evaluate_run(run, config, job, loggers, with_probes=os.environ.get("AIMSCALE_PROBES") != "apart")

    return execute_job(run, config.runtime.device, work)
