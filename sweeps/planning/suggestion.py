"""Suggested sweeps: the largest grid of sizes and budgets within some hours that identifies a law of both."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from aimscale.aim.config import model_config
from aimscale.analysis.laws import PLATEAU_STEPS
from aimscale.harness.data.store.dataset_info import read_info
from aimscale.harness.run.section import Fields, parse
from aimscale.sweeps.planning.costs import cost_cards, model_counts
from aimscale.sweeps.planning.planner import plan
from aimscale.sweeps.planning.run import CostCard
from aimscale.sweeps.planning.sweepfile import Sweep, SweepError, SweepFile

NUM_SIZES, NUM_BUDGETS, BUDGET_RANGE = 9, 6, 8
"""Parameters over a factor of 20 or more by budgets over 8. Where sizes lie .5 % off their law, nine identify both
exponents in all of ten simulated tables, seven in seven, and at .3 % both do; six budgets do better than four. Seven
real sizes by four budgets on crops of CIFAR-10 identify both, and predict the largest size to .28 %, a straight line to
1.0 %; without the largest size or budget they do not identify alpha."""
WIDTH_STEP = 2 ** (5 / 16)
"""Factor between the widths of one size and the next."""
TOLD = 0.5
"""Per cent that sizes may lie off a law, each of whose terms is a tenth of its floor, for the grid to tell it."""
TOKENS_PER_PARAM = 20
"""Tokens per parameter in the middle of the grid (Hoffmann et al. 2022)."""
SMALL_BATCH, SMALL_RATE, MAX_SMALL_BUDGET = 32, 0.71, 64_000
"""Batch for smallest budgets up to the last, half the recipe's: they reach more steps; and `lr_multiplier`, since the
rate falls with the root of the batch."""
PLATEAU_MARGIN = 1.5
"""Smallest budget, in multiples of the first plateau."""
MAX_PASSES = 16
"""Passes over the training images beyond which images seen again are worth little (Muennighoff et
al. 2023), unless the smallest grid takes more."""
MIDDLE_WIDTHS = tuple(round(36 * 2 ** (step / 4)) for step in range(24))
"""Widths of the middle size."""
SHAPES = ((224, 14), (96, 8), (64, 8), (32, 8))
"""Sizes of images and patches, pixels: the first that the images reach and for which a middle width of
`MIN_MIDDLE_WIDTH` fits into the hours, or the last."""
MIN_MIDDLE_WIDTH = 96
PROBE_KINDS: tuple[list[str], ...] = (["linear", "knn"], ["knn"], [])
"""Kinds of probes: the first that leave `MIN_TRAINING` of the time to training. On cores linear ones take longer than
the training of such models, and tell the same."""
MIN_TRAINING = 0.6
CPU_FACTOR = 2.0
"""Time of runs this small on a CPU, over that of their FLOPs at the assumed speed, until it is measured."""
NUM_MEASURED, FITS = 3, 1.05
"""Number of grids that are measured, and the time of one, over the hours, up to which it fits."""
MAX_VALIDATION_IMAGES = 5000


@dataclass(frozen=True, kw_only=True)
class Request:
    """Data and machine of a suggested sweep."""

    path: Path
    """Sweep file, to which its paths are relative."""
    data: Path
    """Folder with the parts that `data pack --split` writes."""
    hours: float
    """Hours until all runs have ended."""
    devices: int
    """Devices that train at the same time."""
    gpu: str | None
    """Type of these devices; None for this machine's."""
    is_gpu: bool


def suggest(request: Request, measure: Callable[[Sweep], bool] = lambda _: False) -> str:
    """Return the text of a sweep file.

    Args:
        measure: measures the runs of a sweep on this machine, and says whether it did.

    Raises:
        SweepError: the folder lacks a part, or the smallest grid takes longer.
    """
    data = request.data
    if missing := [name for name in ("train", "validation") if not (data / name).is_dir()]:
        words = " and no ".join(missing)
        raise SweepError(f"{data} has no {words}; `aimscale data pack IMAGES {data} --split 80/10/10` writes them")
    factor = 1.0 if request.is_gpu else CPU_FACTOR
    fitting: dict[float, Sweep] = {}
    for _ in range(NUM_MEASURED):
        sweep, planned = _largest_grid(request, factor)
        if not measure(sweep):
            return sweep.text
        hours = _hours(request, cost_cards(sweep, plan(sweep)))
        if hours <= FITS * request.hours:
            fitting[hours] = sweep
        if abs(factor * planned / hours - 1) < FITS - 1 or (hours in fitting and hours > 0.8 * request.hours):
            break
        factor = hours / planned
    return fitting[max(fitting)].text if fitting else _largest_grid(request, factor)[0].text


