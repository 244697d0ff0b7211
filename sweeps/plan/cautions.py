"""What of a planned run should be looked at before launching: what was found, and the limit that it passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from aimscale.aim.config import ModelConfig
from aimscale.harness.run.schedule import unchecked_schedule
from aimscale.sweeps.plan.device_fit import DeviceFit
from aimscale.sweeps.plan.evaluation_cost import ProbeCost
from aimscale.sweeps.plan.planner import Run

MAX_EPOCHS = 4
MAX_BATCH_DEVIATION = 0.10

CautionKind = Literal["memory", "batch", "epochs", "pool", "warm-up", "stream", "small batch", "rounds", "heads"]


@dataclass(frozen=True, kw_only=True)
class Caution:
    """One thing to look at."""

    kind: CautionKind
    subject: str
    """A size, a task or a field: what it is about."""
    found: float = 0.0
    limit: float = 0.0
    """What `found` is held against."""


def cautions(run: Run, pool: int | None, fit: DeviceFit, memory_gb: float) -> Iterator[Caution]:
    """What one run's size, data, schedule and devices give.

    Args:
        pool: images of the pool; None where it is unknown.
        memory_gb: of a device.
    """
    training, budgets, size = run.config.training, run.config.evaluation.budgets, run.config.training.model.size
    if fit.chosen is None:
        yield Caution(kind="memory", subject=size, found=min(fit.by_stage.values()) / 1e9, limit=memory_gb)
    batch, target = training.optimiser.batch_size, run.batch_target
    if abs(batch / target - 1) > MAX_BATCH_DEVIATION:
        yield Caution(kind="batch", subject="optimiser.batch_size", found=batch, limit=target)
    unique = training.data.unique_images or pool
    if unique and budgets[-1] / unique > MAX_EPOCHS:
        yield Caution(kind="epochs", subject=str(unique), found=budgets[-1] / unique, limit=MAX_EPOCHS)
    if training.data.unique_images and pool and training.data.unique_images > pool:
        yield Caution(kind="pool", subject="unique_images", found=training.data.unique_images, limit=pool)
    is_cosine, warmup = training.schedule.kind == "cosine", training.schedule.warmup_images
    limit = budgets[0] - 1 if is_cosine else unchecked_schedule(run.config).branch_point(budgets[0])
    if warmup > limit:
        yield Caution(kind="warm-up", subject=str(budgets[0]), found=warmup, limit=limit)
    if training.data.is_unindexed:
        yield Caution(kind="stream", subject="data.sources")
    if batch < run.devices:
        yield Caution(kind="small batch", subject="optimiser.batch_size", found=batch, limit=run.devices)


def of_probes(probes: Iterable[ProbeCost]) -> Iterator[Caution]:
    """Tasks whose heads do not fit a rank together."""
    for cost in probes:
        if cost.rounds > 1:
            yield Caution(kind="rounds", subject=cost.task, found=cost.rounds, limit=1)


def uneven_heads(models: Iterable[ModelConfig]) -> dict[str, Caution]:
    """Size -> caution, where a narrower size has more than twice as many heads, or heads more than twice as wide.

    A shape without `-h<heads>` takes the widest head of a power of two channels that divides its width and leaves at
    least two, so neighbouring widths can differ much: 2 heads of 16 channels at width 32, 13 of 4 at width 52.
    Attentive probes, which have as many heads as the trunk, follow that more than they follow the loss
    (docs/study/cifar.md).
    """
    sizes = sorted({model.name: model for model in models}.values(), key=lambda model: model.width)
    found = {}
    for size in sizes:
        narrower = [each for each in sizes if each.width < size.width]
        odd = [e for e in narrower if e.num_heads > 2 * size.num_heads or e.head_dim > 2 * size.head_dim]
        if odd:
            found[size.name] = Caution(kind="heads", subject=size.name, found=size.num_heads, limit=odd[-1].num_heads)
    return found
