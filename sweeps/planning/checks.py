"""Checks of planned runs: errors that launch, training or evaluation would raise, found before any process starts.

The checks call the functions that raise these errors later, for every run, and report all of them at once. Nothing is
written, and torch is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import Any

from aimscale.aim.errors import UserError
from aimscale.harness.data.store.dataset_info import read_info, require_images
from aimscale.harness.run.config import (
    DataSection,
    ProbeSection,
    RunConfig,
    RuntimeConfig,
    ValidationSection,
    check_loggers,
)
from aimscale.harness.run.schedule import schedule_of
from aimscale.sweeps.planning.costs import plan_execution
from aimscale.sweeps.planning.run import Notice, Once, PlanContext, Run, describe_runs, group_notices, problem
from aimscale.sweeps.planning.speed import plan_context
from aimscale.sweeps.planning.sweepfile import Sweep, SweepError

CONTAINER_PROGRAMS = ("apptainer", "singularity", "podman", "docker", "enroot", "shifter", "sarus", "ch-run", "srun")
"""Programs that enter an image (srun by pyxis), in which a worker seldom has Slurm's commands."""
MAX_LOCAL_INDEX, MAX_REMOTE_INDEX = 50_000_000, 1_000_000
"""Largest data sets, in images, whose index is opened on disk and at a URL; larger ones are left to the trainers.
Opening takes 25 bytes per image."""


def check(sweep: Sweep, runs: Sequence[Run]) -> tuple[Notice, ...]:
    """Return the problems of these runs, equal ones once; data sets above `MAX_LOCAL_INDEX` are not opened."""
    context = plan_context(sweep, runs)
    return group_notices(each.of(run.run_id) for run in runs for each in run.check(context))


def raise_on_problems(sweep: Sweep, runs: Sequence[Run], problems: Sequence[Notice] | None = None) -> None:
    """Raise SweepError that lists every problem of these runs; return if there is none."""
    lines = []
    for notice in check(sweep, runs) if problems is None else problems:
        key = "" if notice.text.startswith(notice.key) else f"{notice.key}: "
        lines.append(f"{describe_runs(notice.run_ids, len(runs))}: {key}{notice.text}")
    if len(lines) == 1:
        raise SweepError(f"{sweep.source}: {lines[0]}")
    if lines:
        raise SweepError("\n".join([f"{sweep.source}: {len(lines)} things are in the way of its runs", *lines]))


def _check_call(key: str, function: Callable[..., Any], *arguments: Any) -> list[Notice]:
    """Call a function and return its UserError as a problem, or none."""
    try:
        function(*arguments)
    except UserError as error:
        return [problem(key, str(error))]
    return []


def check_config(run: Run, config: RunConfig, context: PlanContext) -> Iterator[Notice]:
    """Yield what follows from the configuration of a run alone."""
    device, slurm = context.device, context.sweep.file.slurm if context.sweep.is_for_slurm else None
    yield from _check_call("schedule.warmup_images", schedule_of, config)
    yield from _check_call("cost.memory_gb", plan_execution, config, run.devices, device.memory_bytes, device.is_gpu)
    yield from check_time_limit(run, context)
    if slurm is None or slurm.python is None:
        yield from _check_call("runtime.loggers", check_loggers, config)
    elif run.devices > slurm.devices_per_node and PurePath(slurm.python.split()[0]).name in CONTAINER_PROGRAMS:
        told = "enters an image, from which no worker starts the ranks of a run on several nodes"
        yield problem("slurm.python", f"{told}; leave it out, and give the container's arguments to slurm.srun")
    if config.runtime.device == "cuda" and not device.is_gpu:
        where = "slurm.gpus asks for no GPU" if slurm else "this machine has no GPU"
        yield problem("runtime.device", f"cuda is asked for, and {where}; use cpu or auto")
    if config.runtime.compile is True and not device.is_gpu:
        yield problem("runtime.compile", "only a GPU compiles blocks, and these runs use the CPU; use auto")


def check_time_limit(run: Run, context: PlanContext) -> Iterator[Notice]:
    """Yield whether Slurm's time limit leaves a run no time to train."""
    limit_s = 60 * context.sweep.file.slurm.time_limit_min
    if context.sweep.is_for_slurm and run.grace_s >= limit_s:
        told = f"a job of {limit_s} s is told to save {run.grace_s} s before its end, which leaves no time to train"
        yield problem("slurm.time_limit_min", f"{told}; raise time_limit_min")


def check_data(config: RunConfig, context: PlanContext) -> Iterator[Notice]:
    """Yield problems of the training, validation and probe data of a run; each data set is opened, and each pair
    compared, once."""
    training, evaluation, once = config.training, config.evaluation, context.once
    yield from once(_check_stream, once, training.data, training.model.channels)
    yield from once(_check_validation, once, training.data, evaluation.validation)
    for section in evaluation.probes:
        yield from once(_check_probe, once, section, training.data.max_bad_fraction)


def _open(path: str) -> tuple[Any, str | None]:
    """Open a data set: return (data set or None, error or None); both are None if it is too large to open here."""
    try:
        if read_info(path).num_samples > (MAX_REMOTE_INDEX if "://" in path else MAX_LOCAL_INDEX):
            return None, None
        from aimscale.harness.data.store.index import open_dataset

        return open_dataset(path), None
    except UserError as error:
        return None, str(error)


def _check_stream(once: Once, data: DataSection, channels: int) -> list[Notice]:
    """Check the training data as the training stream does."""
    if not data.is_unindexed:
        missing = [reason for source in data.sources if (reason := once(_open, source.path)[1])]
        if missing:
            return [problem("data.sources", reason) for reason in missing]
    from aimscale.harness.data.store.index import require_channels
    from aimscale.harness.data.stream.order import require_fingerprint, unique_per_source

    notices = _check_call("model.channels", require_channels, channels)
    if data.is_unindexed:
        from aimscale.harness.data.store.tars import shard_urls

        return notices + _check_call("data.sources", shard_urls, data.sources[0].path)
    infos = [read_info(source.path) for source in data.sources]
    for source, info in zip(data.sources, infos, strict=True):
        notices += _check_call("data.sources", require_fingerprint, source, info)
    return notices + _check_call("data.unique_images", unique_per_source, data, infos)


def _check_validation(once: Once, data: DataSection, section: ValidationSection) -> list[Notice]:
    """Check the validation data as the trainer and the validation do, overlap with the training images included."""
    held_out, missing = once(_open, section.path)
    if missing:
        return [problem("validation.path", missing)]
    from aimscale.harness.data.stream.order import refuse_overlap

    info = read_info(section.path)
    asked = section.num_images, data.max_bad_fraction
    notices = _check_call("validation.num_images", require_images, section.path, info, *asked)
    if held_out is None:
        return notices
    paths = [source.path for source in data.sources if not data.is_unindexed]
    pools = [pool for path in paths if (pool := once(_open, path)[0]) is not None]
    return notices + _check_call("validation.path", refuse_overlap, pools, held_out)


def _check_probe(once: Once, section: ProbeSection, max_bad_fraction: float) -> list[Notice]:
    """Check the data of a probe task as the probe does."""
    key = f"probes.{section.task}"
    sides = [once(_open, path) for path in dict.fromkeys((section.train, section.test))]
    if missing := [reason for _, reason in sides if reason]:
        return [problem(key, reason) for reason in missing]
    if any(dataset is None for dataset, _ in sides):
        return []
    from aimscale.harness.probe.features.tasks import open_splits

    return _check_call(key, open_splits, section, RuntimeConfig(), max_bad_fraction)
