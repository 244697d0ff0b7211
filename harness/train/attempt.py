"""One attempt at a run: hold it, train, evaluate, and say how it ended."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

import torch

from aimscale.harness.device.distributed import find_placement, start_group, stop_group
from aimscale.harness.run.directory import (
    EXIT_DIVERGED,
    EXIT_FINISHED,
    EXIT_PREEMPTED,
    RunDir,
)
from aimscale.harness.run.failures import DivergedError, PreemptedError, classify, run_worker, stop_signals
from aimscale.harness.run.trunk import missing_budgets
from aimscale.harness.run.watch import execute
from aimscale.harness.train.evaluate import evaluate_run, missing_evaluations, pausing
from aimscale.harness.train.loop import Trainer


def _train(trainer: Trainer) -> None:
    """Walk to the end and free the device: no training state stands there beside what comes next."""
    try:
        trainer.walk()
    finally:
        trainer.close()


def train(path: Path) -> int:
    """Train, evaluate if that is to be done here, or resume the run in `path`; returns the exit code (`run.directory`).

    Raises:
        UserError: the configuration or the data cannot be used; `status.json` says why, too.
        LeaseHeld: another process executes this run.
    """
    run = RunDir(path)
    config = run.load_config()
    placement = find_placement()
    is_first = placement.rank == 0
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(
            execute(run, group=placement.name, rank=placement.rank, world_size=placement.world_size)
        )
        is_finished = run.read_status().state == "finished" and not missing_budgets(run, config)
        if is_finished and config.runtime.evaluate == "inline":
            is_finished = not missing_evaluations(run, config)
        if is_first and placement.world_size == 1 and is_finished:
            return EXIT_FINISHED
        flag = stack.enter_context(stop_signals())
        if is_first:
            run.write_start()
        try:
            stack.enter_context(watch.watching())
            torch.set_num_threads(config.runtime.num_threads)
            group = start_group(placement, config.runtime.device)
            stack.callback(stop_group)
            if missing_budgets(run, config):
                _train(Trainer(run, config, group, watch, flag))
            if config.runtime.evaluate == "inline":
                evaluate_run(run, config, group, pausing(group, flag, watch.check, run), shown_in=run)
            if is_first:
                run.write_status(state="finished", phase="", heartbeat=time.time())
        except PreemptedError:
            if is_first:
                run.write_status(state="preempted", phase="", reason="stopped by a signal, after saving")
            return EXIT_PREEMPTED
        except DivergedError as error:
            if is_first:
                run.write_status(state="diverged", phase="", reason=str(error), reason_class="nan")
                print(f"aimscale: {error}", file=sys.stderr)
            return EXIT_DIVERGED
        except Exception as error:
            reason_class, reason = classify(error)
            watch.note_failure(reason, reason_class)
            raise
    return EXIT_FINISHED


def main() -> None:
    """Entry point of the launchers."""
    run_worker(train, "aimscale.harness.train RUN_DIR")
