"""Sections of a sweep file: overrides, compute budgets, tuning, assumptions about devices, and Slurm's resources."""

from __future__ import annotations

import math
import re
import shlex
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from aimscale.harness.run.section import Count, Section


class OverrideSection(Section):
    """Fields changed for the cells that match."""

    when: dict[str, Any]
    """Axis -> value or list of values; a cell matches when every named axis does."""
    set: dict[str, Any]
    """Fields (dotted or nested) of training, evaluation and `runtime`, or others that `base` may hold; they replace
    those of recipe, base, axes and variants."""


class IsoflopSection(Section):
    """Budgets of training compute; the planner picks sizes and data around the expected optimum of each."""

    flops: Annotated[tuple[Annotated[float, Field(ge=1, le=1e40)], ...], Field(min_length=1)]
    """C: training FLOPs of one (size, images) pair."""
    sizes_per_budget: int = Field(5, ge=3)
    """Sizes around the expected optimum of each budget, from `sizes`."""
    images_per_param: float = Field(ge=1e-9, le=1e9)
    """D / N at the expected optimum (N with the head): an assumption that the sweep itself then tests."""
    min_images: Count = 1
    """Smallest number of images; pairs with fewer are left out."""


class TuneSection(Section):
    """Small runs at other learning rates, from which `aimscale rates` finds the law of the best rate: three to five
    rates on three sizes and two budgets are a beginning."""

    lr_multiplier: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
    """Factors of the sweep's own learning rate."""
    batch_size: tuple[Annotated[int, Field(gt=0)], ...] = ()
    """Batches, each at every rate."""
    at: dict[str, Any]
    """Axis -> value or list of values: the cells to tune. Of `size` and `budget` all are taken unless they are named,
    of other axes the first value."""

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """Fields that are tuned, with their values."""
        batch_sizes = {"optimiser.batch_size": self.batch_size} if self.batch_size else {}
        return {"lr_multiplier": self.lr_multiplier, **batch_sizes}


def _check_price(text: Any) -> str:
    if not isinstance(text, str) or not re.fullmatch(r"\d+(\.\d+)? [^\W\d]{1,8}", text):
        raise ValueError("must be an amount and a currency, such as 2.10 USD")
    return text


class CostSection(Section):
    """Assumptions of a plan about a device; they are printed beside the numbers."""

    device: str | None = None
    """Name of the device, such as A100 or A100 80GB. Null: on Slurm what `slurm.gpus` names, or an H100; else this
    machine's GPU, or one core of this machine."""
    peak_tflops: float | None = Field(None, ge=1e-6, le=1e12)
    """Dense peak of one device, TFLOP/s; null: the data sheet's at the run's precision (TF32 for fp32), or 0.1 for a
    core."""
    mfu: float | None = Field(None, ge=1e-6, le=1)
    """Share of that peak at which training executes FLOPs (`aimscale bench train` measures it); null: a roofline on a
    GPU, a measurement on cores of this machine, else 0.40."""
    memory_gb: float | None = Field(None, ge=1e-3, le=1e6)
    """Memory of one device, GB; null: the data sheet's, or this machine's."""
    pool_images: Count | None = None
    """Size of the image pool, needed if the data sets are not available to be counted."""
    price_per_device_hour: Annotated[str, BeforeValidator(_check_price)] | None = None
    """Price of a device for an hour with its currency, such as 2.10 USD; null: no money is counted."""

    def price(self, device_hours: float) -> tuple[float, str] | None:
        """Return the amount and the currency of so many device-hours, or None without a price."""
        if self.price_per_device_hour is None:
            return None
        amount, currency = self.price_per_device_hour.split()
        return float(amount) * device_hours, currency


def _check_one_line(text: str) -> str:
    if not text.isprintable() or not text.strip():
        raise ValueError("must be one line of printable text: it becomes a line of the sbatch script")
    return text


