"""Train one run from its directory to its last budget, alone, by torchrun, in Slurm.

The walk (`harness.run.schedule`): up the trunk to a budget's branch point, save, decay, save the weights, evaluate,
record a row, return to the trunk, go on. Everything needed to take the walk up anywhere is in the run directory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from aimscale.aim.errors import UserError
from aimscale.aim.model import AIM
from aimscale.harness.data.stream.loader import train_batches
from aimscale.harness.data.stream.positions import TrainStream
from aimscale.harness.device.distributed import Group, find_placement, start_group, stop_group
from aimscale.harness.device.memory import execution_plan
from aimscale.harness.device.peak import device_name, known_peak
from aimscale.harness.log.record import Recorder
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import EXIT_DIVERGED, EXIT_FINISHED, EXIT_PREEMPTED, EXIT_USER_ERROR, Lease, RunDir
from aimscale.harness.run.failures import DivergedError, PreemptedError, StopFlag, classify, stop_signals
from aimscale.harness.run.provenance import process_age_s, record_start
from aimscale.harness.run.row import model_of
from aimscale.harness.run.schedule import Segment, schedule_of
from aimscale.harness.step.checkpoint import load_checkpoint, load_newest, save_checkpoint
from aimscale.harness.step.engine import Engine, EngineOptions
from aimscale.harness.step.feed import run_on_all_ranks
from aimscale.harness.train.budget import evaluate_budget, finished_budgets, save_budget


class Trainer:
    """One run in this process: everything it needs, and the walk."""

    def __init__(self, run: RunDir, config: RunConfig, group: Group, lease: Lease | None, flag: StopFlag) -> None:
        self.run, self.config, self.group, self.lease, self.flag = run, config, group, lease, flag
        training, runtime = config.training, config.runtime
        self.batch_size = training.optimiser.batch_size
        self.schedule = schedule_of(config)
        self.model_config = model_of(training)
        self.stream = run_on_all_ranks(
            group,
            lambda: TrainStream(
                config, cache_dir=runtime.cache_dir, cache_gb=runtime.cache_gb, augment_on=runtime.augment_on
            ),
        )
        self.plan = execution_plan(
            self.model_config,
            batch_size=self.batch_size,
            world_size=group.world_size,
            precision=training.optimiser.precision,
            device_bytes=group.from_first(group.memory_bytes()),
            host_bytes=group.from_first(group.host_memory_bytes()),
            zero_stage=runtime.zero_stage,
            micro_batch=runtime.micro_batch,
            activation_checkpointing=runtime.activation_checkpointing,
            offload_optimiser=runtime.offload_optimiser,
            offload_weights=runtime.offload_weights,
            on_cpu=group.device.type == "cpu",
        )
        model = AIM(self.model_config)
        model.init_weights(training.seed)
        self.engine = Engine(
            model,
            training.optimiser,
            EngineOptions(
                zero_stage=self.plan.zero_stage,
                activation_checkpointing=self.plan.activation_checkpointing,
                compile=runtime.compile,
                offload_optimiser=self.plan.offload_optimiser,
                offload_weights=self.plan.offload_weights,
            ),
            group,
            log_file=run.logs / f"deepspeed-rank{group.rank}.log",
        )
        self.peak = group.from_first(known_peak(group.device, training.optimiser.precision) if group.is_first else None)
        self.recorder = Recorder(
            run, config, group, self.model_config, self.peak, images_planned=self.schedule.images_planned()
        )

    def walk(self) -> None:
        """Train from wherever the run stands to its last budget."""
        segments = self.schedule.segments()
        index, position = self._resume(segments)
        self._announce()
        while index < len(segments):
            segment = segments[index]
            is_start = position == segment.start
            if is_start and index > 0 and segments[index - 1].branch is not None:
                load_checkpoint(self.run.checkpoint_dir(segment.start), self.engine, self.group)
            if is_start and segment.branch is not None and len(segments) > 1:
                self._save(segment.start, None)
            if is_start and index > 0:
                self.recorder.point = self.run.checkpoint_dir(segment.start).name
            self.recorder.enter(segment, from_its_start=is_start)
            self._train_segment(segment, position)
            if segment.branch is not None:
                progress = self.recorder.progress()
                save_budget(
                    self.run, self.engine, self.group, config=self.config, images_seen=segment.stop, progress=progress
                )
                self._evaluate(segment.stop, progress)
            index += 1
            position = segments[index].start if index < len(segments) else 0
        if self.group.is_first:
            self.run.write_status(state="finished", phase="", heartbeat=time.time())
            shutil.rmtree(self.run.checkpoints, ignore_errors=True)

    def _resume(self, segments: list[Segment]) -> tuple[int, int]:
        """Find the furthest saved point of the walk and go there; returns the segment and the position in it.

        Saved points are checkpoints and the ends of budgets. After a budget the walk goes on from the trunk, so its
        end needs no checkpoint of its own.
        """
        budgets: dict[int, dict[str, Any]] = self.group.from_first(finished_budgets(self.run, self.config))
        rows = self.group.from_first({row["images_seen"] for row in self.run.read_rows()})
        progress = max(budgets.values(), key=lambda each: each["images_done"], default=None)
        done = -1 if progress is None else progress["images_done"]
        manifest, notes = load_newest(self.run.checkpoints, self.engine, self.group, beyond=done)
        for note in notes:
            self.recorder.terminal.say(note)
        if manifest is not None:
            progress = manifest.progress
        self.recorder.restore(progress)
        for budget in budgets.keys() - rows:
            self._evaluate(budget, budgets[budget])
        left = self.recorder.images_done
        for index, segment in enumerate(segments):
            if left < segment.stop - segment.start:
                return index, segment.start + left
            left -= segment.stop - segment.start
        return len(segments), 0

    def _train_segment(self, segment: Segment, position: int) -> None:
        """Train from `position` to the end of a segment, saving on the way."""
        batches = train_batches(
            self.stream,
            start=position,
            stop=segment.stop,
            batch_size=self.batch_size,
            micro_batch=self.plan.micro_batch,
            rank=self.group.rank,
            world_size=self.group.world_size,
            num_workers=self.config.runtime.num_workers,
            pin_memory=self.group.device.type == "cuda",
        )
        every, roll_back = self.config.runtime.checkpoint_every_images, self.config.training.roll_back

        def is_crossed(distance: int | None) -> bool:
            return distance is not None and position < segment.stop and position % distance < self.batch_size

        with contextlib.closing(batches):
            while position < segment.stop:
                step = self.recorder.next_of(batches, stop_asked=self.flag.is_raised)
                if step.must_stop:
                    self._save(position, segment.branch)
                    raise PreemptedError
                lr = self.schedule.lr(position, segment.branch)
                outcome = self.engine.step(step.micro_batches, num_targets=step.num_targets, lr=lr)
                position += self.batch_size
                try:
                    self.recorder.step(outcome, images_seen=position, lr=lr, num_targets=step.num_targets)
                except DivergedError:
                    if not self._roll_back(position, segment.branch):
                        raise
                if roll_back and is_crossed(roll_back.every_images) and self.recorder.is_finite:
                    self.recorder.point = self.run.checkpoint_dir(position, segment.branch).name
                    self._save(position, segment.branch)
                elif is_crossed(every):
                    self._save(position, segment.branch)

    def _roll_back(self, position: int, branch: int | None) -> bool:
        """Take the weights of the last point and go on behind the bad stretch, if the configuration says so.

        Points follow from the configuration alone, not from where the run was interrupted.
        """
        point = self.recorder.roll_back()
        if point is None:
            return False
        manifest = load_checkpoint(self.run.checkpoints / point, self.engine, self.group)
        self.recorder.terminal.say(f"too many bad steps: weights of image {manifest.images_seen}, on at {position}")
        self._save(position, branch)  # where a restart goes on
        return True

    def _save(self, position: int, branch: int | None) -> None:
        """Checkpoint, then drop what is needed neither to resume nor to return to the trunk."""
        if self.lease is not None:
            self.lease.check()
        path = self.run.checkpoint_dir(position, branch)
        save_checkpoint(
            path,
            self.engine,
            self.group,
            run_id=self.config.run_id,
            images_seen=position,
            branch=branch,
            progress=self.recorder.progress(),
        )
        needed = {path}
        if self.recorder.point is not None and self.config.training.roll_back is not None:
            needed.add(self.run.checkpoints / self.recorder.point)
        if branch is not None:
            needed.add(self.run.checkpoint_dir(self.schedule.branch_point(branch)))
        if self.group.is_first:
            for other in self.run.checkpoints.iterdir():
                if other not in needed:
                    shutil.rmtree(other, ignore_errors=True)

    def _evaluate(self, budget: int, progress: dict[str, Any]) -> None:
        """Validate, probe and record the row of a budget whose weights are saved."""
        facts = self.recorder.facts(progress) | {
            "unique_images": self.stream.unique_images,
            "data_fingerprint": self.stream.fingerprint,
            "device": device_name(self.group.device),
            "zero_stage": self.plan.zero_stage,
        }
        row = evaluate_budget(self.run, self.config, self.group, self.flag, images_seen=budget, facts=facts)
        probes = ", ".join(f"{each['task']} {each['kind']} {100 * each['top1']:.1f} %" for each in row["probes"])
        self.recorder.terminal.say(
            f"budget {budget}: validation loss {row['val_loss']:.4f} +- {row['val_loss_se']:.4f}  {probes}"
        )

    def _announce(self) -> None:
        """Record how this start executes the run."""
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
        done, planned = self.recorder.images_done, self.schedule.images_planned()
        self.run.write_status(images_planned=planned, images_done=done, heartbeat=time.time())
        self.recorder.terminal.say(
            f"{self.config.run_id}: {done} of {planned} images done, ZeRO {self.plan.zero_stage}, micro-batch "
            f"{self.plan.micro_batch}, {self.group.world_size} rank(s), matrix-multiplication peak "
            f"{self.peak.flops_per_s / 1e9:.0f} GFLOP/s (n = {self.peak.gemm_side}), ready after {startup_s:.1f} s"
        )


def train(path: Path) -> int:
    """Train or resume the run in `path` and return the exit code (`harness.run.directory` names them).

    Raises:
        UserError: the configuration or the data cannot be used; `status.json` says why, too.
        LeaseHeld: another process executes this run.
    """
    run = RunDir(path)
    config = run.load_config()
    placement = find_placement()
    is_first = placement.rank == 0
    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(run.hold()) if is_first else None
        if is_first and placement.world_size == 1 and run.read_status().state == "finished":
            return EXIT_FINISHED
        flag = stack.enter_context(stop_signals())
        if is_first:
            run.write_start()
        try:
            torch.set_num_threads(config.runtime.num_threads)
            group = start_group(placement, config.runtime.device)
            stack.callback(stop_group)
            trainer = Trainer(run, config, group, lease, flag)
            stack.callback(trainer.recorder.close)
            trainer.walk()
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
            if run.read_status().state != "failed":  # else this rank lost its connection to one that failed before
                reason_class, reason = classify(error)
                run.write_status(state="failed", phase="", reason=reason, reason_class=reason_class)
            raise
    return EXIT_FINISHED


def main() -> None:
    """Entry point of the launchers."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m aimscale.harness.train RUN_DIR")
    try:
        sys.exit(train(Path(sys.argv[1])))
    except UserError as error:
        print(f"aimscale: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
