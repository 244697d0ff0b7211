"""Look at the data before anything is made: a missing folder should stop a launch, not its hundredth run."""

from __future__ import annotations

from collections.abc import Sequence

from aimscale.harness.data.store.card import num_images
from aimscale.harness.run.config import ModelSection, ProbeSection
from aimscale.sweeps.plan.planner import Run

MAX_OPENED = 50_000_000
"""The index of a larger data set is left to the workers: opening it takes 25 bytes per image."""


def check_data(runs: Sequence[Run]) -> None:
    """Open every data set that the runs read, once.

    Raises:
        DataError: a folder or an index is missing, or a shard is missing or truncated.
        ProbeError: the data of a probe have no labels, or its two sides do not fit together, or
            they bear a benchmark's name and are not that benchmark.
    """
    unlabelled: dict[str, None] = {}
    tasks: dict[tuple[str, str, str], tuple[ProbeSection, ModelSection]] = {}
    for run in runs:
        training, evaluation = run.config.training, run.config.evaluation
        sources = () if training.data.is_unindexed else (source.path for source in training.data.sources)
        unlabelled |= dict.fromkeys([*sources, evaluation.validation.path])
        tasks |= {(probe.task, probe.train, probe.test): (probe, training.model) for probe in evaluation.probes}
    if not unlabelled:
        return
    from aimscale.harness.data.store.index import open_dataset  # imports torch

    for path in unlabelled:
        if (num_images(path) or 0) <= MAX_OPENED:
            open_dataset(path)
    if not tasks:
        return
    from aimscale.harness.probe.features.images import open_task

    for probe, model in tasks.values():
        if max(num_images(probe.train) or 0, num_images(probe.test) or 0) <= MAX_OPENED:
            open_task(probe, model)
