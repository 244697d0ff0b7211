"""The learning rate as a function of images seen; the segments of training, trunk and decay branches; and the points of
them that a run has saved, can still reach, or is measured at.

Warm-up-stable-decay (Hu et al. 2024, arXiv 2404.06395, section 4; Hägele et al. 2024, arXiv 2405.18392) lets one run
serve several data budgets: the trunk keeps the peak rate, and every budget branches a decay off it. A finished run
keeps the last saved point of its trunk, from which a longer budget goes on; points before it are gone. Cosine is the
AIM paper's schedule. Torch is not imported here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol

from aimscale.aim.cost import executed_flops_per_image, flops_per_image, mean_scored_tokens
from aimscale.aim.errors import some
from aimscale.harness.run.config import ConfigError, RunConfig, ScheduleSection, ValidationSection, build_model_config
from aimscale.harness.run.directory import WEIGHTS_CRC32, RunDir, RunDirError
from aimscale.harness.run.files import file_crc32
from aimscale.harness.run.init import read_about


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """Segment of training: a piece of the trunk, or the decay to one budget."""

    start: int
    """Images seen before its first step."""
    stop: int
    """Images seen after its last step."""
    branch: int | None
    """The budget this segment decays to; null on the trunk."""
    resumes: bool = False
    """Whether it is the rest of a segment that an earlier start began, whose counters go on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """Rest of a run's training."""

    segments: list[Segment]
    """Segments to train, in order."""
    images_done: int
    """Images trained on before, decay branches included."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate and segments of one run."""

    section: ScheduleSection
    lr_peak: float
    batch_size: int
    budgets: tuple[int, ...]
    """Images seen at which a row is recorded, increasing multiples of the batch size."""

    def branch_point(self, budget: int) -> int:
        """Return the images seen, whole steps, at which the decay to `budget` leaves the trunk; 0 under cosine."""
        if self.section.kind == "cosine":
            return 0
        num_steps = budget // self.batch_size
        num_decay_steps = min(num_steps, max(1, round(self.section.decay_fraction * num_steps)))
        return (num_steps - num_decay_steps) * self.batch_size

    def is_on_trunk(self, images_seen: int, branch: int | None) -> bool:
        """Return whether a position is on the trunk: also the start of a decay, and under cosine every position."""
        return branch is None or self.section.kind == "cosine" or images_seen == self.branch_point(branch)

    @property
    def last_point(self) -> int:
        """Images seen at the last possible measurement during training: the trunk's end, or a step before it."""
        last = self.budgets[-1]
        return last - self.batch_size if self.section.kind == "cosine" else self.branch_point(last)

    def is_point(self, images_seen: int, every: int | None) -> bool:
        """Return whether a position of the trunk is the first step at or past a multiple of `every` images."""
        return every is not None and 0 < images_seen <= self.last_point and images_seen % every < self.batch_size

    def num_points(self, every: int | None) -> int:
        """Return the number of measurements at this distance during training; 0 for None."""
        return self.last_point // max(every, self.batch_size) if every else 0

    def images_planned(self) -> int:
        """Count the images the whole run trains on: the trunk once and every branch."""
        return sum(segment.stop - segment.start for segment in plan_walk(self).segments)

    def lr(self, images_seen: int, branch: int | None) -> float:
        """Return the learning rate of the step after `images_seen` images, on the trunk or a branch: `lr_start` at the
        first, and `lr_end` after a budget's last."""
        section = self.section
        if images_seen < section.warmup_images:
            return section.lr_start + (self.lr_peak - section.lr_start) * images_seen / section.warmup_images
        if branch is None:
            return self.lr_peak
        start = section.warmup_images if section.kind == "cosine" else self.branch_point(branch)
        progress = min(1.0, max(0.0, (images_seen - start) / (branch - start)))
        share = 0.5 * (1 + math.cos(math.pi * progress)) if section.kind == "cosine" else 1 - progress
        return section.lr_end + (self.lr_peak - section.lr_end) * share


def plan_walk(schedule: Schedule, saved: Collection[int] = (), checkpoint: tuple[int, int | None] = (0, None)) -> Walk:
    """Plan the rest of a run: up the trunk to a branch point, down its branch, back to the trunk, and on.

    Args:
        saved: budgets whose weights are saved.
        checkpoint: images seen and branch of the checkpoint to go on from. The end of a budget is none: from there the
            walk returns to the trunk, whose checkpoint is kept.
    """
    position, branch = checkpoint
    trunk = point = position if branch is None else schedule.branch_point(branch)
    leaves = {budget: schedule.branch_point(budget) for budget in (*schedule.budgets, *saved)}
    missing = [budget for budget in schedule.budgets if budget not in saved]
    missing.sort(key=lambda budget: budget != branch)  # the branch that was begun comes first
    segments: list[Segment] = []
    for budget in missing:
        if leaves[budget] > point:
            segments.append(Segment(start=point, stop=leaves[budget], branch=None))
            point = leaves[budget]
        segments.append(Segment(start=point, stop=budget, branch=budget))
    if segments and (position != trunk or trunk not in leaves.values()):
        segments[0] = dataclasses.replace(segments[0], start=position, resumes=position > 0)
    decays = sum(budget - leaves[budget] for budget in saved)
    return Walk(segments=segments, images_done=position + decays)


