"""The data sets of a run's mixture: opened, compared with what the run was planned with, and cut to its images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from aimscale.harness.data.errors import DataError
from aimscale.harness.data.processes import SharedArray
from aimscale.harness.data.random_access import I64, make_key, permute, random_bits
from aimscale.harness.data.store.index import ShardDataset, open_dataset
from aimscale.harness.data.stream.mixture import Mixture
from aimscale.harness.data.stream.overlap import refuse_overlap
from aimscale.harness.data.stream.pixel_cache import PixelCache

if TYPE_CHECKING:
    from aimscale.harness.run.config import RunConfig

_MAX_LISTED = 1 << 22  # subsets up to this size are listed at start-up, which takes 2 s and spares a permutation later


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One data set of the mixture."""

    dataset: ShardDataset
    num_unique: int
    """U of this source: the first of the fixed permutation of its pool."""
    subset: SharedArray | None
    """Those U sample numbers; None when they are too many to list at start-up."""
    key: int
    """Of its epochs; depends on the run's seed."""
    pixels: PixelCache

    def sample_numbers(self, slots: I64, epochs: I64) -> I64:
        """Sample numbers at `slots` (0..U-1) of `epochs`."""
        keys = random_bits(self.key, epochs)
        within = permute(slots, self.num_unique, keys)
        return self.subset.values[within] if self.subset is not None else _first_of_pool(self.dataset, within)


def open_sources(config: RunConfig, mixture: Mixture, *, cache_dir: str | None, cache_gb: float) -> list[Source]:
    """The sources of a run, in the order of its configuration; see `TrainStream` for what is refused."""
    training = config.training
    datasets = [open_dataset(source.path, cache_dir=cache_dir, cache_gb=cache_gb) for source in training.data.sources]
    for source, dataset in zip(training.data.sources, datasets, strict=True):
        if source.fingerprint not in (None, dataset.fingerprint):
            raise DataError(
                f"{source.path} holds other images (fingerprint {dataset.fingerprint}) than those this run trains "
                f"on ({source.fingerprint}); put those back, or launch the sweep again to train a new run on these"
            )
    held_out = open_dataset(config.evaluation.validation.path, cache_dir=cache_dir, cache_gb=cache_gb)
    refuse_overlap(datasets, held_out)
    counts = _unique_per_source(config, mixture, datasets)
    return [
        Source(
            dataset=dataset,
            num_unique=num_unique,
            subset=SharedArray(_first_of_pool(dataset, np.arange(num_unique))) if num_unique <= _MAX_LISTED else None,
            key=make_key("epoch", training.seed, number),
            pixels=PixelCache(dataset, training.model.channels),
        )
        for number, (dataset, num_unique) in enumerate(zip(datasets, counts, strict=True))
    ]


def _unique_per_source(config: RunConfig, mixture: Mixture, datasets: Sequence[ShardDataset]) -> list[int]:
    data = config.training.data
    for dataset in datasets:
        num_bad = dataset.info.num_bad
        if not dataset.num_usable or num_bad / len(dataset) > data.max_bad_fraction:
            first = dataset.describe(int(dataset.index.bad[0]))
            raise DataError(
                f"{dataset.path}: {num_bad} of {len(dataset)} images cannot be decoded, first {first}; "
                f"repair them or raise data.max_bad_fraction ({data.max_bad_fraction:g})"
            )
    wanted = data.unique_images
    if wanted is None:
        return [dataset.num_usable for dataset in datasets]
    counts = mixture.counts(wanted)
    for dataset, count in zip(datasets, counts, strict=True):
        if not 1 <= count <= dataset.num_usable:
            raise DataError(
                f"unique_images {wanted} takes {count} images of {dataset.path}, which has {dataset.num_usable} "
                f"usable ones; {'lower' if count else 'raise'} data.unique_images or change the probabilities"
            )
    return counts


def _first_of_pool(dataset: ShardDataset, numbers: I64) -> I64:
    """Sample numbers at `numbers` of the one fixed permutation of the usable images, the same for every seed."""
    return dataset.usable(permute(numbers, dataset.num_usable, make_key("subset")))
