"""The bookkeeping of a training run: what every step adds to its counters, and when a line is due."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import torch

from aimscale.aim.config import ModelConfig
from aimscale.aim.cost import mean_scored_tokens
from aimscale.harness.data.stream.batch import Batch
from aimscale.harness.device.distributed import Group
from aimscale.harness.device.peak import Peak, utilisation
from aimscale.harness.log.counters import Counters, Tally
from aimscale.harness.log.lines import LineWriter
from aimscale.harness.log.metrics import TAIL_FRACTION, StepLog
from aimscale.harness.log.terminal import Terminal
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.failures import DivergedError
from aimscale.harness.run.schedule import Segment
from aimscale.harness.step.engine import StepOutcome
from aimscale.harness.step.feed import Feed, Step

MAX_SKIPPED_STEPS = 20
"""More consecutive steps than this that are not finite, and the run has diverged."""


@dataclasses.dataclass(kw_only=True)
class Interval:
    """What happened since the last line."""

    started: float = dataclasses.field(default_factory=time.perf_counter)
    """`perf_counter` at its start."""
    wall_s: float = 0.0
    """Time booked so far."""
    data_wait_s: float = 0.0
    num_images: int = 0
    """Images of all ranks."""
    num_targets: int = 0
    """Scored targets of all ranks."""


class Recorder:
    """Counts steps, writes a line whenever one is due, and says what a checkpoint and a row must know."""

    def __init__(
        self, run: RunDir, config: RunConfig, group: Group, model_config: ModelConfig, peak: Peak, images_planned: int
    ) -> None:
        self.counters = Counters()
        self.terminal = Terminal(is_first=group.is_first, images_planned=images_planned)
        self._run, self._config, self._group = run, config, group
        self._model_config, self._peak = model_config, peak
        self._batch_size = config.training.optimiser.batch_size
        self._feed = Feed(
            group, num_tokens=model_config.num_tokens, max_bad_fraction=config.training.data.max_bad_fraction
        )
        self._log = StepLog(group)
        self._interval = Interval()
        self._segment = Segment(start=0, stop=0, branch=None)
        self._writer: LineWriter | None = None

    def enter(self, segment: Segment, *, from_its_start: bool) -> None:
        """A segment begins, or goes on after a restart."""
        self._segment, self._interval = segment, Interval()
        self.counters.enter(is_branch=segment.branch is not None, from_its_start=from_its_start)
        if from_its_start:
            self._log.start_segment()

    def next_of(self, batches: Iterator[list[Batch]], *, stop_asked: bool, save_asked: bool) -> Step:
        """The next step's images; the wait for them is counted.

        Raises:
            DataError: on every rank, as `Feed.next` says.
        """
        num_images = self.counters.images_done + self._batch_size
        asked = {"stop_asked": stop_asked, "save_asked": save_asked}
        step = self._feed.next(batches, **asked, num_images=num_images, num_bad=self.counters.num_bad)
        self._interval.data_wait_s += step.wait_s
        if not step.must_stop:  # else the next start loads these images again
            self.counters.add_bad_samples(step.num_bad_samples)
        return step

    def step(self, outcome: StepOutcome, *, images_seen: int, lr: float, num_targets: int) -> None:
        """One step is done, up to `images_seen`; a line is written when it is due.

        Raises:
            DivergedError: too many non-finite steps in a row.
        """
        counters, segment, runtime = self.counters, self._segment, self._config.runtime
        counters.add_step(self._batch_size, was_applied=outcome.was_applied)
        self._interval.num_images += self._batch_size
        self._interval.num_targets += num_targets
        in_tail = segment.branch is not None and images_seen > (1 - TAIL_FRACTION) * segment.branch
        self._log.add(outcome, images_seen=images_seen, lr=lr, num_targets=num_targets, in_tail=in_tail)
        if images_seen // self._batch_size % runtime.log_every_steps == 0 or images_seen == segment.stop:
            self._write_line()
        if counters.consecutive_skipped > MAX_SKIPPED_STEPS:
            raise DivergedError(
                f"{counters.consecutive_skipped} steps in a row were not finite, up to image {images_seen}; "
                "lower optimiser.lr_peak or lengthen the warm-up"
            )

    def book(self) -> float:
        """Add the time since the last call to the counters; returns the interval's time so far."""
        now = time.perf_counter()
        wall_s = now - self._interval.started
        self._interval.started = now
        self._interval.wall_s += wall_s
        self.counters.current.wall_s += wall_s
        self.counters.current.device_s += wall_s * self._group.world_size
        return self._interval.wall_s

    def _write_line(self) -> None:
        """The only place in the loop that waits for the device."""
        line = self._log.line(self._batch_size, self._segment.branch, self.counters.num_skipped_steps)
        self.counters.current.num_loss_spikes += len(line["loss_spikes"])
        wall_s = self.book()
        interval, self._interval = self._interval, Interval()
        if self._writer is None:
            return
        images_per_s = interval.num_images / wall_s
        speed = {
            "images_per_s": images_per_s,
            "ms_per_step": 1000 * wall_s * self._batch_size / interval.num_images,
            **self._utilisation(images_per_s, interval.num_targets / interval.num_images),
            "data_wait": interval.data_wait_s / wall_s,
            "device_memory_gb": device_memory_bytes(self._group) / 1e9,
        }
        self._writer.write(line, speed, images_done=self.counters.images_done, wall_s=wall_s)

    def _utilisation(self, images_per_s: float, scored_tokens: float) -> dict[str, float | None]:
        return utilisation(
            self._model_config,
            self._peak,
            images_per_s=images_per_s,
            scored_tokens=scored_tokens,
            world_size=self._group.world_size,
        )

    def progress(self) -> dict[str, Any]:
        """What makes a checkpoint or a budget a point of the walk; the lines written so far are made durable."""
        self.book()
        return {
            **self.counters.state(),
            "log": self._log.state(),
            "train_loss": self._log.train_loss(),
            "metrics_bytes": self._writer.sync() if self._writer else 0,
        }

    def restore(self, progress: dict[str, Any] | None) -> None:
        """Take up `progress`, or start anew; lines that it does not know of are cut off."""
        if progress is not None:
            self.counters.restore(progress)
            self._log.restore(progress["log"])
        if self._group.is_first:
            known = progress["metrics_bytes"] if progress else 0
            self._writer = LineWriter(self._run, self._config, self.terminal, known)

    def facts(self, progress: dict[str, Any]) -> dict[str, Any]:
        """Columns of the results row of a budget that ended at `progress`."""
        took = Tally(**progress["trunk"]) + Tally(**progress["branch"])
        images_per_s = took.num_images / took.wall_s
        scored = mean_scored_tokens(self._model_config.num_tokens, self._config.training.objective.prefix)
        counts = ("num_skipped_steps", "num_bad_samples", "num_loss_spikes")
        return {
            "train_loss": progress["train_loss"],
            "wall_s": took.wall_s,
            "device_hours": took.device_s / 3600,
            "images_per_s": images_per_s,
            **self._utilisation(images_per_s, scored),
            **{name: getattr(took, name) for name in counts},
            "world_size": self._group.world_size,
        }

    def close(self) -> None:
        """Leave the terminal and the loggers."""
        self.terminal.close()
        if self._writer is not None:
            self._writer.close()


def device_memory_bytes(group: Group) -> int:
    """Peak memory of the device, or of the process on a CPU."""
    if group.device.type == "cuda":
        return torch.cuda.max_memory_allocated(group.device)
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
