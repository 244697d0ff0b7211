"""The program that trains the missing budgets of a run: `python -m aimscale.harness.train RUN_DIR`.

The walk over the segments (`harness.run.schedule`): up the trunk to a budget's branch point, save, decay, save the
weights, return to the trunk, go on. The run directory holds everything that is needed to resume the walk anywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from aimscale.harness.data.store.dataset_info import find_info
from aimscale.harness.data.stream.loader import RankRequest, Step, free_shared_bytes, next_step, train_batches
from aimscale.harness.data.stream.stream import Batch, open_stream
from aimscale.harness.device.execution import EngineOptions, curve_bytes, out_of_memory, plan_start, should_compile
from aimscale.harness.device.speed import device_name, measure_peak
from aimscale.harness.distributed.group import find_placement, step_timeout_s, write_timeout_s
from aimscale.harness.distributed.job import Job, execute_job
from aimscale.harness.log.loggers import Logger, open_loggers, profiled_steps
from aimscale.harness.log.record import Recorder, TrainedStep
from aimscale.harness.results import pending_work, record_trained
from aimscale.harness.run.config import RunConfig, build_model_config
from aimscale.harness.run.directory import EXIT_FINISHED, WEIGHTS_CRC32, RunDir
from aimscale.harness.run.failures import PreemptedError, memory_advice
from aimscale.harness.run.files import remove_dir
from aimscale.harness.run.init import ABOUT
from aimscale.harness.run.provenance import process_age_s, record_start
from aimscale.harness.run.row import ROW_VERSION, budget_columns
from aimscale.harness.run.schedule import (
    Segment,
    missing_budgets,
    plan_walk,
    saved_budgets,
    schedule_of,
    trunk_position,
)
from aimscale.harness.step.checkpoint import load_checkpoint, load_newest, save_weights
from aimscale.harness.step.engine import Engine
from aimscale.harness.step.initial import read_initial
from aimscale.harness.step.saving import CheckpointWriter
from aimscale.harness.validation import LearningCurve

_log = logging.getLogger(__name__)


class Trainer:
    """State of one run in this process, and its walk over the segments."""

    after_step: Callable[[], None] | None = None
    """What all ranks call behind each step, if anything."""

    def __init__(self, run: RunDir, config: RunConfig, job: Job, loggers: Sequence[Logger] = ()) -> None:
        group = job.group
        self.run, self.config, self.group, self.flag = run, config, group, job.flag
        training, runtime = config.training, config.runtime
        self.batch_size = training.optimiser.batch_size
        self.schedule = schedule_of(config)
        self.freeze_images = training.init.freeze_images if training.init else 0
        model_config = build_model_config(training)
        self.num_tokens = model_config.num_tokens
        self.stream = group.run_on_all_ranks(
            lambda: open_stream(config, cache_dir=runtime.cache_dir, cache_gb=runtime.cache_gb)
        )
        self.num_workers = runtime.loader_processes(is_gpu=group.device.type == "cuda", cores=group.cores())
        self.device = group.broadcast_from_rank0(lambda: device_name(group.device))
        self.peak = group.broadcast_from_rank0(lambda: measure_peak(group.device, training.optimiser.precision))
        measuring = group.broadcast_from_rank0(lambda: curve_bytes(config, find_info))
        self.plan = plan_start(
            training,
            runtime,
            group.broadcast_from_rank0(lambda: run.read_status().too_large),
            device=self.device,
            world_size=group.world_size,
            device_bytes=group.min_over_ranks(group.memory_bytes()),
            is_gpu=group.device.type == "cuda",
            measuring=measuring,
        )
        if measuring and not self.plan.measures and group.is_first:
            _log.warning("nothing is measured during training: the device has no memory left for it")
        self.engine = Engine(
            model_config,
            training.optimiser,
            EngineOptions(
                zero_stage=self.plan.zero_stage,
                activation_checkpointing=self.plan.activation_checkpointing,
                compile=should_compile(runtime.compile, group.device, self.plan.zero_stage),
                freezes_backbone=self.freeze_images > 0,
            ),
            group,
            seed=training.seed,
        )
        self.recorder = Recorder(run, config, group, self.peak, loggers)
        self.writer = CheckpointWriter(self.engine, group)
        self.curve = LearningCurve(run, config, job, self.engine, loggers) if self.plan.measures else None
        self.longest_step_s, self.saved_at, self.has_saved = 0.0, time.monotonic(), False
        gc.disable()  # `_train` collects: ranks that do at different steps would wait for each other
        gc.freeze()  # so that it looks through new objects alone: all that was imported would take 70 ms each time

    def run_segments(self) -> None:
        """Train from the current state of the run to its last budget."""
        segments = self._resume()
        self._announce()
        for number, segment in enumerate(segments):
            if number > 0 and segments[number - 1].branch is not None:  # back to the trunk
                load_checkpoint(self.run.checkpoint_dir(segment.start), self.engine, self.group)
            is_new_branch = segment.branch is not None and not segment.resumes
            if is_new_branch and (segment.start > 0 or segment is not segments[-1]):
                self._save(segment.start, None)
            self.recorder.enter(segment)
            self._train(segment)
            if segment.branch is not None:
                self._save_budget(segment.branch)
        if self.group.is_first:
            self._keep_end_of_trunk()

    def _train(self, segment: Segment) -> None:
        """Train a segment, with measurements and checkpoints on the way."""
        position, every = segment.start, self.config.runtime.checkpoint_every_images or segment.stop
        batches = train_batches(
            self.stream,
            rank=self.group.rank,
            world_size=self.group.world_size,
            start=segment.start,
            stop=segment.stop,
            batch_size=self.batch_size,
            micro_batch=self.plan.micro_batch,
            num_workers=self.num_workers,
            pin_memory=self.group.device.type == "cuda",
            # measured before any rank takes its share
            shared_bytes=self.group.min_over_ranks(free_shared_bytes()) // self.group.ranks_per_node,
        )
        with contextlib.closing(batches):
            while position < segment.stop:
                try:
                    self._measure(position, segment.branch)
                    step = self._next_step(batches)
                    if step.must_stop:
                        raise PreemptedError
                except PreemptedError:
                    self._save(position, segment.branch)
                    self.writer.finish()
                    raise
                self.recorder.step(*self._step(step, position, segment.branch))
                position += self.batch_size
                if self.after_step is not None:
                    self.after_step()
                if position // self.batch_size % self.config.runtime.log_every_steps == 0:
                    gc.collect()
                if position < segment.stop and (step.must_save or position % every < self.batch_size):
                    self._save(position, segment.branch)

    def _next_step(self, batches: Iterator[list[Batch]]) -> Step:
        """Take the next step's images, and agree on them with the other ranks."""
        so_far = self.recorder.metrics.total
        return next_step(
            self.group,
            batches,
            self._request,
            num_tokens=self.num_tokens,
            max_bad_fraction=self.config.training.data.max_bad_fraction,
            num_images=so_far.num_images + self.batch_size,
            num_bad=so_far.num_bad_samples,
        )

    def _step(self, step: Step, position: int, branch: int | None) -> tuple[TrainedStep, Tensor, Tensor]:
        """Take the step at a position, and return it with the loss sum of all ranks and the gradient's norm.

        Raises:
            TooLargeError: memory ran out before this start's first checkpoint, for the first time.
        """
        lr, started = self.schedule.lr(position, branch), time.monotonic()
        try:
            with self.group.collective_timeout(step_timeout_s(self.longest_step_s)):  # the first one may compile
                outcome = self.engine.step(
                    step.micro_batches, num_targets=step.num_targets, lr=lr, is_frozen=position < self.freeze_images
                )
                loss_sum = self.group.sum_tensor(outcome.loss_sum.double())
        except Exception as error:
            too_large = out_of_memory(error, self.plan, device=self.device, world_size=self.group.world_size)
            if self.has_saved or too_large is None:
                raise
            raise too_large from error
        self.longest_step_s = max(self.longest_step_s, time.monotonic() - started)
        step.micro_batches.clear()
        taken = TrainedStep(
            images_seen=position + self.batch_size,
            lr=lr,
            num_targets=step.num_targets,
            was_applied=outcome.was_applied,
            num_bad_samples=step.num_bad_samples,
            data_wait_s=step.wait_s,
            forward_s=outcome.forward_s,
        )
        return taken, loss_sum, outcome.grad_norm

    def _measure(self, position: int, branch: int | None) -> None:
        """Measure what is due at a position of the trunk."""
        if self.curve is None or not self.schedule.is_point(position, self.curve.distance):
            return
        if not self.schedule.is_on_trunk(position, branch):
            return
        is_cosine = self.config.training.schedule.kind == "cosine"
        with self.recorder.untimed():
            self.curve.measure(position, self.schedule.lr(position - self.batch_size, branch if is_cosine else None))

    def _request(self) -> RankRequest:
        """Return this rank's requests, asked for once per step."""
        minutes, now = self.config.runtime.checkpoint_every_min, time.monotonic()
        # Decided by the first rank, so that ranks with different clocks do not save twice.
        if is_due := self.group.is_first and minutes is not None and now - self.saved_at >= 60 * minutes:
            self.saved_at = now
        return RankRequest(
            stop=self.flag.is_raised, save=is_due, error=self.writer.problem() if self.writer.pending else None
        )

    def _resume(self) -> list[Segment]:
        """Load the furthest saved point, and plan the segments that remain."""
        run, group, schedule = self.run, self.group, self.schedule
        saved = list(group.broadcast_from_rank0(lambda: saved_budgets(run)))
        for budget in saved if group.is_first else ():
            record_trained(run, budget)
        missing = [budget for budget in schedule.budgets if budget not in saved]
        manifest = load_newest(run.checkpoints, self.engine, group, branches=missing)
        if manifest is None:
            if trunk := max((schedule.branch_point(budget) for budget in saved), default=0):
                load_checkpoint(run.checkpoint_dir(trunk), self.engine, group)  # raises what is wrong with it
            elif init := self.config.training.init:  # a run that goes on never reads it again
                self.engine.set_weights(read_initial(self.config.training, init, group).get)
            return plan_walk(schedule, saved).segments
        walk = plan_walk(schedule, saved, (manifest.images_seen, manifest.branch))
        self.recorder.metrics.restore(manifest.progress | {"images_done": walk.images_done})
        return walk.segments

    def _save(self, position: int, branch: int | None) -> None:
        """Start a checkpoint; older ones are removed afterwards unless the walk returns to them."""
        keep = set() if branch is None else {self.run.checkpoint_dir(self.schedule.branch_point(branch))}
        self.writer.save(
            self.run.checkpoint_dir(position, branch),
            run_id=self.config.run_id,
            images_seen=position,
            branch=branch,
            progress=self.recorder.progress(),
            keep=keep,
        )
        self.saved_at = time.monotonic()
        self.has_saved = True

    def _save_budget(self, budget: int) -> None:
        """Save the weights at the end of a decay, and with them everything in their row that training knows."""
        self.writer.finish()
        unique_images = self.stream.unique_images or None
        row = budget_columns(self.config, budget) | self.recorder.row_columns()
        row |= {
            "device": self.device,
            "data_fingerprint": self.stream.fingerprint,
            "unique_images": unique_images,
            "zero_stage": self.plan.zero_stage,
            "epochs": budget / unique_images if unique_images else None,
            "probes": [],
        }
        training = self.config.training
        about = {"version": ROW_VERSION, "run_id": self.config.run_id, "target": training.objective.target}
        about |= {"model": training.model.model_dump(mode="json"), "row": row}
        metadata = {"format": "pt", ABOUT: json.dumps(about, allow_nan=False)}
        if self.group.is_first:
            self.run.record_curve()
        with self.group.collective_timeout(write_timeout_s(4 * row["params_total"])):
            crc = save_weights(self.run.model_file(budget), self.engine, self.group, metadata)
        if self.group.is_first:
            record_trained(self.run, budget, **{WEIGHTS_CRC32: crc})

    def _keep_end_of_trunk(self) -> None:
        """Remove all checkpoints of a finished run but the one that a longer budget would start from."""
        is_wsd = self.config.training.schedule.kind == "wsd"
        end = self.run.checkpoint_dir(trunk_position(self.run, self.schedule)) if is_wsd else None
        for path in self.run.checkpoints.iterdir() if self.run.checkpoints.is_dir() else ():
            if path != end:
                remove_dir(path)
        with contextlib.suppress(OSError):
            self.run.checkpoints.rmdir()

    def close(self) -> None:
        """End the writer of checkpoints, and the engine."""
        gc.unfreeze()
        gc.enable()
        self.writer.close()
        self.engine.close()

    def _announce(self) -> None:
        """Record and print how this start executes the run."""
        startup_s = process_age_s()
        if not self.group.is_first:
            return
        plan = self.plan
        about = {"device": self.device, "world_size": self.group.world_size, **dataclasses.asdict(plan)}
        record_start(self.run, about | {"peak": dataclasses.asdict(self.peak), "startup_s": startup_s})
        done, planned = self.recorder.metrics.images_done, self.schedule.images_planned()
        self.run.write_status(images_planned=planned, images_done=done, heartbeat=time.time())
        _log.info(
            f"{self.config.run_id}: {done} of {planned} images done, ZeRO {plan.zero_stage}, micro-batch "
            f"{plan.micro_batch}{' (lowered)' * plan.is_lowered}, {self.group.world_size} rank(s), "
            f"matrix-multiplication peak {self.peak.flops_per_s / 1e9:.0f} GFLOP/s (n = {self.peak.gemm_side}), "
            f"ready after {startup_s:.1f} s"
        )


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
        if config.runtime.loggers:
            group.broadcast_from_rank0(lambda: loggers.extend(job.exits.enter_context(open_loggers(run, config))))
        if group.broadcast_from_rank0(lambda: missing_budgets(run, config)):
            with memory_advice(
                "lower runtime.micro_batch, use more ranks, or set runtime.activation_checkpointing to true"
            ):
                trainer = Trainer(run, config, job, loggers)
                job.exits.callback(trainer.close)  # once a failure is recorded: a device may hang
                num = config.runtime.profile
                profile = profiled_steps(run.path / "profile", num, group) if num else contextlib.nullcontext()
                with contextlib.closing(trainer.writer), job.ending_in_time(), profile as trainer.after_step:
                    trainer.run_segments()
        group.broadcast_from_rank0(lambda: pending_work(run, config))  # notes where nothing is to be evaluated

    return execute_job(run, config.runtime.device, work)
