"""The bookkeeping of a training run: counters that survive restarts, metric lines, speed, heartbeat, terminal."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import torch

from aimscale.aim.config import ModelConfig
from aimscale.aim.cost import TRAIN_OVER_FORWARD, executed_flops_per_image
from aimscale.harness.data.stream.batch import Batch
from aimscale.harness.device.distributed import Group
from aimscale.harness.device.peak import Peak
from aimscale.harness.log.loggers import Logger, open_loggers
from aimscale.harness.log.metrics import TAIL_FRACTION, JsonLines, StepLog
from aimscale.harness.log.terminal import Terminal
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.failures import DivergedError
from aimscale.harness.run.schedule import Segment
from aimscale.harness.step.engine import StepOutcome
from aimscale.harness.step.feed import Feed, Step


@dataclasses.dataclass(kw_only=True)
class Tally:
    """What a stretch of training took."""

    wall_s: float = 0.0
    """Wall time of steps and checkpoints."""
    device_s: float = 0.0
    """The same times the number of devices."""
    num_images: int = 0
    """Images trained on."""
    num_skipped_steps: int = 0
    """Non-finite steps."""
    num_bad_samples: int = 0
    """Undecodable samples, replaced."""
    num_loss_spikes: int = 0
    """Losses far above those before them."""
    num_roll_backs: int = 0
    """Returns to an earlier point's weights."""

    def __add__(self, other: Tally) -> Tally:
        ours, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return Tally(**{key: ours[key] + theirs[key] for key in ours})


@dataclasses.dataclass(kw_only=True)
class Interval:
    """What happened since the last line."""

    started: float = dataclasses.field(default_factory=time.perf_counter)
    """`perf_counter` at its start."""
    wall_s: float = 0.0
    """Time booked so far."""
    data_wait_s: float = 0.0
    """Time spent waiting for images."""
    num_images: int = 0
    """Images of all ranks."""
    num_targets: int = 0
    """Scored targets of all ranks."""


