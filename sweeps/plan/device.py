"""The device that a sweep is priced on, and how fast its runs train and load; torch is imported to measure a core.

It is the one that `cost.device` names; else an H100, where a `slurm` section asks for GPUs; else this machine's GPU;
else this machine's processor.
"""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil

from aimscale.aim.cost import executed_flops_per_image, mean_scored_tokens
from aimscale.harness.data.store.card import DatasetInfo
from aimscale.harness.device.memory import kept_bytes_per_image
from aimscale.harness.device.sheets import DECODED_PER_S, nominal_flops_per_s, remember, remembered
from aimscale.harness.run.config import RunConfig
from aimscale.harness.run.provenance import cpu_name
from aimscale.harness.run.row import model_of
from aimscale.sweeps.plan.planner import Run
from aimscale.sweeps.plan.sweepfile import Sweep, SweepError

GPU_MFU = 0.40
CORE_MFU, CORE_BYTES_PER_S, CORE_STEP_S = 0.35, 0.5e9, 0.002
"""Of one core: the share of its peak, the rate at which it moves what a forward pass keeps, and a step's time beside
both. Assumption: they met eight models of 20k to 2M parameters within 15 % (24 % once) on a core of an AMD EPYC."""
PHOTOGRAPH_BYTES, CROP_PIXELS = 51_000, 224**2
"""Of the images whose decoding `DECODED_PER_S` counts."""
DECODING, RESIZING = 2 / 3, 1 / 4
"""Shares of loading such an image (docs/benchmarks.md); the first follows its bytes, the second the crop's pixels."""
MAX_DECODERS = 8
"""Threads that decode for an evaluation (`probe.features.images`)."""
ASSUMED = "H100"
LIST_TIMEOUT_S = 30

Look = Callable[[str], DatasetInfo | None]
"""Path of a data set -> what it says of itself, where it is here."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device of a run, and what loads for it."""

    name: str
    is_gpu: bool
    why: str
    """Why this one, for the reader."""
    memory_bytes: int = 80 * 10**9
    peak_tflops: float | None = None
    """As given, for every precision; null: the data sheet's, or of a processor what is measured."""
    cores: int | None = None
    """That load for it; null where nothing says how many."""
    decoded_per_s: float | None = None
    """Photographs that a loader process decodes and crops a second, where that was measured here (`aimscale bench
    data`); null: `DECODED_PER_S`, an assumption."""

    def flops_per_s(self, precision: str) -> float:
        """Dense peak at a precision; float32 products on a GPU are TF32, as the trainer sets it."""
        if self.peak_tflops is not None:
            return self.peak_tflops * 1e12
        return nominal_flops_per_s(self.name, precision) or _measured_flops_per_s(precision)


def planned_device(sweep: Sweep, wants_cpu: bool = False) -> Device:
    """The device of a sweep.

    Args:
        wants_cpu: all its runs ask for the processor.

    Raises:
        SweepError: `cost.device` is no known GPU, and its peak is not given.
    """
    cost, slurm = sweep.file.cost, sweep.file.slurm
    on_slurm = "slurm" in sweep.file.model_fields_set
    cores = slurm.cpus_per_task if on_slurm else None
    if cost.device is not None:
        if cost.peak_tflops is None and nominal_flops_per_s(cost.device, "bf16") is None:
            raise SweepError(f"{sweep.source}: no data sheet of cost.device '{cost.device}'; give cost.peak_tflops")
        found = Device(name=cost.device, is_gpu="cpu" not in cost.device.lower(), why="cost.device", cores=cores)
    elif on_slurm and slurm.gpus and not wants_cpu:
        found = Device(name=ASSUMED, is_gpu=True, why="assumed, since there is a slurm section", cores=cores)
    else:
        is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
        gpus = [] if on_slurm or wants_cpu or is_hidden else gpus_here()
        name, num_bytes = gpus[0] if gpus else (cpu_name(), psutil.virtual_memory().total)
        found = Device(
            name=name,
            is_gpu=bool(gpus),
            why="of this machine" if gpus else "one core of this machine, with no GPU here or asked for",
            memory_bytes=num_bytes,
            cores=max(1, len(os.sched_getaffinity(0)) // max(1, len(gpus))),
            decoded_per_s=remembered("decoded_per_s"),
        )
    memory_bytes = found.memory_bytes if cost.memory_gb is None else round(cost.memory_gb * 1e9)
    return replace(found, peak_tflops=cost.peak_tflops, memory_bytes=memory_bytes)


def gpus_here() -> list[tuple[str, int]]:
    """Name and bytes of the NVIDIA GPUs that the driver lists, whatever torch sees."""
    words = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=LIST_TIMEOUT_S, check=True
        )
        pairs = [line.rsplit(",", 1) for line in listed.stdout.splitlines() if line.strip()]
        return [(name.strip(), int(mebibytes) * 2**20) for name, mebibytes in pairs]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