def _largest_grid(request: Request, factor: float) -> tuple[Sweep, float]:
    """Return the largest grid whose time by the assumed speed, times a factor, fits the hours; and that time, h.

    Raises:
        SweepError: the smallest grid takes longer.
    """
    from aimscale.harness.data.store.index import open_dataset

    dataset = open_dataset(str(request.data / "train"))
    side = float(np.median(np.minimum(*dataset.sides(dataset.usable()))))
    shapes = [shape for shape in SHAPES if shape[0] <= side] or [SHAPES[-1]]
    smallest, most_images = math.inf, MAX_PASSES * dataset.info.num_usable
    for shape in shapes:
        largest: tuple[int, Sweep, float] | None = None
        for middle in MIDDLE_WIDTHS:
            sweep, hours = _cheapest_probes(request, _grid(request, middle, shape))
            smallest = min(smallest, factor * hours)
            if factor * hours > request.hours or (largest and sweep.file.budgets[-1] > most_images):
                break
            largest = middle, sweep, hours
        if largest and (largest[0] >= MIN_MIDDLE_WIDTH or shape == shapes[-1]):
            return largest[1:]
    raise SweepError(
        f"{request.hours:g} hours are too few for a grid that identifies a law; the smallest takes {smallest:.2g} on "
        f"{request.devices} {request.gpu or 'devices here'}"
    )


def _grid(request: Request, middle: int, shape: tuple[int, int]) -> Fields:
    """Return the fields of a sweep around a size of this width, without probes."""
    image_size, patch_size = shape
    depth = max(1, round(middle / 64))  # as wide for its depth as aim-600M
    heads = max(4, depth)  # the same in every size, since their number moves a size off the law
    multiple = math.lcm(4, heads)
    steps = range(-(NUM_SIZES // 2), NUM_SIZES // 2 + 1)
    widths = [multiple * round(middle * WIDTH_STEP**step / multiple) for step in steps]
    sizes = [f"w{width}-d{depth}-h{heads}" for width in dict.fromkeys(widths)]
    model = model_config(sizes[len(sizes) // 2], image_size=image_size, patch_size=patch_size)
    middle_budget = TOKENS_PER_PARAM * model_counts(model)[0].total / model.num_tokens
    first = max(PLATEAU_MARGIN * PLATEAU_STEPS * SMALL_BATCH, middle_budget / math.sqrt(BUDGET_RANGE))
    first = round(float(f"{first:.1e}"))
    budgets = [first * BUDGET_RANGE ** (step / (NUM_BUDGETS - 1)) for step in range(NUM_BUDGETS)]
    small: Fields = {}
    if first <= MAX_SMALL_BUDGET:
        small = {"lr_multiplier": SMALL_RATE, "optimiser": {"batch_size": SMALL_BATCH}}
    folder = os.path.relpath(request.data, request.path.parent)
    held_out = read_info(str(request.data / "validation")).num_usable
    validation: Fields = {"path": f"{folder}/validation", "num_prefixes": 2, "centre_crop": 1.0}
    if held_out > MAX_VALIDATION_IMAGES:
        validation["num_images"] = MAX_VALIDATION_IMAGES
    if request.is_gpu:
        small["optimiser"] = small.get("optimiser", {}) | {"precision": "bf16"}
    return {
        "name": request.path.stem,
        "recipe": "small",
        "sizes": sizes,
        "budgets": [round(float(f"{budget:.2e}")) for budget in budgets],
        "base": {
            "model": {"image_size": image_size, "patch_size": patch_size},
            **small,
            "data": {"sources": [{"path": f"{folder}/train"}]},
            "validation": validation,
        },
        **({"cost": {"device": request.gpu}} if request.gpu else {}),
    }


def _cheapest_probes(request: Request, values: Fields) -> tuple[Sweep, float]:
    """Return a sweep of these fields with the probes that it can afford, and the hours that it takes."""
    folder = os.path.relpath(request.data, request.path.parent)
    test = request.data / "test"
    is_labelled = test.is_dir() and read_info(str(request.data / "train")).classes is not None
    possible = PROBE_KINDS if request.is_gpu else PROBE_KINDS[1:]
    for kinds in possible if is_labelled else possible[-1:]:
        task: Fields = {"task": f"{request.path.stem}-classes", "train": f"{folder}/train", "test": f"{folder}/test"}
        task |= {"kinds": kinds, "centre_crop": 1.0}
        if not request.is_gpu:
            task["precision"] = "fp32"
        probed = {**values, "base": {**values["base"], **({"probes": [task]} if kinds else {})}}
        sweep = _sweep(request, probed)
        cards = cost_cards(sweep, plan(sweep), takes_measured=False)
        if not kinds or sum(card.training_s for card in cards) >= MIN_TRAINING * sum(card.wall_s for card in cards):
            break
    return sweep, _hours(request, cards)


def _hours(request: Request, cards: list[CostCard]) -> float:
    """Return the hours until all runs have ended."""
    return max(sum(card.device_hours for card in cards) / request.devices, max(card.wall_s for card in cards) / 3600)


def _sweep(request: Request, values: Fields) -> Sweep:
    path = request.path.absolute()
    head = (
        f"# {NUM_SIZES} sizes by {NUM_BUDGETS} budgets past the first plateau, for {request.hours:g} h on "
        f"{request.devices} {request.gpu or 'devices'}. It tells alpha and\n# beta if sizes lie within {TOLD:g} % of a "
        "law whose terms of N and D are a tenth of the loss in the middle; if not, beta.\n"
    )
    text = head + yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=math.inf)
    file = parse(SweepFile, values, str(path))
    return Sweep(file=file, text=text, source=path, base_dir=path.parent, root=path.parent)