class Recorder:
    """Counts, and writes `metrics.jsonl`, `speed.jsonl` and the heartbeat of one run."""

    metrics: JsonLines
    speed: JsonLines

    def __init__(
        self, run: RunDir, config: RunConfig, group: Group, model_config: ModelConfig, peak: Peak, images_planned: int
    ) -> None:
        self.images_done = 0
        self._run, self._config, self._group = run, config, group
        self._model_config, self._peak = model_config, peak
        self._trunk, self._branch = Tally(), Tally()
        self._num_bad = 0  # among `images_done`
        self._feed = Feed(
            group, num_tokens=model_config.num_tokens, max_bad_fraction=config.training.data.max_bad_fraction
        )
        self._log = StepLog(group)
        self._consecutive_skipped = 0
        self.point: str | None = None
        """Name of the checkpoint to roll back to."""
        self._interval = Interval()
        self._segment = Segment(start=0, stop=0, branch=None)
        self._loggers: list[Logger] = []
        self.terminal = Terminal(is_first=group.is_first, images_planned=images_planned)

    @property
    def _tally(self) -> Tally:
        return self._trunk if self._segment.branch is None else self._branch

    def enter(self, segment: Segment, *, from_its_start: bool) -> None:
        """A segment begins, or goes on after a restart."""
        self._segment, self._interval = segment, Interval()
        if from_its_start:
            self._log.start_segment()
            if segment.branch is not None:
                self._branch = Tally()

    def next_of(self, batches: Iterator[list[Batch]], *, stop_asked: bool) -> Step:
        """The next step's images; the wait for them is counted.

        Raises:
            DataError: on every rank, as `Feed.next` says.
        """
        num_images = self.images_done + self._config.training.optimiser.batch_size
        step = self._feed.next(batches, stop_asked=stop_asked, num_images=num_images, num_bad=self._num_bad)
        self._interval.data_wait_s += step.wait_s
        if not step.must_stop:  # else the next start loads these images again
            self._num_bad += step.num_bad_samples
            self._tally.num_bad_samples += step.num_bad_samples
        return step

    def step(self, outcome: StepOutcome, *, images_seen: int, lr: float, num_targets: int) -> None:
        """One step is done, up to `images_seen`; a line is written when it is due.

        Raises:
            DivergedError: too many non-finite steps in a row.
        """
        batch_size, segment = self._config.training.optimiser.batch_size, self._segment
        self.images_done += batch_size
        self._interval.num_images += batch_size
        self._interval.num_targets += num_targets
        self._tally.num_images += batch_size
        in_tail = segment.branch is not None and images_seen > (1 - TAIL_FRACTION) * segment.branch
        self._log.add(outcome, images_seen=images_seen, lr=lr, num_targets=num_targets, in_tail=in_tail)
        self._consecutive_skipped = 0 if outcome.was_applied else self._consecutive_skipped + 1
        self._tally.num_skipped_steps += not outcome.was_applied
        is_due = images_seen // batch_size % self._config.runtime.log_every_steps == 0
        if is_due or images_seen == segment.stop:
            self._write_line()
        section = self._config.training.roll_back
        limit = section.after_skipped_steps if section and self._may_roll_back else None
        if self._consecutive_skipped > (self._config.runtime.max_skipped_steps if limit is None else limit):
            raise DivergedError(
                f"{self._consecutive_skipped} steps in a row were not finite, up to image {images_seen}; "
                "lower optimiser.lr_peak or lengthen the warm-up"
            )

    def book(self) -> float:
        """Add the time since the last call to the counters; returns the interval's time so far."""
        now = time.perf_counter()
        wall_s = now - self._interval.started
        self._interval.started = now
        self._interval.wall_s += wall_s
        self._tally.wall_s += wall_s
        self._tally.device_s += wall_s * self._group.world_size
        return self._interval.wall_s

    def _write_line(self) -> None:
        """The only place in the loop that waits for the device."""
        num_skipped = self._trunk.num_skipped_steps + self._branch.num_skipped_steps * (self._tally is self._branch)
        batch_size = self._config.training.optimiser.batch_size
        line = self._log.line(batch_size, self._segment.branch, num_skipped)
        self._tally.num_loss_spikes += len(line["loss_spikes"])
        wall_s = self.book()
        interval, self._interval = self._interval, Interval()
        if not self._group.is_first:
            return
        images_per_s = interval.num_images / wall_s
        mfu = self.mfu(images_per_s, interval.num_targets / interval.num_images)
        self.metrics.write(line)
        speed = {
            **{key: line[key] for key in ("images_seen", "step", "branch")},
            "time": time.time(),
            "images_per_s": images_per_s,
            "ms_per_step": 1000 * wall_s * batch_size / interval.num_images,
            "mfu": mfu,
            "data_wait": interval.data_wait_s / wall_s,
            "device_memory_gb": device_memory_bytes(self._group) / 1e9,
        }
        self.speed.write(speed)
        self._run.write_status(
            durable=False,
            phase="train" if self._segment.branch is None else "decay",
            images_seen=line["images_seen"],
            images_done=self.images_done,
            step=line["step"],
            loss=line["loss"],
            images_per_s=images_per_s,
            mfu=mfu,
            num_skipped_steps=num_skipped,
            heartbeat=time.time(),
        )
        for logger in self._loggers:
            logger.log(line | speed)
        where = "trunk" if self._segment.branch is None else f"decay to {self._segment.branch}"
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        self.terminal.step(
            where,
            f"loss {loss}  {images_per_s:.0f} images/s",
            f"MFU {100 * mfu:.1f} %  lr {line['lr']:.2e}",
            images_seen=line["images_seen"],
            images_done=self.images_done,
        )

    def mfu(self, images_per_s: float, scored_tokens: float) -> float:
        """Model FLOPs executed over the measured peak of all devices, 0..1."""
        flops = TRAIN_OVER_FORWARD * executed_flops_per_image(self._model_config, scored_tokens).forward
        return images_per_s * flops / (self._peak.flops_per_s * self._group.world_size)

    def progress(self) -> dict[str, Any]:
        """What makes a checkpoint or a budget a point of the walk; the lines written so far are made durable."""
        self.book()
        return {
            "images_done": self.images_done,
            "num_bad_done": self._num_bad,
            "trunk": dataclasses.asdict(self._trunk),
            "branch": dataclasses.asdict(self._branch),
            "log": self._log.state(),
            "consecutive_skipped": self._consecutive_skipped,
            "point": self.point,
            "train_loss": self._log.train_loss(),
            "metrics_bytes": self.metrics.sync() if self._group.is_first else 0,
        }

    def restore(self, progress: dict[str, Any] | None) -> None:
        """Take up `progress`, or start anew; lines that it does not know of are cut off."""
        if progress is not None:
            self.images_done = progress["images_done"]
            self._num_bad = progress.get("num_bad_done", 0)  # runs begun before it was counted lack it
            self._trunk, self._branch = Tally(**progress["trunk"]), Tally(**progress["branch"])
            self._log.restore(progress["log"])
            self._consecutive_skipped = progress.get("consecutive_skipped", 0)  # older runs lack these two
            self.point = progress.get("point")
        if self._group.is_first:
            self.metrics = JsonLines(self._run.metrics, progress["metrics_bytes"] if progress else 0)
            self.speed = JsonLines(self._run.speed)
            self._loggers = open_loggers(self._run, self._config)

    def facts(self, progress: dict[str, Any]) -> dict[str, Any]:
        """Columns of the results row of a budget that ended at `progress`."""
        took = Tally(**progress["trunk"]) + Tally(**progress["branch"])
        images_per_s = took.num_images / took.wall_s
        return {
            "train_loss": progress["train_loss"],
            "wall_s": took.wall_s,
            "device_hours": took.device_s / 3600,
            "images_per_s": images_per_s,
            "mfu": self.mfu(images_per_s, self._model_config.num_tokens / 2),
            "num_skipped_steps": took.num_skipped_steps,
            "num_bad_samples": took.num_bad_samples,
            "num_loss_spikes": took.num_loss_spikes,
            "num_roll_backs": took.num_roll_backs,
            "world_size": self._group.world_size,
        }

    @property
    def is_finite(self) -> bool:
        """Whether the last step was."""
        return self._consecutive_skipped == 0

    @property
    def _may_roll_back(self) -> bool:
        section, done = self._config.training.roll_back, (self._trunk + self._branch).num_roll_backs
        return section is not None and self.point is not None and done < section.max_times

    def roll_back(self) -> str | None:
        """The checkpoint to take the weights of, where too many bad steps end in that; counts it."""
        if not self._may_roll_back:
            return None
        self._tally.num_roll_backs += 1
        self._consecutive_skipped = 0
        return self.point

    def close(self) -> None:
        """Leave the terminal and the loggers."""
        self.terminal.close()
        for logger in self._loggers:
            logger.close()


def device_memory_bytes(group: Group) -> int:
    """Peak memory of the device, or of the process on a CPU."""
    if group.device.type == "cuda":
        return torch.cuda.max_memory_allocated(group.device)
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
