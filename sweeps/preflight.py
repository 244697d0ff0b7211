"""Look at the data before anything is made: a missing folder should stop a launch, not its hundredth run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sweeps.planner import Run

MAX_OPENED = 50_000_000
"""The index of a larger data set is left to the workers: opening it takes 25 bytes an image."""


def check_data(runs: Sequence[Run]) -> None:
    """Open every data set that the runs read, once.

    Raises:
        DataError: a folder or an index is missing, a shard is missing or truncated, or a probe's data have no labels.
    """
    unlabelled: dict[str, None] = {}
    labelled: dict[str, None] = {}
    for run in runs:
        result = run.config.result
        unlabelled |= dict.fromkeys([*(source.path for source in result.data.sources), result.validation.path])
        labelled |= dict.fromkeys(path for probe in result.probes for path in (probe.train, probe.test))
    if not unlabelled:
        return
    from harness.data.index import open_dataset  # imports torch

    for path in unlabelled | labelled:
        if _num_samples(path) > MAX_OPENED:
            continue
        dataset = open_dataset(path)
        if path in labelled:
            dataset.require_labels()


def _num_samples(path: str) -> int:
    """Images of a local data set by its own word; 0 where it cannot be asked, which `open_dataset` then explains."""
    try:
        return int(json.loads((Path(path) / "dataset.json").read_text())["num_samples"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
