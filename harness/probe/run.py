"""Probe the budgets of a run directory, beside training or later, knowing only its path."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from aimscale.aim.errors import did_you_mean
from aimscale.aim.model import AIM
from aimscale.aim.weights import load_model
from aimscale.harness.data.images import kernel_threads
from aimscale.harness.distributed.group import ALONE, Group, choose_device, find_placement, start_group, stop_group
from aimscale.harness.distributed.job import ProgressCallback, ignore_progress, numbered_progress
from aimscale.harness.probe.features.backbones import AimBackbone, baseline
from aimscale.harness.probe.features.tasks import ProbeError
from aimscale.harness.probe.protocol import probe_backbone
from aimscale.harness.results import finished_entries, update_row, weights_name
from aimscale.harness.run.config import ProbeSection, RunConfig, build_model_config
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.failures import memory_advice
from aimscale.harness.run.schedule import check_weights, chosen_budgets


def load_budget(run: RunDir, config: RunConfig, images_seen: int, device: str | torch.device) -> AIM:
    """Load the float32 model of a budget; WeightsError if its file is missing, damaged or another model's, and
    RunDirError if a bit of it was flipped."""
    return load_model(check_weights(run, images_seen), build_model_config(config.training), device=device).eval()


def wanted_tasks(sections: Sequence[ProbeSection], tasks: Sequence[str] | None) -> list[ProbeSection]:
    """Select the sections of these tasks, or all."""
    if not sections:
        raise ProbeError("the run's configuration names no probes; give some with --tasks FILE")
    by_task = {section.task: section for section in sections}
    for task in tasks or ():
        if task not in by_task:
            raise ProbeError(f"the run has no task '{task}'; {did_you_mean(task, by_task, 'its tasks:')}")
    return [section for section in sections if tasks is None or section.task in tasks]


@contextlib.contextmanager
def standalone_group(run: RunDir, device: str) -> Iterator[Group]:
    """Hold the evaluation of a run for the block, with the ranks that torchrun or Slurm started, or this process alone.

    Raises:
        LaunchError: a device that does not exist, or variables that name half of a group.
        LockHeld: another process evaluates or probes the run.
    """
    placement, config = find_placement(), run.load_config()
    with kernel_threads(config.runtime.num_threads), memory_advice(), contextlib.ExitStack() as stack:
        if placement.world_size > 1:
            stack.callback(stop_group)
            group = start_group(placement, device)
        else:
            group = Group(placement, choose_device(placement, device), None)
        group.broadcast_from_rank0(lambda: bool(stack.enter_context(run.evaluation.hold())))
        yield group
        group.barrier()  # rank 0 must not close the store while others need it


def probe_run(
    run_dir: Path,
    images_seen: int | None = None,
    sections: Sequence[ProbeSection] | None = None,
    *,
    group: Group = ALONE,
    report_progress: ProgressCallback = ignore_progress,
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Probe saved budgets; yields (images seen, entries) after each task and writes files and rows as it goes.

    Results in files of the same weights, settings, data and seed are not measured again. All ranks call this, and
    `report_progress`, together.

    Args:
        images_seen: one budget; None probes all that are saved.
        sections: tasks; None takes those of the run's configuration.

    Raises:
        RunDirError: no such budget is saved.
        ProbeError: a task that cannot be probed.
    """
    run = RunDir(run_dir)
    config = run.load_config()
    sections = wanted_tasks(config.evaluation.probes, None) if sections is None else sections
    budgets = group.broadcast_from_rank0(lambda: chosen_budgets(run, images_seen))
    numbers = itertools.count(1)
    for budget in budgets:
        backbone: AimBackbone | None = None
        for section in sections:
            number = next(numbers)
            report_progress()
            entries = group.broadcast_from_rank0(functools.partial(finished_entries, run, config, budget, section))
            if entries is None:
                # read only where there is something to do: a 7B budget is 26 GB
                backbone = backbone or backbone_of(run, config, budget, group)
                entries = probe_backbone(
                    backbone,
                    section,
                    config,
                    out=run.probes_dir(budget),
                    group=group,
                    report_progress=numbered_progress(report_progress, number, len(budgets) * len(sections)),
                )
            if group.is_first:
                update_row(run, config, budget)
            yield budget, entries


def backbone_of(run: RunDir, config: RunConfig, images_seen: int, group: Group) -> AimBackbone:
    """Load a budget's backbone."""
    load = functools.partial(load_budget, run, config, images_seen, group.device)
    return AimBackbone(load, weights_name(run, config, images_seen))


def probe_baseline(
    target: str,
    like: RunDir,
    sections: Sequence[ProbeSection],
    *,
    weights: str | None = None,
    group: Group = ALONE,
    report_progress: ProgressCallback = ignore_progress,
) -> Iterator[tuple[None, list[dict[str, Any]]]]:
    """Probe a baseline on tasks; yields entries after each task and writes files into `baselines/<target>` of the run.

    Args:
        target: `timm:NAME`, `random` or `raw-pixels`, see `harness.probe.features.backbones`.
        like: the run whose images and seed it gets.
        sections: tasks; raw pixels leave out the kinds that need tokens, all but AIM leave out LoRA.
        weights: weights of a timm model: a file, `hub` or `random`.
    """
    config = like.load_config()
    backbone, model_section = baseline(target, config, weights=weights, device=group.device)
    folder = target.replace(":", "-").replace("/", "-") + ("-random" if weights == "random" else "")
    for number, section in enumerate(sections, start=1):
        kinds = tuple(kind for kind in section.kinds if kind not in backbone.impossible)
        if not kinds:
            raise ProbeError(f"{target} has none of the probes {', '.join(section.kinds)} of task '{section.task}'")
        entries = probe_backbone(
            backbone,
            section.model_copy(update={"kinds": kinds}),
            config,
            out=like.path / "baselines" / folder,
            model_section=model_section,
            group=group,
            report_progress=numbered_progress(report_progress, number, len(sections)),
        )
        yield None, entries
