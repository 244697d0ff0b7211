"""Training of one run from its directory to its last budget, as a single process, by torchrun, or in Slurm.

The walk over the segments (`harness.run.schedule`): up the trunk to a budget's branch point, save, decay, save the
weights, evaluate, record a row, return to the trunk, go on. The run directory holds everything that is needed to resume
the walk anywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import time
from collections.abc import Sequence

import torch

from aimscale.harness.data.store.dataset_info import find_info
from aimscale.harness.data.stream.loader import rank_batches
from aimscale.harness.data.stream.unindexed import open_stream
from aimscale.harness.device.execution import out_of_memory, plan_start
from aimscale.harness.device.job import Job
from aimscale.harness.device.peak import device_name, measure_peak
from aimscale.harness.log.loggers import Logger
from aimscale.harness.log.record import Recorder
from aimscale.harness.probe.cost import curve_bytes
from aimscale.harness.probe.pending_evaluations import update_row
from aimscale.harness.run.budgets import ABOUT, check_branch, saved_budgets, trunk_position
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.failures import PreemptedError
from aimscale.harness.run.fence import earlier_folders
from aimscale.harness.run.files import remove_dir
from aimscale.harness.run.provenance import process_age_s, record_start
from aimscale.harness.run.row import ROW_VERSION, describe, model_of
from aimscale.harness.run.schedule import Segment, schedule_of
from aimscale.harness.step.checkpoint import CheckpointError, Manifest, load_checkpoint, load_newest
from aimscale.harness.step.deepspeed_setup import EngineOptions
from aimscale.harness.step.engine import Engine, StepOutcome, should_compile
from aimscale.harness.step.feed import RankRequest, Step, run_on_all_ranks
from aimscale.harness.step.saving import CheckpointWriter, recover_checkpoints, save_weights
from aimscale.harness.train.curve import LearningCurve


class Trainer:
    """State of one run in this process, and its walk over the segments."""

    def __init__(self, run: RunDir, config: RunConfig, job: Job, loggers: Sequence[Logger] = ()) -> None:
        group = job.group
        self.run, self.config, self.group, self.watch, self.flag = run, config, group, job.watch, job.flag
        training, runtime = config.training, config.runtime
        self.batch_size = training.optimiser.batch_size
        self.schedule = schedule_of(config)
        self.model_config = model_of(training)
        machines = group.num_machines()
        self.stream = run_on_all_ranks(
            group,
            lambda: open_stream(config, cache_dir=runtime.cache_dir, cache_gb=runtime.cache_gb, machines=machines),
        )
        lookup = functools.cache(find_info)
        measuring = group.from_first(lambda: curve_bytes(config, lookup))
        self.peak = group.from_first(lambda: measure_peak(group.device, training.optimiser.precision))
        self.plan = plan_start(
            training,
            runtime,
            group.from_first(lambda: run.read_status().too_large),
            device=device_name(group.device),
            world_size=group.world_size,
            device_bytes=group.min_over_ranks(group.memory_bytes()),
            host_bytes=group.min_over_ranks(group.host_memory_bytes()) if group.device.type == "cuda" else None,
            measuring=measuring,
        )
        self.has_stepped = False
        if measuring and not self.plan.measures and group.is_first:
            print("nothing is measured during training: the device has no memory left for it", flush=True)
        self.engine = Engine(
            self.model_config,
            training.optimiser,
            EngineOptions(
                zero_stage=self.plan.zero_stage,
                activation_checkpointing=self.plan.activation_checkpointing,
                compile=should_compile(runtime.compile, group.device, self.plan.zero_stage),
            ),
            group,
            seed=training.seed,
        )
        self.saved_at = time.monotonic()
        self.recorder = Recorder(run, config, group, self.model_config, self.peak, loggers)
        self.writer = CheckpointWriter(self.engine, group, copies=self.plan.copies_checkpoints)
        beside = dataclasses.replace(job, group=group.with_reserved_memory(self.plan.held_bytes))
        self.curve = LearningCurve(run, config, beside, self.engine, lookup=lookup, loggers=loggers)

    def walk(self) -> None:
        """Train from the current state of the run to its last budget."""
        gc.disable()  # ranks that collect garbage at different steps would wait for each other; see `_train_segment`
        try:
            self._walk()
        except CheckpointError:
            raise
        except Exception:
            self.writer.leave()
            raise
        finally:
            gc.enable()

    def _walk(self) -> None:
        """Train the remaining segments one after the other."""
        segments, position, is_start = self._resume()
        self._announce()
        for number, segment in enumerate(segments):
            if number > 0:
                position, is_start = segment.start, True
                if segments[number - 1].branch is not None:
                    load_checkpoint(self.run.checkpoint_dir(segment.start), self.engine, self.group)
            if is_start and segment.branch is not None and (segment.start > 0 or number + 1 < len(segments)):
                self._save(segment.start, None)
            self.recorder.enter(segment, from_its_start=is_start)
            self._train_segment(segment, position)
            if segment.branch is not None:
                self.writer.finish()
                self._save_budget(segment.stop)
                if self.group.is_first:
                    update_row(self.run, self.config, segment.stop)
        if self.group.is_first:
            self._keep_end_of_trunk()

    def close(self) -> None:
        """Free the memory of weights, gradients and optimiser states."""
        self.writer.close()
        self.engine.close()
        del self.engine, self.writer, self.curve
        gc.collect()
        if self.group.device.type == "cuda":
            torch.cuda.empty_cache()

    def _keep_end_of_trunk(self) -> None:
        """Remove all checkpoints of a finished run but the one that a longer budget would start from."""
        is_wsd = self.config.training.schedule.kind == "wsd"
        end = self.run.checkpoint_dir(trunk_position(self.run, self.schedule)) if is_wsd else None
        for path in self.run.checkpoints.iterdir() if self.run.checkpoints.is_dir() else ():
            if path != end:
                remove_dir(path)
        with contextlib.suppress(OSError):
            self.run.checkpoints.rmdir()

    def _resume(self) -> tuple[list[Segment], int, bool]:
        """Load the furthest saved point; returns the remaining segments, the position in the first, and whether that is
        its start.

        The end of a budget is no such point: from there the walk returns to the trunk, whose checkpoint is kept.
        """
        saved = list(self.group.from_first(lambda: saved_budgets(self.run)))
        left = [budget for budget in self.schedule.budgets if budget not in saved]
        leaves = {budget: self.schedule.branch_point(budget) for budget in (*saved, *left)}
        for budget in saved if self.group.is_first else ():
            update_row(self.run, self.config, budget)
        manifest = self._load_newest(left, max((leaves[budget] for budget in saved), default=0))
        position = point = manifest.images_seen if manifest else 0
        if manifest is not None and manifest.branch is not None:
            point = leaves[manifest.branch]
            left.sort(key=lambda budget: budget != manifest.branch)
        else:
            self.recorder.metrics.images_done = point + sum(budget - leaves[budget] for budget in saved)
        for budget in left:
            check_branch(self.run, self.schedule, budget, point)
        return self.schedule.segments(point, left), position, position == point and point in leaves.values()

    def _load_newest(self, left: list[int], trunk: int) -> Manifest | None:
        """Load the furthest checkpoint that leads to a budget of `left`; if `trunk` is above 0, the trunk has one
        there.

        Raises:
            CheckpointError: there must be a complete checkpoint, and there is none.
        """
        self.group.from_first(lambda: recover_checkpoints(self.run, earlier_folders(self.run.path)))
        manifest = load_newest(self.run.checkpoints, self.engine, self.group, branches=left)
        if manifest is None and left and trunk > 0:
            load_checkpoint(self.run.checkpoint_dir(trunk), self.engine, self.group)  # raises what is wrong with it
        if manifest is not None:
            self.recorder.metrics.restore(manifest.progress)
        return manifest

    def _train_segment(self, segment: Segment, position: int) -> None:
        """Train from `position` to the end of a segment, with checkpoints on the way."""
        batches = rank_batches(
            self.stream,
            group=self.group,
            start=position,
            stop=segment.stop,
            batch_size=self.batch_size,
            micro_batch=self.plan.micro_batch,
            num_workers=self.config.runtime.num_workers,
        )
        every = self.config.runtime.checkpoint_every_images or segment.stop  # only the last step reaches it
        with self.recorder.feed.reading(batches, self._request):
            while position < segment.stop:
                self.watch.check()
                try:
                    self._measure(position, segment)
                    step = self.recorder.next_step()
                    if step.must_stop:
                        raise PreemptedError
                except PreemptedError:
                    self._save(position, segment.branch)
                    self.writer.finish()
                    raise
                lr = self.schedule.lr(position, segment.branch)
                with self.watch.step():
                    outcome = self._step(step, lr)
                    position += self.batch_size
                    self.recorder.step(outcome, images_seen=position, lr=lr, num_targets=step.num_targets)
                if position // self.batch_size % self.config.runtime.log_every_steps == 0:
                    gc.collect()  # objects since the start; the step waits for its line anyway
                if position < segment.stop and (step.must_save or position % every < self.batch_size):
                    self._save(position, segment.branch)

    def _step(self, step: Step, lr: float) -> StepOutcome:
        """Take one step.

        Raises:
            TooLargeError: memory ran out in the first one, for the first time.
        """
        try:
            outcome = self.engine.step(step.micro_batches, num_targets=step.num_targets, lr=lr)
        except Exception as error:
            device, world_size = device_name(self.group.device), self.group.world_size
            too_large = out_of_memory(error, self.plan, device=device, world_size=world_size)
            if self.has_stepped or too_large is None:
                raise
            raise too_large from error
        self.has_stepped = True
        step.micro_batches.clear()
        return outcome

    def _measure(self, position: int, segment: Segment) -> None:
        """Measure what is due at a position of the trunk, at the start of a decay, or anywhere under cosine."""
        is_cosine = self.config.training.schedule.kind == "cosine"
        is_trunk = is_cosine or segment.branch is None or position == segment.start
        if not (self.plan.measures and is_trunk and self.curve.is_at(position)):
            return
        lr = self.schedule.lr(position - self.batch_size, segment.branch if is_cosine else None)
        with self.recorder.untimed():
            self.curve.measure(position, lr)

    def _request(self) -> RankRequest:
        """Return this rank's requests, asked for once per step."""
        minutes = self.config.runtime.checkpoint_every_min
        now = time.monotonic()
        # Decided by the first rank, so that ranks with different clocks do not save twice.
        is_due = self.group.is_first and minutes is not None and now - self.saved_at >= 60 * minutes
        if is_due:
            self.saved_at = now
        return RankRequest(stop=self.flag.is_raised, save=is_due, error=self.writer.problem())

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

    def _save_budget(self, budget: int) -> None:
        """Write a budget's weights, with its row so far in the file's metadata; evaluation adds the rest of the row."""
        row = describe(self.config) | self.recorder.facts()
        unique_images = self.stream.unique_images or None
        row |= {
            "unique_images": unique_images,
            "data_fingerprint": self.stream.fingerprint,
            "device": device_name(self.group.device),
            "zero_stage": self.plan.zero_stage,
            "images_seen": budget,
            "epochs": budget / unique_images if unique_images else None,
            "flops_train": row["flops_per_image"] * budget,
            "flops_6nd": 6 * row["params_total"] * self.model_config.num_tokens * budget,
            "probes": [],
        }
        about = {
            "version": ROW_VERSION,
            "run_id": self.config.run_id,
            "model": self.config.training.model.model_dump(mode="json"),
            "target": self.config.training.objective.target,
            "row": row,
        }
        metadata = {"format": "pt", ABOUT: json.dumps(about, allow_nan=False)}
        save_weights(self.run.model_file(budget), self.engine, self.group, metadata)

    def _announce(self) -> None:
        """Record and print how this start executes the run."""
        startup_s = process_age_s()
        if not self.group.is_first:
            return
        record_start(
            self.run,
            {
                "device": device_name(self.group.device),
                "world_size": self.group.world_size,
                **dataclasses.asdict(self.plan),
                "peak": dataclasses.asdict(self.peak),
                "startup_s": startup_s,
            },
        )
        done, planned = self.recorder.metrics.images_done, self.schedule.images_planned()
        self.run.write_status(images_planned=planned, images_done=done, heartbeat=time.time())
        self.recorder.say(
            f"{self.config.run_id}: {done} of {planned} images done, ZeRO {self.plan.zero_stage}, micro-batch "
            f"{self.plan.micro_batch}{' (lowered)' * self.plan.is_lowered}, {self.group.world_size} rank(s), "
            f"matrix-multiplication peak "
            f"{self.peak.flops_per_s / 1e9:.0f} GFLOP/s (n = {self.peak.gemm_side}), ready after {startup_s:.1f} s"
        )
