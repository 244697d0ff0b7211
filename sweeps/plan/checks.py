"""Checks of planned runs: errors that launch, training or evaluation would raise, found before any process starts.

The checks call the functions that raise these errors later, for every run, and report all of them at once. Nothing is
written. Torch is imported only if a data set has to be opened.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from aimscale.aim.errors import UserError
from aimscale.harness.data.store.dataset_info import read_info
from aimscale.harness.device.gpu_specs import Device
from aimscale.harness.log.loggers import refuse_missing
from aimscale.harness.run.config import (
    DataSection,
    ModelSection,
    ProbeSection,
    RunConfig,
    RuntimeConfig,
    ValidationSection,
)
from aimscale.harness.run.schedule import schedule_of
from aimscale.sweeps.plan.costs import Finding, grace_period_s, plan_execution
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.speed import planned_device
from aimscale.sweeps.plan.sweepfile import Sweep, SweepError

MAX_LOCAL_INDEX, MAX_REMOTE_INDEX = 50_000_000, 1_000_000
"""Largest data sets, in images, whose index is opened on disk and at a URL; larger ones are left to the trainers.
Opening takes 25 bytes per image."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Problem that makes some runs fail, or a caution about them."""

    key: str
    """Key of the sweep file to change."""
    why: str
    """Error message of the launch, the trainer or the evaluation."""
    run_ids: tuple[str, ...]


def check(sweep: Sweep, runs: Sequence[Run]) -> tuple[Problem, ...]:
    """Return the problems of these runs, equal ones once; data sets above `MAX_LOCAL_INDEX` are not opened."""
    device, data = planned_device(sweep, runs), _DataChecks()
    return group_findings((run.run_id, [*_check_config(sweep, run, device), *data.check(run.config)]) for run in runs)


def group_findings(found: Iterable[tuple[str, Iterable[Finding]]]) -> tuple[Problem, ...]:
    """Merge equal findings of several runs."""
    names: dict[Finding, dict[str, None]] = {}
    for run_id, things in found:
        for thing in things:
            names.setdefault(thing, {})[run_id] = None
    return tuple(Problem(key=key, why=why, run_ids=tuple(run_ids)) for (key, why), run_ids in names.items())


def describe_runs(run_ids: Sequence[str], num_runs: int) -> str:
    """Describe which of `num_runs` runs are meant: one id, `all 6 runs`, or `2 of 6 runs, such as ...`."""
    if len(run_ids) == 1:
        return run_ids[0]
    if len(run_ids) == num_runs:
        return f"all {num_runs} runs"
    return f"{len(run_ids)} of {num_runs} runs, such as {run_ids[0]}"


def raise_on_problems(sweep: Sweep, runs: Sequence[Run], problems: Sequence[Problem] | None = None) -> None:
    """Raise SweepError that lists every problem of these runs; return if there is none."""
    lines = []
    for problem in check(sweep, runs) if problems is None else problems:
        key = "" if problem.why.startswith(problem.key) else f"{problem.key}: "
        lines.append(f"{describe_runs(problem.run_ids, len(runs))}: {key}{problem.why}")
    if len(lines) == 1:
        raise SweepError(f"{sweep.source}: {lines[0]}")
    if lines:
        raise SweepError("\n".join([f"{sweep.source}: {len(lines)} things are in the way of its runs", *lines]))


def _check_call(key: str, function: Callable[..., Any], *arguments: Any) -> list[Finding]:
    """Call a function and return its UserError as a finding, or no finding."""
    try:
        function(*arguments)
    except UserError as error:
        return [(key, str(error))]
    return []