RESERVED_SBATCH_OPTIONS = {
    **dict.fromkeys(("array", "error", "open-mode", "output", "signal", "requeue", "no-requeue"), "jobs need it"),
    **dict.fromkeys(("gres", "gpus"), "ask for GPUs and their type by slurm.gpus"),
    **dict.fromkeys(("nodes", "ntasks", "ntasks-per-node"), "say slurm.devices_per_node, and devices in `base`"),
    "cpus-per-task": "say slurm.cpus_per_task",
    "partition": "say slurm.partition",
    "time": "say slurm.time_limit_min",
}
"""Options of sbatch that aimscale sets itself, or that would contradict what it sets, and what to say instead."""


def _check_sbatch_options(options: dict[str, Any]) -> dict[str, Any]:
    for name, value in options.items():
        plain = "gpus" if name.startswith("gpus") else name.replace("_", "-")
        if plain in RESERVED_SBATCH_OPTIONS:
            raise ValueError(f"aimscale sets {name}; {RESERVED_SBATCH_OPTIONS[plain]}")
        is_value = isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", name) or not is_value:
            raise ValueError(f"{name}: {value!r} needs the long name of an sbatch option, and text, a number or true")
        _check_one_line(str(value))
    return options


OneLine = Annotated[str, AfterValidator(_check_one_line)]
"""One line of printable text."""
Command = Annotated[OneLine, AfterValidator(lambda text: shlex.join(shlex.split(text)))]
"""Program with its arguments, each quoted, so that no shell executes any part of it."""


class SlurmSection(Section):
    """Resources that Slurm jobs request."""

    partition: OneLine | None = None
    """Partition."""
    time_limit_min: int = Field(1440, gt=0, le=10**6)
    """Longest time limit of one job, minutes. A job requests twice what its runs take by the plan, if that is shorter;
    a run that needs longer saves, is requeued and goes on."""
    devices_per_node: int = Field(8, gt=0)
    """Tasks (and GPUs) of one node."""
    gpus: bool | OneLine = True
    """Request for a GPU per device: true, or their type, e.g. a100; false for CPU nodes."""
    cpus_per_task: int = Field(8, gt=0)
    """Cores per task."""
    max_jobs: int = Field(256, gt=0)
    """Maximum number of the sweep's jobs at the same time, in all arrays together."""
    probe_on_one_node_above: Count = 10**9
    """Without effect, as every run is evaluated on one node at most; kept for files of earlier releases."""
    srun: tuple[OneLine, ...] = ()
    """Further arguments of the srun that starts a run on several nodes, e.g. [--container-image=/images/a.sqsh]."""
    extra: Annotated[dict[str, Any], AfterValidator(_check_sbatch_options)] = Field(default_factory=dict)
    """Further sbatch options by long name, e.g. {account: vision, mem: 200G, qos: high, constraint: h100}; `exclude`
    adds to the nodes that aimscale excludes."""
    setup: tuple[str, ...] = ()
    """Shell lines run before the workers, e.g. module loads; one that fails ends the job, unless it ends in || true."""
    python: Command | None = None
    """Interpreter of the workers (a venv's, or, for runs on one node, a command that enters a container with Slurm's
    commands); null takes the launcher's own."""

    @model_validator(mode="before")
    @classmethod
    def _check_extra(cls, values: Any) -> Any:
        """Say where options of sbatch go that are no field."""
        unknown = [key for key in values if key not in cls.model_fields] if isinstance(values, dict) else []
        for key in unknown:
            if not get_close_matches(str(key), cls.model_fields, cutoff=0.8):
                raise ValueError(f"unknown key '{key}'; an option of sbatch goes into extra: {{{key}: {values[key]}}}")
        return values

    def gpu_request(self, devices: int) -> int | str | None:
        """Return the value of `--gpus-per-node` for so many devices, or None on CPU nodes."""
        if self.gpus is False:
            return None
        return devices if self.gpus is True else f"{self.gpus}:{devices}"