@functools.cache
def _measured_flops_per_s(precision: str) -> float:
    """Of one core: as remembered, else measured in about a second; other processes make it only too small."""
    if known := remembered(f"{precision}_flops_per_s"):
        return known
    import torch

    from aimscale.harness.device.peak import measure_peak

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = measure_peak(torch.device("cpu"), precision).flops_per_s
    finally:
        torch.set_num_threads(before)
    remember(f"{precision}_flops_per_s", found)
    return found


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the devices of a run do in a second, all together."""

    mfu: float
    """Taken."""
    flops_per_s: float
    """At that MFU."""
    flops_per_image: float
    """Executed, of training."""
    compute_per_s: float
    """Images trained on."""
    loaded_per_s: float
    """Images read for training."""
    decoded_per_s: float
    """Images read for evaluation, by threads."""
    step_s: float
    """Of a step, beside what its images take."""
    is_ahead: bool
    """Images are loaded while others are trained on; else in turns."""

    def seconds(self, num_images: int, num_steps: int) -> tuple[float, float]:
        """Time of computing and of loading so many images."""
        return num_images / self.compute_per_s + num_steps * self.step_s, num_images / self.loaded_per_s


def rates_of(sweep: Sweep, run: Run, device: Device, look: Look) -> Rates:
    """How fast a run trains on devices of this kind; `look` tells how large the image files are."""
    cost, training, runtime = sweep.file.cost, run.config.training, run.config.runtime
    model = model_of(training)
    precision = training.optimiser.precision
    flops = executed_flops_per_image(model, mean_scored_tokens(model.num_tokens, training.objective.prefix)).train
    guesses_core = not device.is_gpu and cost.mfu is None
    mfu = cost.mfu or (CORE_MFU if guesses_core else GPU_MFU)
    threads = 1 if device.is_gpu else runtime.num_threads
    flops_per_s = run.devices * threads * device.flops_per_s(precision) * mfu
    image_s = flops / flops_per_s
    if guesses_core:
        image_s += kept_bytes_per_image(model, precision, False) / (run.devices * threads * CORE_BYTES_PER_S)
    step_s = cost.step_ms / 1000 if cost.step_ms is not None else CORE_STEP_S if guesses_core else 0.0
    one = (device.decoded_per_s or DECODED_PER_S) / _loading_share(run.config, look)
    cores = device.cores or MAX_DECODERS
    workers = min(runtime.num_workers, device.cores or runtime.num_workers)
    return Rates(
        mfu=mfu,
        flops_per_s=flops_per_s,
        flops_per_image=flops,
        compute_per_s=1 / image_s,
        loaded_per_s=run.devices * one * (max(1, workers) if device.is_gpu else 1),
        decoded_per_s=run.devices * one * min(MAX_DECODERS, cores),
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
    crop = config.training.model.image_size**2 / CROP_PIXELS
    return 1 - DECODING - RESIZING + DECODING * size / PHOTOGRAPH_BYTES + RESIZING * crop