def unchecked_schedule(config: RunConfig) -> Schedule:
    """Build the schedule of a run without checking its warm-up."""
    return Schedule(
        section=config.training.schedule,
        lr_peak=config.training.optimiser.lr_peak,
        batch_size=config.training.optimiser.batch_size,
        budgets=config.evaluation.budgets,
    )


def schedule_of(config: RunConfig) -> Schedule:
    """Build the schedule of a run."""
    schedule = unchecked_schedule(config)
    smallest, warmup = config.evaluation.budgets[0], config.training.schedule.warmup_images
    limit = smallest if config.training.schedule.kind == "cosine" else schedule.branch_point(smallest)
    if warmup > limit or warmup >= smallest:
        raise ConfigError(
            f"schedule.warmup_images {warmup} reaches past image {limit}, where the budget "
            f"{smallest} starts to decay; shorten the warm-up"
        )
    return schedule


def saved_budgets(run: RunDir) -> dict[int, dict[str, Any]]:
    """Return each budget whose weights are saved, ascending, with what training knew of it; empty if imported."""
    paths = run.root.glob("budgets/[0-9]*/model.safetensors")
    return dict(sorted((int(path.parent.name), read_about(path)) for path in paths))


def chosen_budgets(run: RunDir, images_seen: int | None) -> list[int]:
    """Return the saved budget of `images_seen` images as a list, or for None all saved budgets, ascending."""
    saved = list(saved_budgets(run))
    if not saved:
        raise RunDirError(f"{run.root} has no finished budget yet (no budgets/<images seen>/model.safetensors)")
    if images_seen not in (None, *saved):
        raise RunDirError(f"{run.root} has no saved budget of {images_seen} images; it has {some(saved)}")
    return saved if images_seen is None else [images_seen]


def check_weights(run: RunDir, images_seen: int) -> Path:
    """Compare a budget's weights with the CRC-32 that writing them left in its row, if any, and return their path.

    Raises:
        RunDirError: they are damaged.
    """
    path, rows = run.model_file(images_seen), {row["images_seen"]: row for row in run.read_rows()}
    expected = rows.get(images_seen, {}).get(WEIGHTS_CRC32)
    if expected is not None and path.is_file() and file_crc32(path) != expected:
        raise RunDirError(
            f"{path} is damaged: its CRC-32 is not that of the weights that were written; restore it from a copy, or "
            f"delete {run.root} to train it again"
        )
    return path


def trunk_position(run: RunDir, schedule: Schedule) -> int:
    """Return the images seen at the furthest saved point of the trunk; 0 without one."""
    points = [schedule.branch_point(budget) for budget in saved_budgets(run)]
    for path in run.checkpoints.glob("[0-9]*/manifest.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            manifest = json.loads(path.read_text())
            branch = manifest["branch"]
            points.append(manifest["images_seen"] if branch is None else schedule.branch_point(branch))
    return max(points, default=0)


def missing_budgets(run: RunDir, config: RunConfig) -> list[int]:
    """Return the budgets that are still to be trained."""
    done = {row["images_seen"] for row in run.read_rows()} | saved_budgets(run).keys()
    missing = [budget for budget in config.evaluation.budgets if budget not in done]
    schedule = unchecked_schedule(config)
    position = trunk_position(run, schedule)
    for budget in missing:
        if (point := schedule.branch_point(budget)) < position:
            raise RunDirError(
                f"budget {budget} of {run.root} needs a checkpoint at {point} images, and the earliest one kept is at "
                f"{position}; leave that budget out, or train it in another --root"
            )
    if missing and position and not (run.checkpoint_dir(position) / "manifest.json").exists():
        in_branch = any(run.checkpoints.glob("[0-9]*-decay-*/manifest.json"))
        if not in_branch:
            raise RunDirError(
                f"{run.root} cannot be extended to {missing[-1]} images: its last checkpoint before the decay, "
                f"checkpoints/{position}, is missing; train longer budgets in another --root"
            )
    return missing


class Counted(Protocol):
    """What is known of a data set (`DatasetInfo`)."""

    @property
    def num_usable(self) -> int:
        """Images that decode."""


SHARE_DURING, MAX_POINTS = 0.03, 100
"""Limits of `validation.every_images: auto`: a share of the FLOPs of training, and a number of points."""


def validation_images(section: ValidationSection, lookup: Callable[[str], Counted | None]) -> int:
    """Count the forward passes of one budget's validation; 0 if the images are not here to be counted."""
    info = lookup(section.path)
    images = info.num_usable if info else 0
    return section.num_prefixes * min(section.num_images or images, images)


def validation_distance(config: RunConfig, lookup: Callable[[str], Counted | None]) -> int | None:
    """Return the images between validations during training (`validation.every_images`); None for none."""
    section, training = config.evaluation.validation, config.training
    if section.every_images != "auto":
        return section.every_images
    model, schedule = build_model_config(training), unchecked_schedule(config)
    scored = mean_scored_tokens(model, training.objective.prefix)
    trained = executed_flops_per_image(model, scored).train
    measured = validation_images(section, lookup) * flops_per_image(model).forward
    images = max(measured / (SHARE_DURING * trained), schedule.last_point / MAX_POINTS)
    return math.ceil(images / schedule.batch_size) * schedule.batch_size if measured else None


def num_points(config: RunConfig, lookup: Callable[[str], Counted | None]) -> int:
    """Count the validations during a run's training."""
    return unchecked_schedule(config).num_points(validation_distance(config, lookup))
