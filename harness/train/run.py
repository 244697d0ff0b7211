"""The program that trains the missing budgets of a run: `python -m aimscale.harness.train RUN_DIR`."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import torch

from aimscale.harness.distributed.group import find_placement
from aimscale.harness.distributed.job import Job, execute_job
from aimscale.harness.log.loggers import Logger, open_loggers
from aimscale.harness.results.pending import pending_work
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import EXIT_FINISHED, RunDir
from aimscale.harness.run.failures import memory_advice
from aimscale.harness.run.schedule import missing_budgets
from aimscale.harness.train.loop import Trainer

_log = logging.getLogger(__name__)

SAVES_MEMORY = "lower runtime.micro_batch, use more ranks, or set runtime.activation_checkpointing to true"


def train(path: Path, config: RunConfig | None = None) -> int:
    """Train the missing budgets of the run in `path`; returns the exit code.

    Args:
        config: configuration of the run; by default the one in its directory, which the first rank may still be making.

    Raises:
        UserError: the configuration or the data cannot be used; `status.json` says why, too.
        LockHeld: another process trains this run.
    """
    run = RunDir(path)
    config = config or run.load_config()
    if find_placement().world_size == 1 and run.read_status().state == "finished" and not missing_budgets(run, config):
        _log.info("%s is trained; extend its budgets in the sweep file, and launch, to go on", path)
        return EXIT_FINISHED

    def work(job: Job) -> None:
        torch.set_num_threads(config.runtime.num_threads)
        group = job.group
        loggers: list[Logger] = []
        group.broadcast_from_rank0(lambda: loggers.extend(job.exits.enter_context(open_loggers(run, config))))
        if group.broadcast_from_rank0(lambda: missing_budgets(run, config)):
            with memory_advice(SAVES_MEMORY):
                trainer = Trainer(run, config, job, loggers)
                job.exits.callback(trainer.close)  # once a failure is recorded: a device may hang
                with contextlib.closing(trainer.writer), job.ending_in_time():
                    trainer.run_segments()
        group.broadcast_from_rank0(lambda: pending_work(run, config))  # notes where nothing is to be evaluated

    return execute_job(run, config.runtime.device, work)
