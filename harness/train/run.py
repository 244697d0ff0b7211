"""The program that trains the missing budgets of a run, `python -m aimscale.harness.train RUN_DIR`, and profiles of it:
torch's trace of every rank's steps, and on a GPU a snapshot of its memory."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from aimscale.harness.distributed.group import Group, find_placement
from aimscale.harness.distributed.job import Job, execute_job
from aimscale.harness.log.loggers import Logger, open_loggers
from aimscale.harness.results import pending_work
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import EXIT_FINISHED, RunDir
from aimscale.harness.run.failures import memory_advice
from aimscale.harness.run.schedule import missing_budgets
from aimscale.harness.train.loop import Trainer

SKIPPED_STEPS = 5
"""Steps before those of a profile: they compile and allocate."""
MAX_MEMORY_EVENTS = 100_000
"""Number of allocations that a snapshot of memory goes back."""


@contextlib.contextmanager
def profiled_steps(folder: Path, num_steps: int, group: Group) -> Iterator[Callable[[], None]]:
    """Profile so many steps of the block; yields what all ranks call after each step.

    Each rank writes `rank-<number>.json.gz`, a trace for ui.perfetto.dev, into `folder`, and on a GPU
    `rank-<number>.memory.pickle`, for pytorch.org/memory_viz.
    """
    folder.mkdir(exist_ok=True)
    is_cuda = group.device.type == "cuda"

    def save(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(folder / f"rank-{group.rank}.json.gz"))
        if is_cuda:
            torch.cuda.memory._dump_snapshot(str(folder / f"rank-{group.rank}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    if is_cuda:
        torch.cuda.memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS)
    schedule = torch.profiler.schedule(skip_first=SKIPPED_STEPS, wait=0, warmup=1, active=num_steps, repeat=1)
    last = SKIPPED_STEPS + 1 + num_steps
    with torch.profiler.profile(schedule=schedule, on_trace_ready=save) as profile:

        def after_step() -> None:
            if profile.step_num < last:
                profile.step()
                if profile.step_num == last:
                    group.barrier()  # here and not in the next step's collectives, whose time is short

        yield after_step


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
                number = config.runtime.profile
                profile = profiled_steps(run.path / "profile", number, group) if number else contextlib.nullcontext()
                with contextlib.closing(trainer.writer), job.ending_in_time(), profile as trainer.after_step:
                    trainer.run_segments()
        group.broadcast_from_rank0(lambda: pending_work(run, config))  # notes where nothing is to be evaluated

    return execute_job(run, config.runtime.device, work)
