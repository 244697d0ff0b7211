"""Expected speed of training and loading on a device, from its data sheet and stated assumptions; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aimscale.aim.cost import executed_flops_per_image, mean_scored_tokens
from aimscale.harness.data.store.dataset_info import DatasetLookup
from aimscale.harness.device.execution import ExecutionPlan
from aimscale.harness.device.gpu_specs import DECODED_PER_S, Device
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.row import model_of

PHOTOGRAPH_BYTES, LEAST_SHARE = 51_000, 1 / 12
"""File size of the images whose decoding `DECODED_PER_S` counts, and the share of their time that the smallest image
takes. Assumption: in between, time is proportional to bytes."""


Limit = Literal["compute", "communication", "loader"]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Speed of all devices of a run together."""

    mfu: float
    """MFU that is assumed."""
    flops_per_image: float
    """FLOPs of training that are executed per image."""
    compute_per_s: float
    """Images trained on per second if a step had no overhead."""
    loaded_per_s: float
    """Images read per second."""
    compute_s: float
    """Time of a step for its images and the overhead of its passes, or the overhead set by the user."""
    exposed_communication_s: float
    """Time of a step for communication that no computation hides."""
    loading_s: float
    """Time to read a step's images."""
    is_ahead: bool
    """Whether images are loaded while others are trained on; else in turns."""

    @property
    def step_s(self) -> float:
        """Time of a step whose images are ready."""
        return self.compute_s + self.exposed_communication_s

    @property
    def limit(self) -> Limit:
        """Part that takes most of a step."""
        if self.loading_s > self.step_s:
            return "loader"
        return "communication" if self.exposed_communication_s > self.compute_s else "compute"


def expected_rates(
    config: RunConfig,
    num_devices: int,
    device: Device,
    plan: ExecutionPlan | None,
    *,
    mfu: float | None,
    lookup: DatasetLookup,
) -> Rates:
    """Estimate how fast a run trains on so many devices.

    Args:
        plan: plan of the run; None if it does not fit, and is priced as if it did.
        mfu: share of the peak at which passes are executed; None takes the plan's estimate.
        lookup: source of the sizes of image files.
    """
    training, workers, batch_size = config.training, config.runtime.num_workers, config.training.optimiser.batch_size
    model, pace = model_of(training), device.pace(config, ranks_per_node=num_devices)
    flops = executed_flops_per_image(model, mean_scored_tokens(model, training.objective.prefix)).train
    images_s = batch_size * flops / (num_devices * pace.flops_per_s * (mfu / device.mfu if mfu else 1))
    passes_s, exposed_s = 0.0, plan.step.exposed_communication_s if plan else 0.0
    if plan and mfu is None:
        images_s, passes_s = plan.step.images_s, plan.step.passes_s
    workers = min(workers, device.cores or workers)
    one = (device.decoded_per_s or DECODED_PER_S) / _loading_share(config, lookup)
    loaded_per_s = num_devices * one * (max(1, workers) if device.is_gpu else 1)
    return Rates(
        mfu=mfu or device.mfu,
        flops_per_image=flops,
        compute_per_s=batch_size / images_s,
        loaded_per_s=loaded_per_s,
        compute_s=images_s + passes_s,
        exposed_communication_s=exposed_s,
        loading_s=batch_size / loaded_per_s,
        is_ahead=device.is_gpu and workers > 0,  # on a CPU, workers share the cores with training
    )


def _loading_share(config: RunConfig, lookup: DatasetLookup) -> float:
    """Return the time of loading an image of this run over that of a photograph, by the bytes of the image files."""
    size = 0.0
    for source in config.training.data.sources:
        info = lookup(source.path)
        each = info.total_bytes / max(1, info.num_samples) if info else PHOTOGRAPH_BYTES
        size += source.probability * each
    return max(LEAST_SHARE, size / PHOTOGRAPH_BYTES)
