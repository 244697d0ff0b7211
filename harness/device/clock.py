"""Measured times of runs on this machine's cores, remembered in the user's cache; torch is not imported."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import TypeAdapter, ValidationError

from aimscale.aim.errors import UserError
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.files import cache_folder, read_object, write_json
from aimscale.harness.run.identity import config_digest
from aimscale.harness.run.provenance import cpu_name


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Times of one shape of run on a core, while all cores are busy, s."""

    start_s: float
    """From the start of the program to its first step."""
    step_s: float
    """A step of training, its images loaded and its share of a log line."""
    budget_s: float
    """Saving a budget, and the way back to the trunk."""
    evaluation_start_s: float
    """From the start of the program that evaluates to its first budget."""
    validation_s: float
    """Validation of an image with one prefix."""
    feature_s: float
    """A labelled image through the frozen backbone, decoded."""
    pair_s: float
    """Comparison of two images by k-NN."""
    is_measured: bool = True
    """Whether this shape was measured; else a smaller one was, and its times count in proportion to FLOPs."""


def remembered(config: RunConfig) -> Clock | None:
    """Return the times of a run's shape that were measured here last; None if none were."""
    with contextlib.suppress(UserError, OSError, ValidationError):
        if (value := read_object(cache_folder() / "clock" / f"{shape_digest(config)}.json")) is not None:
            return TypeAdapter(Clock).validate_python(value)
    return None


def remember(config: RunConfig, clock: Clock) -> None:
    """Keep the times of a run's shape; a cache that cannot be written keeps nothing."""
    with contextlib.suppress(OSError):
        write_json(cache_folder() / "clock" / f"{shape_digest(config)}.json", asdict(clock), durable=False)


def shape_digest(config: RunConfig) -> str:
    """Return what identifies the machine and everything of a run that its times depend on."""
    training, runtime = config.training, config.runtime
    shape = training.model_dump(mode="json", exclude={"seed": True, "schedule": True, "optimiser": {"lr_peak"}})
    evaluation = config.evaluation.model_dump(mode="json", exclude={"budgets"})
    how = runtime.model_dump(mode="json", include={"num_threads", "num_workers", "micro_batch", "log_every_steps"})
    return config_digest("clock", {"training": shape, "evaluation": evaluation, "runtime": how, "where": _where()})


@functools.cache
def _where() -> Mapping[str, Any]:
    machine: dict[str, Any] = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0))}
    for name in ("torch", "deepspeed", "aimscale"):
        with contextlib.suppress(PackageNotFoundError):
            machine[name] = version(name)
    return machine
