"""How fast a run is expected to train and load on a device, by its data sheet and stated assumptions; without torch."""

from __future__ import annotations

from dataclasses import dataclass

from aimscale.aim.cost import executed_flops_per_image, mean_scored_tokens
from aimscale.harness.data.store.card import Look
from aimscale.harness.device.memory import kept_bytes_per_image
from aimscale.harness.device.sheets import DECODED_PER_S, Device
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.row import model_of

GPU_MFU = 0.40
CORE_MFU, CORE_BYTES_PER_S, CORE_STEP_S = 0.35, 0.5e9, 0.002
"""Of one core: the share of its peak, the rate at which it moves what a forward pass keeps, and a step's time beside
both. Assumption: within 15 % (24 % once) of the fastest steps of seven models from w24-d1 to rung-128 on a core of a
busy AMD EPYC; the processor time of four of them was .5 to .9 of it."""
PHOTOGRAPH_BYTES, LEAST_SHARE = 51_000, 1 / 12
"""Of the images whose decoding `DECODED_PER_S` counts; and the part of their time that the smallest image takes.
Assumption: between, the time follows the bytes."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the devices of a run do in a second, all together."""

    mfu: float
    """Taken."""
    flops_per_image: float
    """Executed, of training."""
    compute_per_s: float
    """Images trained on."""
    loaded_per_s: float
    """Images read."""
    step_s: float
    """Of a step, beside what its images take."""
    is_ahead: bool
    """Images are loaded while others are trained on; else in turns."""


def expected_rates(
    config: RunConfig, num_devices: int, device: Device, *, mfu: float | None, step_ms: float | None, look: Look
) -> Rates:
    """How fast a run trains on so many devices.

    Args:
        mfu: share of the peak that is executed; None takes the assumption for the device.
        step_ms: time of a step beside that of its images; likewise.
        look: tells how large the image files are.
    """
    training, runtime = config.training, config.runtime
    model = model_of(training)
    precision = training.optimiser.precision
    flops = executed_flops_per_image(model, mean_scored_tokens(model, training.objective.prefix)).train
    guesses_core = not device.is_gpu and mfu is None
    mfu = mfu or (CORE_MFU if guesses_core else GPU_MFU)
    threads = 1 if device.is_gpu else runtime.num_threads
    image_s = flops / (num_devices * threads * device.flops_per_s(precision) * mfu)
    if guesses_core:
        image_s += kept_bytes_per_image(model, precision, False) / (num_devices * threads * CORE_BYTES_PER_S)
    step_s = step_ms / 1000 if step_ms is not None else CORE_STEP_S if guesses_core else 0.0
    one = (device.decoded_per_s or DECODED_PER_S) / _loading_share(config, look)
    workers = min(runtime.num_workers, device.cores or runtime.num_workers)
    return Rates(
        mfu=mfu,
        flops_per_image=flops,
        compute_per_s=1 / image_s,
        loaded_per_s=num_devices * one * (max(1, workers) if device.is_gpu else 1),
        step_s=step_s,
        is_ahead=device.is_gpu and workers > 0,  # the workers of a core take its time
    )


def _loading_share(config: RunConfig, look: Look) -> float:
    """Time of loading an image of this run over that of a photograph, by the bytes of the image files."""
    size = 0.0
    for source in config.training.data.sources:
        info = look(source.path)
        each = info.total_bytes / max(1, info.num_samples) if info else PHOTOGRAPH_BYTES
        size += source.probability * each
    return max(LEAST_SHARE, size / PHOTOGRAPH_BYTES)