def _check_config(sweep: Sweep, run: Run, device: Device) -> Iterator[Finding]:
    """Check what follows from the configuration alone."""
    runtime = run.config.runtime
    yield from _check_call("schedule.warmup_images", schedule_of, run.config)
    yield from _check_call(
        "cost.memory_gb", plan_execution, run.config, run.devices, device.memory_bytes, device.is_gpu
    )
    slurm = sweep.file.slurm if sweep.is_for_slurm else None
    if slurm and (stop_s := grace_period_s(run)) >= (limit_s := 60 * slurm.time_limit_min):
        told = f"a job of {limit_s} s is told to save {stop_s} s before its end, which leaves no time to train"
        yield "slurm.time_limit_min", f"{told}; raise time_limit_min"
    if slurm is None or slurm.python is None:
        yield from _check_call("runtime.loggers", refuse_missing, run.config)
    if runtime.device == "cuda" and not device.is_gpu:
        where = "slurm.gpus asks for no GPU" if slurm else "this machine has no GPU"
        yield "runtime.device", f"cuda is asked for, and {where}; use cpu or auto"
    if runtime.compile is True and not device.is_gpu:
        yield "runtime.compile", "only a GPU compiles blocks, and these runs use the CPU; use auto"


class _DataChecks:
    """Checks of the data sets of several runs; each data set is opened, and each pair compared, once."""

    def __init__(self) -> None:
        self.opened = functools.cache(self._open)
        self.call = functools.cache(lambda function, *sections: function(*sections))

    def check(self, config: RunConfig) -> Iterator[Finding]:
        """Check the training, validation and probe data of a run."""
        training, evaluation = config.training, config.evaluation
        yield from self.call(self._stream, training.data, training.model.channels)
        yield from self.call(self._validation, training.data, evaluation.validation)
        for section in evaluation.probes:
            yield from self.call(self._probe, section, training.model, training.data.max_bad_fraction)

    def _open(self, path: str) -> tuple[Any, str | None]:
        """Open a data set: return (data set or None, error or None); both are None if it is too large to open here."""
        try:
            if read_info(path).num_samples > (MAX_REMOTE_INDEX if "://" in path else MAX_LOCAL_INDEX):
                return None, None
            from aimscale.harness.data.store.index import open_dataset

            return open_dataset(path), None
        except UserError as error:
            return None, str(error)

    def _stream(self, data: DataSection, channels: int) -> list[Finding]:
        """Check the training data as the training stream does."""
        if not data.is_unindexed:
            missing = [why for source in data.sources if (why := self.opened(source.path)[1])]
            if missing:
                return [("data.sources", why) for why in missing]
        from aimscale.harness.data.store.index import require_channels
        from aimscale.harness.data.stream.order import require_fingerprint, unique_per_source

        found = _check_call("model.channels", require_channels, channels)
        if data.is_unindexed:
            from aimscale.harness.data.stream.unindexed import shard_urls

            return found + _check_call("data.sources", shard_urls, data.sources[0].path)
        infos = [read_info(source.path) for source in data.sources]
        for source, info in zip(data.sources, infos, strict=True):
            found += _check_call("data.sources", require_fingerprint, source, info)
        return found + _check_call("data.unique_images", unique_per_source, data, infos)

    def _validation(self, data: DataSection, section: ValidationSection) -> list[Finding]:
        """Check the validation data as the trainer and the validation do, overlap with the training images included."""
        held_out, missing = self.opened(section.path)
        if missing:
            return [("validation.path", missing)]
        from aimscale.harness.data.store.overlap import refuse_overlap
        from aimscale.harness.data.stream.held_out import require_images

        info = read_info(section.path)
        asked = section.num_images, data.max_bad_fraction
        found = _check_call("validation.num_images", require_images, section.path, info, *asked)
        if held_out is None:
            return found
        paths = [source.path for source in data.sources if not data.is_unindexed]
        pools = [pool for path in paths if (pool := self.opened(path)[0]) is not None]
        return found + _check_call("validation.path", refuse_overlap, pools, held_out)

    def _probe(self, section: ProbeSection, model: ModelSection, max_bad_fraction: float) -> list[Finding]:
        """Check the data of a probe task as the probe does."""
        key = f"probes.{section.task}"
        sides = [self.opened(path) for path in dict.fromkeys((section.train, section.test))]
        if missing := [why for _, why in sides if why]:
            return [(key, why) for why in missing]
        if any(dataset is None for dataset, _ in sides):
            return []
        from aimscale.harness.probe.features.images import open_task

        return _check_call(key, open_task, section, model, RuntimeConfig(), max_bad_fraction)
